"""Reading tokens into a state: any number of them in the memory of one piece, or one a call."""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from holo_jax.array_types import Array, Bool, Float, Int
from holo_jax.config import HoloConfig
from holo_jax.generate.checks import Row, as_count, as_rows, check_batch, check_ids, check_room
from holo_jax.generate.forms import is_split, owned, split_state, stack_state, training_form
from holo_jax.generate.state_precision import compress_state, expand_state, stored_dtype
from holo_jax.model import HoloForCausalLM, ModelState
from holo_jax.model import init_state as empty_state

PIECE_SIZE = 1024


class Reading(NamedTuple):
    """What has been read.

    Attributes:
      logits: of the token that comes next, float32 [b, v].
      state: the state after everything read.
    """

    logits: Float[Array, "b v"]
    state: ModelState


def init_state(
    config: HoloConfig, batch: int, *, cache_length: int = 0, state_dtype: str = "float32"
) -> ModelState:
    """The state before the first token.

    Args:
      config: the model's configuration.
      batch: rows.
      cache_length: most tokens that attention layers can hold a row; other mixers do not need it.
      state_dtype: how memories are stored between calls: float32, bfloat16, int8 or int4
        (``holo_jax.generate.state_precision``).

    Raises:
      ValueError: for attention layers without ``cache_length``, or an unknown ``state_dtype``.
    """
    batch = as_count("batch", batch, 1)
    return _empty(config, batch, cache_length, state_dtype)


def read(
    model: HoloForCausalLM,
    tokens: Int[Array, "b t"],
    state: ModelState,
    real: Bool[Array, "b t"] | None = None,
    turns: Array | None = None,
) -> tuple[Float[Array, "b e"], ModelState]:
    """Reads tokens in one go, to be called under ``jax.jit``; the state keeps its dtype and form.

    Args:
      model: in either form; with a stacked state it must be stacked, with a split one split.
      tokens: ids.
      state: what was read before; a row goes on with it.
      real: False for padding, which must come first in a row; a row may be all padding.
      turns: see ``HoloModel``.

    Returns:
      The final hidden state of the last token, and the state after it.
    """
    segment_ids = None if real is None else jnp.where(real, state.segment[:, None], 0)
    hidden, after = model.model(tokens, segment_ids, expand_state(state), turns)
    assert after is not None
    dtype = stored_dtype(state)
    return hidden[:, -1], after if dtype == "float32" else compress_state(after, dtype, previous=state)


def next_logits(model: HoloForCausalLM, hidden: Float[Array, "b e"]) -> Float[Array, "b v"]:
    """Logits of final hidden states in float32."""
    return model.logits(hidden[:, None])[:, 0].astype(jnp.float32)


def prefill(
    model: HoloForCausalLM,
    tokens: Any,
    state: ModelState | None = None,
    *,
    piece_size: int = PIECE_SIZE,
    state_dtype: str = "float32",
    cache_length: int | None = None,
) -> Reading:
    """Reads prompts of any length, from the beginning or on from a state.

    Tokens stay on the host and are fed in pieces of ``piece_size``; device memory does not depend on how
    many there are (attention caches apart). Rows may have different lengths: each ends with the same state
    and logits as if it were alone, up to rounding.

    Args:
      model: the model.
      tokens: ids, ``[b, t]`` or a sequence of rows; NumPy arrays and memory maps are not copied whole.
      state: what was read before; it is not changed and can be used again. None begins anew.
      piece_size: tokens a row and piece.
      state_dtype, cache_length: of the state made if ``state`` is None; by default the attention cache
        holds the prompts exactly.

    Returns:
      Logits for the next token and the state, of the same dtype and form as the one given.

    Raises:
      ValueError: for no prompts, an empty one, an id out of range, a state with another number of rows, or a
        ``piece_size`` below 1.
      CacheFullError: if attention layers have no room.
      TypeError: for ids that are not integers.
    """
    config = model.config
    piece_size = as_count("piece_size", piece_size, 1)
    rows = as_rows(tokens, config.vocab_size)
    lengths = np.asarray([len(row) for row in rows])
    if state is None:
        room = int(lengths.max()) if cache_length is None else cache_length
        state = init_state(config, len(rows), cache_length=room, state_dtype=state_dtype)
    else:
        check_batch(state, len(rows))
    check_room(state, config, lengths)
    graphdef, params = nnx.split(model, nnx.Param)
    state = owned(params, state)  # pieces write over the state they are given
    hidden = None
    for begin, end in _pieces(int(lengths.max()), piece_size):
        ids, real = _piece(rows, int(lengths.max()), begin, end)
        hidden, state = _read_piece(graphdef, params, state, ids, None if real.all() else real)
    assert hidden is not None
    return Reading(_logits(graphdef, params, hidden), state)


