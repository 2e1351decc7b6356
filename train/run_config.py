"""The resolved configuration of a run: frozen, validated, JSON in and out, compared field by field.

Defaults live in ``configs/base.py``; here a field has one only if it is younger than runs that are read.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from holo_jax.config import HoloConfig
from holo_jax.exchange import REDUCE_DTYPES, TRANSPORTS, Exchange
from holo_jax.precision import Precision
from train.errors import ConfigError, UsageError

CONFIG_FILE = "config.json"
IDENTITY = "identity"  # in the section ``data`` of the file: what the data was, beside where it was
_MAX_JSON_BYTES = 1 << 24


def _require(holds: bool, field: str, value: Any, constraint: str) -> None:
    if not holds:
        raise ConfigError(f"{field} is {value!r}; it must be {constraint}")


def _positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 < value < float("inf"), section + name, value, "positive and finite")


def _not_negative(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value < float("inf"), section + name, value, "zero or positive, and finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read. Fields are explained in ``configs/base.py``."""

    source: str
    paths: tuple[str, ...]
    weights: tuple[float, ...]
    heldout_split: str
    num_threads: int

    def __post_init__(self) -> None:
        _require(
            self.source in ("python", "prepared", "random"),
            "data.source",
            self.source,
            "one of python, prepared, random",
        )
        _not_negative("data.", self, "num_threads")
        if self.source == "prepared":
            _require(len(self.paths) > 0, "data.paths", self.paths, "at least one prepared directory")
        else:
            _require(not self.paths, "data.paths", self.paths, f"empty with data.source {self.source!r}")
        _require(
            len(self.weights) in (0, len(self.paths)),
            "data.weights",
            self.weights,
            f"empty or one weight for each of the {len(self.paths)} data.paths",
        )
        for weight in self.weights:
            _require(0 < weight < float("inf"), "data.weights", self.weights, "positive and finite numbers")


