"""A trained model from its run directory: configuration, parameters, tokenizer."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from holo_jax.config import HoloConfig
from holo_jax.manifest import DamageError, read_manifest, verify
from holo_jax.model import HoloForCausalLM
from holo_jax.optional import require
from holo_jax.tokenizers import Tokenizer, TokenizerError, load_tokenizer

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"


class PretrainedError(ValueError):
    """A run directory that cannot be used. The message is complete in one line."""


class Pretrained(NamedTuple):
    """A trained model.

    Attributes:
      model: with float32 parameters.
      tokenizer: of the data it was trained on; None if that has none (random tokens).
      step: optimizer steps behind the parameters.
      weights: identity of the parameters (a hash over the checkpoint's files), for ``save_state``.
    """

    model: HoloForCausalLM
    tokenizer: Tokenizer | None
    step: int
    weights: str

    @property
    def config(self) -> HoloConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as a nested dict of arrays."""
        return nnx.to_pure_dict(nnx.state(self.model, nnx.Param))


def load_pretrained(run: str | Path, *, step: int | None = None, tokenizer: str | Path = "") -> Pretrained:
    """Loads a run's model, verified byte for byte against the checkpoint's own hashes.

    Args:
      run: a run directory, or ``RUN/checkpoints/STEP``.
      step: which checkpoint; the newest committed one if None.
      tokenizer: what ``load_tokenizer`` takes. By default ``RUN/tokenizer`` if it is there, else the
        tokenizer of the data named by the run's configuration.

    Raises:
      PretrainedError: in one line, for a missing run, configuration, checkpoint or tokenizer, a checkpoint
        that is damaged, and arrays that are not those of the configuration.
      ImportError: if orbax, or the tokenizer's library, is not installed.
    """
    directory, step = _locate(Path(run), step)
    settings = _read_settings(directory)
    config = _model_config(directory, settings)
    checkpoint, step = _choose(directory, step)
    try:
        verify(checkpoint)
        files = read_manifest(checkpoint)[1]
    except DamageError as damage:
        raise PretrainedError(
            f"checkpoint {checkpoint} is damaged: {damage}; name another by its step"
        ) from None
    params = _restore(checkpoint / "state", config)
    graphdef, abstract = nnx.split(_abstract(config), nnx.Param)
    nnx.replace_by_pure_dict(abstract, params)
    model = nnx.merge(graphdef, abstract)
    return Pretrained(model, _tokenizer(directory, settings, tokenizer), step, _identity(files))


def _abstract(config: HoloConfig) -> HoloForCausalLM:
    return nnx.eval_shape(lambda: HoloForCausalLM(config, rngs=nnx.Rngs(0)))


def _locate(path: Path, step: int | None) -> tuple[Path, int | None]:
    if (path / CONFIG_FILE).is_file():
        return path, step
    run = path.parent.parent
    if path.name.isdecimal() and path.parent.name == CHECKPOINTS and (run / CONFIG_FILE).is_file():
        if step is not None and step != int(path.name):
            raise PretrainedError(f"step is {step}, but {path} is the checkpoint of another")
        return run, int(path.name)
    if not path.exists():
        raise PretrainedError(f"run {path} does not exist")
    raise PretrainedError(f"{path} is no run directory: it has no {CONFIG_FILE}")


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} cannot be read: {_one_line(error)}") from None
    if not isinstance(settings, dict):
        raise PretrainedError(f"{path} holds {type(settings).__name__}; it must be an object of fields")
    return settings


def _model_config(directory: Path, settings: dict[str, Any]) -> HoloConfig:
    try:
        return HoloConfig.from_dict(settings["model"])
    except KeyError:
        raise PretrainedError(f"{directory / CONFIG_FILE} has no section model") from None
    except (TypeError, ValueError) as error:
        raise PretrainedError(f"{directory / CONFIG_FILE}: model.{_one_line(error)}") from None


def _choose(directory: Path, step: int | None) -> tuple[Path, int]:
    """The checkpoint of ``step``, or the newest one that was committed (a save may be under way)."""
    root = directory / CHECKPOINTS
    steps = (
        sorted(int(path.name) for path in root.glob("*") if path.name.isdecimal()) if root.is_dir() else []
    )
    if step is not None:
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise PretrainedError(f"{directory} has no checkpoint of step {step}; there are: {there}")
        return root / str(step), step
    for newest in reversed(steps):
        try:
            read_manifest(root / str(newest))
        except DamageError as damage:
            if damage.kind in ("uncommitted", "empty"):
                continue
            raise PretrainedError(f"checkpoint {root / str(newest)} is damaged: {damage}") from None
        return root / str(newest), newest
    raise PretrainedError(f"{directory} has no committed checkpoint")


def _restore(path: Path, config: HoloConfig) -> dict[str, Any]:
    ocp = require("orbax.checkpoint", "train")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        nnx.to_pure_dict(nnx.state(_abstract(config), nnx.Param)),
    )
    try:
        handler = ocp.PyTreeCheckpointHandler()
        # Other shapes and dtypes would be cast or cut without a word.
        _compare(_describe(handler.metadata(path.absolute()).tree.get("params", {})), _describe(shapes), path)
        target = {"params": shapes}
        arguments = ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        return handler.restore(path.absolute(), args=arguments)["params"]
    except PretrainedError:
        raise
    except Exception as error:  # orbax raises many kinds
        raise PretrainedError(f"{path} is intact but cannot be read: {_one_line(error)}") from error


def _describe(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = (
        ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in leaves
    )
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, (_, leaf) in zip(names, leaves, strict=True)}


def _compare(saved: dict[str, str], wanted: dict[str, str], path: Path) -> None:
    lines = [
        f"{name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise PretrainedError(
            f"{path} holds other arrays than its configuration: {'; '.join(lines[:3])}{more}"
        )


def _tokenizer(directory: Path, settings: dict[str, Any], spec: str | Path) -> Tokenizer | None:
    data = settings.get("data", {})
    if not spec and (directory / TOKENIZER).is_dir():
        spec = directory / TOKENIZER
    elif not spec and data.get("source") == "python":
        spec = "bytes"
    elif not spec and data.get("source") == "prepared":
        spec = data["paths"][0]
    if not spec:
        return None
    try:
        return load_tokenizer(spec)
    except TokenizerError as error:
        raise PretrainedError(f"the tokenizer of {directory} cannot be loaded: {_one_line(error)}") from None


def _identity(files: dict[str, list[Any]]) -> str:
    state = {name: entry for name, entry in files.items() if name.startswith("state/")}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + "..."