def decode_step(
    model: HoloForCausalLM,
    tokens: Int[Array, "b"],
    state: ModelState,
    *,
    active: Bool[Array, "b"] | None = None,
) -> Reading:
    """Reads one token a row. ``generate`` does this, and the drawing, many times in one compiled loop.

    Args:
      model: the model.
      tokens: one id a row.
      state: what was read before; it is not changed.
      active: rows that read; the others keep their state, and their logits mean nothing. All if None.

    Raises:
      ValueError: for an id out of range, or another number of tokens than rows.
      TypeError: for tokens that are not integers.
      CacheFullError: if attention layers have no room.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"tokens has dtype {ids.dtype} and shape {ids.shape}; it must be one integer a row")
    check_batch(state, len(ids))
    check_ids("tokens", ids, model.config.vocab_size)
    check_room(state, model.config, np.ones_like(ids) if active is None else np.asarray(active, np.int64))
    graphdef, params = nnx.split(model, nnx.Param)
    real = None if active is None else jnp.asarray(active, bool)[:, None]
    return _step(graphdef, params, state, jnp.asarray(ids, jnp.int32)[:, None], real)


def _pieces(length: int, size: int) -> list[tuple[int, int]]:
    """Borders of the pieces of a right-aligned prompt; the first begins before 0 where it is padded.

    Whole pieces come last. The first one has the smallest power of two that holds the rest, so that few
    different shapes are compiled.
    """
    rest = length % size
    first = min(1 << (rest - 1).bit_length(), size) if rest else 0
    borders = [rest - first] if rest else []
    borders += range(rest, length + 1, size)
    return list(itertools.pairwise(borders))


def _piece(rows: list[Row], length: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of columns [begin, end) of the right-aligned prompts, and which of them are there."""
    ids = np.zeros((len(rows), end - begin), np.int32)
    real = np.zeros(ids.shape, bool)
    for index, row in enumerate(rows):
        offset = length - len(row)
        start = max(begin, offset)
        if start < end:
            ids[index, start - begin :] = row[start - offset : end - offset]
            real[index, start - begin :] = True
    return ids, real


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(config: HoloConfig, batch: int, cache_length: int, state_dtype: str) -> ModelState:
    return compress_state(empty_state(config, batch, cache_length=cache_length), state_dtype)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read_piece(
    graphdef: Any, params: Any, state: ModelState, ids: Array, real: Array | None
) -> tuple[Array, ModelState]:
    # Compiling every layer on its own pays for one token, not for a piece.
    hidden, after = read(training_form(nnx.merge(graphdef, params)), ids, stack_state(state), real)
    return hidden, split_state(after) if is_split(state.layers) else after


@partial(jax.jit, static_argnums=0)
def _step(graphdef: Any, params: Any, state: ModelState, ids: Array, real: Array | None) -> Reading:
    model = nnx.merge(graphdef, params)
    split = isinstance(model.model.periods, nnx.List)
    hidden, after = read(model, ids, split_state(state) if split else stack_state(state), real)
    after = split_state(after) if is_split(state.layers) else stack_state(after)
    return Reading(next_logits(model, hidden), after)


@partial(jax.jit, static_argnums=0)
def _logits(graphdef: Any, params: Any, hidden: Array) -> Array:
    return next_logits(nnx.merge(graphdef, params), hidden)
