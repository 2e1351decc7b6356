"""States as files: a document is read once, saved, and questioned later, elsewhere, many times.

The file is a safetensors file (no code in it). Its metadata holds, as JSON, the configuration and the
identity of the weights that the state belongs to, its structure, and the SHA-256 of all that and of its
arrays. Complex numbers are stored as pairs of float32, bfloat16 as its bits in uint16.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from holo_jax.array_types import Array, Float
from holo_jax.config import HoloConfig
from holo_jax.generate.checks import cache_use
from holo_jax.generate.forms import is_split
from holo_jax.generate.reading import init_state
from holo_jax.generate.state_precision import stored_dtype
from holo_jax.model import ModelState

FORMAT = "holo-jax state"
_EXECUTION = (
    "remat",
    "scan_unroll",
    "memory_method",
    "memory_backend",
    "block_backend",
    "chunk_size",
    "loss_chunk",
)
"""Fields of the configuration that change how a state is computed, not what it means."""


class StateError(Exception):
    """A state file that cannot be used. The message is complete in one line."""


class StateDamagedError(StateError):
    """A file that is no state file, or not what was written."""


class StateMismatchError(StateError):
    """A state that belongs to another configuration or other weights."""


class SavedState(NamedTuple):
    """What a state file holds: the state, and what it predicts, if that was saved."""

    state: ModelState
    logits: Float[Array, "b v"] | None


def save_state(
    path: str | Path,
    state: ModelState,
    config: HoloConfig,
    *,
    logits: Float[Array, "b v"] | None = None,
    weights: str = "",
) -> None:
    """Writes a state, in one piece or not at all.

    Args:
      path: of the file.
      state: in any ``state_dtype``.
      config: of the model that made it.
      logits: of the next token, to go on without a prompt.
      weights: identity of the model's parameters (``Pretrained.weights``); a state of other weights means
        nothing, and is refused when both identities are known.

    Raises:
      ValueError: for a state that is not one of ``config``.
      OSError: if the file cannot be written.
    """
    if is_split(state.layers):
        raise ValueError("the state is split over periods; stack_state makes one that can be saved")
    batch = int(state.position.shape[0])
    tree = SavedState(state, logits)
    structure = _Structure(batch, _cache_length(state), stored_dtype(state), logits is not None)
    expected = _leaves(structure.template(config))
    found = _leaves(tree)
    _check_leaves(found, expected, ValueError, "the state is not one of this configuration")
    arrays = {name: _to_storable(np.asarray(leaf)) for name, leaf in found.items()}
    about = {
        "format": FORMAT,
        "config": _meaning(config),
        "weights": weights,
        "structure": structure._asdict(),
        "dtypes": {name: str(leaf.dtype) for name, leaf in found.items()},
    }
    about["sha256"] = _digest(arrays, about)
    _write_atomically(Path(path), safetensors.numpy.save(arrays, {"holo_jax": json.dumps(about)}))


def load_state(path: str | Path, config: HoloConfig, *, weights: str = "") -> SavedState:
    """Reads a state for a model of this configuration.

    Raises:
      StateError: if the file cannot be read.
      StateDamagedError: if it is no state file, or its content is not what was written.
      StateMismatchError: if it was made by another configuration (naming the fields) or other weights.
    """
    path = Path(path)
    arrays, about = _read(path)
    try:
        theirs, structure = about["config"], _Structure(**about["structure"])
        dtypes, digest, their_weights = about["dtypes"], about.pop("sha256"), about["weights"]
    except (KeyError, TypeError):
        raise StateDamagedError(f"{path} has incomplete metadata") from None
    if digest != _digest(arrays, about):
        raise StateDamagedError(f"{path} is damaged: its content does not have the hash saved with it")
    ours = _meaning(config)
    if ours != theirs:
        raise StateMismatchError(f"{path} belongs to another configuration: {_differences(theirs, ours)}")
    if weights and their_weights and weights != their_weights:
        raise StateMismatchError(
            f"{path} belongs to other weights ({their_weights[:12]}) than the model's ({weights[:12]})"
        )
    template = structure.template(config)
    loaded = {name: _from_storable(array, dtypes.get(name, "")) for name, array in arrays.items()}
    _check_leaves(
        loaded, _leaves(template), StateDamagedError, f"{path} does not hold what its metadata says"
    )
    leaves = [jnp.asarray(loaded[name]) for name in _leaves(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


class _Structure(NamedTuple):
    """What decides the shapes and dtypes of a state, besides its configuration."""

    batch: int
    cache_length: int
    state_dtype: str
    logits: bool

    def template(self, config: HoloConfig) -> SavedState:
        """The state as ``jax.ShapeDtypeStruct``."""
        options = dict(cache_length=self.cache_length, state_dtype=self.state_dtype)
        state = jax.eval_shape(lambda: init_state(config, self.batch, **options))  # type: ignore[arg-type]
        logits = jax.ShapeDtypeStruct((self.batch, config.vocab_size), jnp.float32)
        return SavedState(state, logits if self.logits else None)  # type: ignore[arg-type]


def _cache_length(state: ModelState) -> int:
    use = cache_use(state)
    return 0 if use is None else use[0]


def _leaves(tree: Any) -> dict[str, Any]:
    """Leaves by dotted name, in the order of the tree."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}


def _check_leaves(found: dict[str, Any], expected: dict[str, Any], error: type, text: str) -> None:
    describe = lambda leaf: "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"  # noqa: E731
    for name in [*expected, *(name for name in found if name not in expected)]:
        ours, theirs = describe(found.get(name)), describe(expected.get(name))
        if ours != theirs:
            raise error(f"{text}: {name} is {ours}, expected {theirs}")


def _to_storable(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    if array.dtype == np.complex64:
        return array.view(np.float32).reshape(*array.shape, 2)
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def _from_storable(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "complex64" and array.dtype == np.float32 and array.shape[-1:] == (2,):
        return np.ascontiguousarray(array).view(np.complex64)[..., 0]
    return array.view(jnp.bfloat16) if dtype == "bfloat16" and array.dtype == np.uint16 else array


def _digest(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name}:{arrays[name].dtype}{list(arrays[name].shape)};".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _meaning(config: HoloConfig) -> dict[str, Any]:
    """The configuration without what does not change a state's meaning, as JSON gives it back."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _EXECUTION}
    return json.loads(json.dumps(values))


def _differences(theirs: Any, ours: Any) -> str:
    if not isinstance(theirs, dict):
        return "its configuration is not readable"
    names = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    lines = [f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here" for name in names]
    return "; ".join(lines[:4]) + (f" and {len(lines) - 4} more" if len(lines) > 4 else "")


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(metadata["holo_jax"])
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise StateDamagedError(f"{path} is no state file, or is damaged: {error}") from None
    except (KeyError, ValueError, RecursionError):
        raise StateDamagedError(f"{path} is no state file: it has no metadata of one") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise StateDamagedError(f"{path} is no state file: its format is not {FORMAT!r}")
    return arrays, about


def _write_atomically(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
