"""The one schema of every ``results.json``: what was measured, how, on what, and how sure we are.

A result file is a flat list of values. Each value names its metric and the setting it belongs to
(``where``: model, length, pairs, ...), its number of trials, and a 95% interval, so that tables,
plots and the report read every evaluation the same way. A cell that could not be measured has a
``status`` ("oom", "diverged", "failed", "unavailable") and no number: it is never recorded as zero.
"""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.intervals import bootstrap, wilson

SCHEMA = 1
FILENAME = "results.json"
STATUSES = ("ok", "oom", "diverged", "failed", "unavailable")
SOURCES = ("measured", "theory", "published")
INTERVALS = ("wilson", "bootstrap", "normal", "exact", "none")

Scalar = str | int | float | bool | None


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class Value:
    """One number of an evaluation.

    Attributes:
      metric: what is counted ("accuracy", "mse", "perplexity", ...).
      where: the cell: names and values of the settings that distinguish this number from the others.
      value: the number; None exactly when ``status`` is not "ok".
      low, high: ends of the 95% interval, ``low <= value <= high``; equal to the value for "exact".
      n: trials behind the number; 0 for "theory" and "published".
      interval: "wilson" (proportions), "bootstrap" (means), "normal" (1.96 standard errors, where only
        those are known), "exact" (deterministic), "none" (a published or theoretical number without one; a
        measured value is never "none").
      source: "measured" here, "theory" (a formula) or "published" (somebody else's figure).
      status: "ok", "oom" (out of memory), "diverged" (not finite), "failed", "unavailable" (the environment
        lacks something).
      detail: free text, for example the error behind a status or the citation of a published value.
    """

    metric: str
    where: Mapping[str, Scalar]
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    interval: str = "none"
    source: str = "measured"
    status: str = "ok"
    detail: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (("status", STATUSES), ("source", SOURCES), ("interval", INTERVALS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"value.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}"
                )
        if not self.metric or not isinstance(self.metric, str):
            raise ValueError(f"value.metric is {self.metric!r}; it must be a non-empty string")
        for key, item in self.where.items():
            if not isinstance(key, str) or not (item is None or isinstance(item, str | int | float | bool)):
                raise TypeError(
                    f"value.where[{key!r}] is {item!r}; settings are strings, numbers, booleans or None"
                )
        if self.status != "ok":
            if (self.value, self.low, self.high) != (None, None, None):
                raise ValueError(f"a value with status {self.status!r} has no number; got {self.value}")
            return
        if not _finite(self.value):
            raise ValueError(
                f"value of {self.metric} at {dict(self.where)} is {self.value!r}; it must be finite"
            )
        if self.interval == "none":
            if self.source == "measured":
                raise ValueError(f"{self.metric} at {dict(self.where)} is measured; it needs an interval")
            if (self.low, self.high) != (None, None):
                raise ValueError("interval is 'none', so low and high must be None")
            return
        if not (_finite(self.low) and _finite(self.high) and self.low <= self.value <= self.high):
            raise ValueError(
                f"{self.metric} at {dict(self.where)}: need low <= value <= high, "
                f"got {self.low}, {self.value}, {self.high}"
            )
        if self.interval == "exact" and not self.low == self.value == self.high:
            raise ValueError("interval is 'exact', so low and high must equal the value")
        if self.source == "measured" and self.n < 1:
            raise ValueError(
                f"{self.metric} at {dict(self.where)} is measured; n is {self.n}, it must be at least 1"
            )


def exact(metric: str, value: float, *, n: int = 1, detail: str = "", **where: Scalar) -> Value:
    """A deterministic value: its interval is the number itself."""
    value = float(value)
    return Value(metric, where, value, value, value, n, "exact", detail=detail)


def proportion(metric: str, successes: int, n: int, *, detail: str = "", **where: Scalar) -> Value:
    """A measured proportion with Wilson's interval."""
    return Value(metric, where, *wilson(int(successes), int(n)), int(n), "wilson", detail=detail)


def mean(metric: str, samples, *, seed: int = 0, detail: str = "", **where: Scalar) -> Value:
    """A measured mean of independent samples with its bootstrap interval."""
    return Value(metric, where, *bootstrap(samples, seed=seed), len(samples), "bootstrap", detail=detail)


def theory(metric: str, value: float, *, detail: str = "", **where: Scalar) -> Value:
    """A value given by a formula."""
    return Value(metric, where, float(value), source="theory", detail=detail)


def published(metric: str, value: float, *, citation: str, **where: Scalar) -> Value:
    """A value measured and published by others, with its citation."""
    return Value(metric, where, float(value), source="published", detail=citation)


def absent(metric: str, status: str, *, detail: str, **where: Scalar) -> Value:
    """A cell that could not be measured, and why."""
    return Value(metric, where, None, status=status, detail=detail)


_FIELDS = {
    "schema": int,
    "evaluation": str,
    "command": str,
    "settings": dict,
    "seeds": list,
    "device": dict,
    "versions": dict,
    "commit": str,
    "started": str,
    "seconds": (int, float),
    "notes": list,
    "values": list,
}


@dataclasses.dataclass(frozen=True)
class Results:
    """A whole ``results.json``.

    Attributes:
      evaluation: name of the module under ``eval`` that made it.
      settings: the resolved settings, all of them.
      seeds: every seed used.
      values: the numbers.
      notes: sentences a reader of the numbers must know (a failed control, a missing part).
      command, device, versions, commit, started, seconds: provenance.
    """

    evaluation: str
    settings: Mapping[str, object]
    seeds: Sequence[int]
    values: Sequence[Value]
    notes: Sequence[str] = ()
    command: str = ""
    device: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    commit: str = ""
    started: str = ""
    seconds: float = 0.0

    def select(self, metric: str | None = None, *, source: str | None = None, **where: Scalar) -> list[Value]:
        """Values of a metric whose ``where`` holds all the given settings, in order."""
        return [
            v
            for v in self.values
            if (metric is None or v.metric == metric)
            and (source is None or v.source == source)
            and all(v.where.get(k) == w for k, w in where.items())
        ]

    def one(self, metric: str, **where: Scalar) -> Value:
        """The only value that matches.

        Raises:
          LookupError: if none or several match.
        """
        found = self.select(metric, **where)
        if len(found) != 1:
            raise LookupError(f"{len(found)} values match {metric} at {where}; exactly one was expected")
        return found[0]

    def to_dict(self) -> dict:
        """Plain data, in the order of the schema."""
        data = {"schema": SCHEMA, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}
        data["settings"] = json.loads(json.dumps(dict(self.settings)))
        data["values"] = [{**dataclasses.asdict(v), "where": dict(v.where)} for v in self.values]
        for key in ("seeds", "notes"):
            data[key] = list(data[key])
        return {name: data[name] for name in _FIELDS}

    def write(self, directory: Path) -> Path:
        """Validates and writes ``directory/results.json`` atomically; returns its path."""
        data = self.to_dict()
        validate(data)
        path = Path(directory) / FILENAME
        write_atomically(path, _format(data))
        return path

    @staticmethod
    def read(path: Path) -> "Results":
        """Reads and validates a result file (or the one inside a directory)."""
        path = Path(path)
        path = path / FILENAME if path.is_dir() else path
        try:
            data = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        try:
            validate(data)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error
        fields = {name: data[name] for name in _FIELDS if name not in ("schema", "values")}
        return Results(values=[Value(**v) for v in data["values"]], **fields)


def validate(data: object) -> None:
    """Checks plain data against the schema.

    Raises:
      TypeError, ValueError: naming the field, its value and the constraint.
    """
    if not isinstance(data, dict):
        raise TypeError(f"results are {type(data).__name__}; they must be an object")
    if set(data) != set(_FIELDS):
        missing, extra = sorted(set(_FIELDS) - set(data)), sorted(set(data) - set(_FIELDS))
        raise ValueError(f"results lack the fields {missing} and have the unknown fields {extra}")
    for name, kind in _FIELDS.items():
        if not isinstance(data[name], kind):
            raise TypeError(f"results.{name} is {type(data[name]).__name__}; the schema says {kind}")
    if data["schema"] != SCHEMA:
        raise ValueError(f"results.schema is {data['schema']}; this code reads {SCHEMA}")
    for name in ("evaluation", "command", "commit", "started"):
        if not data[name]:
            raise ValueError(f"results.{name} is empty")
    for name, required in (("device", ("platform", "kind")), ("versions", ("python", "jax", "holo_jax"))):
        absent_keys = [key for key in required if key not in data[name]]
        if absent_keys:
            raise ValueError(f"results.{name} lacks {absent_keys}")
    if not all(isinstance(seed, int) for seed in data["seeds"]):
        raise TypeError(f"results.seeds is {data['seeds']}; seeds are integers")
    if not data["values"]:
        raise ValueError("results.values is empty; an evaluation without a number is not a result")
    seen = set()
    for item in data["values"]:
        value = Value(**item)
        key = (value.metric, value.source, json.dumps(dict(value.where), sort_keys=True))
        if key in seen:
            raise ValueError(
                f"two values for {value.metric} at {dict(value.where)}; `where` must tell them apart"
            )
        seen.add(key)


def _format(data: dict) -> str:
    """JSON with one value a line: small, and a changed number is a changed line."""
    values = ",\n".join("  " + json.dumps(value, allow_nan=False) for value in data["values"])
    head = json.dumps({**data, "values": []}, indent=1, allow_nan=False)
    return head.removesuffix("[]\n}") + "[\n" + values + "\n ]\n}\n"


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old content or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