OPTIMIZERS = ("adamw", "muon")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule. Fields are explained in ``configs/base.py``."""

    name: str = "adamw"
    learning_rate: float
    warmup_steps: int
    final_ratio: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float

    def __post_init__(self) -> None:
        _require(self.name in OPTIMIZERS, "optimizer.name", self.name, " or ".join(OPTIMIZERS))
        _positive("optimizer.", self, "learning_rate", "eps")
        _not_negative("optimizer.", self, "warmup_steps", "weight_decay", "clip_norm")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name}", value, "in [0, 1)")
        _require(0 <= self.final_ratio <= 1, "optimizer.final_ratio", self.final_ratio, "in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices and sizes of the mesh axes. Fields are explained in ``configs/base.py``."""

    devices: int
    data: int
    fsdp: int
    seq: int
    tensor: int
    reshard_after_forward: bool = True
    reduce_dtype: str = "float32"
    transport: str = "collectives"
    in_order: bool = True

    def __post_init__(self) -> None:
        _not_negative("mesh.", self, "devices")
        _positive("mesh.", self, "fsdp", "seq", "tensor")
        allowed = self.data == -1 or self.data > 0
        _require(allowed, "mesh.data", self.data, "positive, or -1 for the devices left")
        for name, choices in (("reduce_dtype", REDUCE_DTYPES), ("transport", TRANSPORTS)):
            value = getattr(self, name)
            _require(value in choices, f"mesh.{name}", value, " or ".join(choices))

    @property
    def exchange(self) -> Exchange:
        """How devices send weights and gradients."""
        return Exchange(self.reshard_after_forward, self.reduce_dtype, self.transport, self.in_order)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out data. Fields are explained in ``configs/base.py``."""

    every_steps: int
    num_batches: int
    global_batch_size: int
    context_length: int
    heldout_summary: bool
    sample_tokens: int
    sample_prompt: str
    sample_temperature: float

    def __post_init__(self) -> None:
        _not_negative("eval.", self, "every_steps", "context_length", "sample_tokens", "sample_temperature")
        _positive("eval.", self, "num_batches", "global_batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep. Fields are explained in ``configs/base.py``."""

    every_steps: int
    keep_latest: int
    keep_best: int
    keep_every_steps: int

    def __post_init__(self) -> None:
        _positive("checkpoint.", self, "every_steps", "keep_latest")
        _not_negative("checkpoint.", self, "keep_best", "keep_every_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Reaction to non-finite steps and loss spikes. Fields are explained in ``configs/base.py``."""

    max_nonfinite_steps: int
    max_rollbacks: int
    spike_window: int
    spike_threshold: float

    def __post_init__(self) -> None:
        _positive("guard.", self, "max_nonfinite_steps", "spike_threshold")
        _not_negative("guard.", self, "max_rollbacks", "spike_window")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """Time limits of the phases. Fields are explained in ``configs/base.py``."""

    startup_seconds: float
    step_seconds: float
    save_seconds: float

    def __post_init__(self) -> None:
        _not_negative("watchdog.", self, "startup_seconds", "step_seconds", "save_seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown. Fields are explained in ``configs/base.py``."""

    every_steps: int
    tensorboard: bool

    def __post_init__(self) -> None:
        _positive("log.", self, "every_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run. Fields are explained in ``configs/base.py``.

    Raises:
      ConfigError: naming the field, its value and what it must be.
    """

    name: str
    seed: int
    num_steps: int
    global_batch_size: int
    context_length: int
    accumulation_steps: int
    model: HoloConfig
    data: DataConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    guard: GuardConfig
    watchdog: WatchdogConfig
    log: LogConfig

    def __post_init__(self) -> None:
        plain = self.name not in ("", ".", "..") and "/" not in self.name
        _require(plain, "name", self.name, "a directory name")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2^32)")
        _positive("", self, "num_steps", "global_batch_size", "accumulation_steps")
        _require(self.context_length >= 2, "context_length", self.context_length, "at least 2")
        _require(
            self.global_batch_size % self.accumulation_steps == 0,
            "accumulation_steps",
            self.accumulation_steps,
            f"a divisor of global_batch_size ({self.global_batch_size})",
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens read in one optimizer step."""
        return self.global_batch_size * self.context_length

    def to_dict(self) -> dict[str, Any]:
        """Plain values (lists for tuples), for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads plain values: those of ``to_dict``, or of a file in ``configs/``.

        In the ``model`` section a field that is None takes the value of the preset named by ``preset``.

        Raises:
          ConfigError: for an unknown field (with the nearest name), a missing one, a wrong type or range.
        """
        return _read_section(cls, values, "")

    def write(self, workdir: Path, identity: Mapping[str, Any] | None = None) -> None:
        """Writes ``config.json``, in one piece; ``identity`` of the data goes into its section ``data``."""
        values = self.to_dict()
        if identity is not None:
            values["data"][IDENTITY] = identity
        target = workdir / CONFIG_FILE
        part = target.with_suffix(".part")
        part.write_text(json.dumps(values, indent=2) + "\n")
        part.replace(target)

    @classmethod
    def read(cls, workdir: Path) -> Self:
        """Reads a run's ``config.json``; no Python file is needed.

        Raises:
          UsageError: if it is missing or unreadable, ConfigError if a field is wrong.
        """
        return cls.read_with_identity(workdir)[0]

    @classmethod
    def read_with_identity(cls, workdir: Path) -> tuple[Self, Any]:
        """``read``, and the identity of the data as it was written; None if there is none."""
        if not (workdir / CONFIG_FILE).exists():
            raise UsageError(f"{workdir} is no run directory: it has no {CONFIG_FILE}")
        values = read_object(workdir / CONFIG_FILE)
        data = values.get("data")
        identity = data.pop(IDENTITY, None) if isinstance(data, dict) else None
        return cls.from_dict(values), identity


def read_object(path: Path) -> dict[str, Any]:
    """The object in a small JSON file.

    Raises:
      UsageError: if it is missing, unreadable, larger than 16 MiB, or no object.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
        if len(text) > _MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {_MAX_JSON_BYTES} bytes")
        values = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds {type(values).__name__}; it must be an object of fields")
    return values


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, by dotted name: (old value, new value); None where a side has none."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*old, *(n for n in new if n not in old)]:
        left, right = old.get(name), new.get(name)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found |= differences(left, right, f"{prefix}{name}.")
        elif left != right:
            found[prefix + name] = (left, right)
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _read_section(kind: Any, values: Any, prefix: str) -> Any:
    """Builds the dataclass ``kind`` from plain values."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')} is {values!r}; it must hold fields")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    _refuse_unknown(values, names, prefix)
    # A field with a default is younger than runs that are read: they did what its default says.
    younger = {f.name for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    for name in names:
        if name not in values and name not in younger:
            raise ConfigError(f"{prefix}{name} is missing")
    given = (name for name in names if name in values)
    return kind(**{name: _read_value(hints[name], values[name], prefix + name) for name in given})


def _refuse_unknown(values: Mapping[str, Any], known: list[str], prefix: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ConfigError(f"{prefix}{name} is no field of the configuration{hint}")


def _read_value(hint: Any, value: Any, field: str) -> Any:
    if hint is HoloConfig:
        return _read_model(value)
    if dataclasses.is_dataclass(hint):
        return _read_section(hint, value, field + ".")
    if isinstance(hint, types.GenericAlias):
        item = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{field} is {value!r}; it must be a sequence of {item.__name__}")
        return tuple(_read_value(item, entry, field) for entry in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        _require(abs(value) < 2**53, field, value, "exact as a float")
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{field} is {value!r} ({type(value).__name__}); it must be {hint.__name__}")
    return value


def _read_model(values: Any) -> HoloConfig:
    if not isinstance(values, Mapping):
        raise ConfigError(f"model is {values!r}; it must hold fields")
    given = {name: value for name, value in values.items() if value is not None}
    preset = given.pop("preset", "holo")
    known = [field.name for field in dataclasses.fields(HoloConfig)]
    _refuse_unknown(given, [*known, "preset"], "model.")
    precision = given.pop("precision", {})
    if not isinstance(precision, Mapping):
        raise ConfigError(f"model.precision is {precision!r}; it must hold fields")
    _refuse_unknown(precision, [field.name for field in dataclasses.fields(Precision)], "model.precision.")
    roles = {name: value for name, value in precision.items() if value is not None}
    try:
        return HoloConfig.preset(preset, precision=Precision(**roles), **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.{_one_line(error)}") from None
