"""Linear attention with scalar decay: the baseline that forgets.

    S_t = exp(l_t) S_{t-1} + k_t v_t^T,      y_t = S_t^T q_t,      l_t <= 0

the state-space recurrence of Mamba-2 with identity structure per head (Dao and Gu, "Transformers are SSMs",
arXiv:2405.21060). The decay between two positions is the exponential of the *sum* of the logarithms between
them, each sum formed on its own: no difference of long cumulative sums, no exponential of a positive number,
hence no clamp and no loss at any decay.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from holo_jax.array_types import Array, Float, Int
from holo_jax.functional.checks import check_choice, check_float, check_shape, wider
from holo_jax.functional.memory.chunks import scan_padded
from holo_jax.functional.memory.products import contract
from holo_jax.functional.segments import borders
from holo_jax.functional.varying import vary_together
from holo_jax.precision import assert_dtype

METHODS = ("chunked", "recurrent")
CHUNK_SIZE = 64
Tree = Any


def segment_sums(logs: Float[Array, "... c"]) -> Float[Array, "... c c"]:
    """``out[t, s] = logs[s + 1] + ... + logs[t]`` for s <= t (0 on the diagonal), ``-inf`` for s > t."""
    size = logs.shape[-1]
    later = jnp.tril(jnp.ones((size, size), bool), -1).reshape((1,) * (logs.ndim - 1) + (size, size))
    added = jnp.where(later, logs[..., :, None], 0.0)
    return jnp.where(
        later | jnp.eye(size, dtype=bool).reshape(later.shape), jnp.cumsum(added, axis=-2), -jnp.inf
    )


def _recurrent(keys: Array, queries: Array, values: Array, logs: Array, state: Array) -> tuple[Array, Array]:
    def body(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        key, query, value, log = token
        state = jnp.exp(log)[..., None, None] * state + key[..., :, None] * value[..., None, :]
        return state, jnp.sum(query[..., :, None] * state, axis=-2)

    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (keys, queries, values, logs))
    state, outputs = lax.scan(body, state, by_time)
    return jnp.moveaxis(outputs, 0, 1), state


def _block(operands: DTypeLike, state: Array, inputs: Tree, _: None) -> tuple[Array, Array]:
    """One chunk: decayed attention inside it, plus the decayed read of the state before it."""
    keys, queries, values, logs = inputs
    logs = jnp.moveaxis(logs, 1, 2)
    between = jnp.exp(segment_sums(logs))
    from_start = jnp.moveaxis(jnp.exp(jnp.cumsum(logs, axis=-1)), 2, 1)[..., None]
    to_end = jnp.moveaxis(between[..., -1, :], 2, 1)[..., None]
    scores = between * contract("bchm,bshm->bhcs", operands, queries, keys)
    outputs = contract("bhcs,bshd->bchd", operands, scores, values)
    outputs = outputs + contract("bchm,bhmd->bchd", operands, from_start * queries, state)
    added = contract("bchm,bchd->bhmd", operands, to_end * keys, values)
    return jnp.exp(jnp.sum(logs, axis=-1))[..., None, None] * state + added, outputs


def decayed_accumulate(
    keys: Float[Array, "b t h m"],
    queries: Float[Array, "b t h m"],
    values: Float[Array, "b t h d"],
    log_decay: Float[Array, "b t h"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_state: Float[Array, "b h m d"] | None = None,
    chunk_size: int | None = None,
    method: str = "chunked",
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h m d"]]:
    """Scalar-decay linear attention over a sequence; see the module's recurrence.

    Args:
      keys, queries: ``[b, t, h, m]``.
      values: ``[b, t, h, d]``.
      log_decay: ``[b, t, h]``, at most 0 (not checked: it is traced); ``-inf`` forgets everything.
      segment_ids: ``[b, t]``; the state is emptied where the id changes. The initial state belongs to the
        segment of position 0.
      initial_state: ``[b, h, m, d]`` in the accumulator dtype; zeros if None.
      chunk_size: positions per chunk, a default if None; read by ``"chunked"`` only.
      method: ``"chunked"``, or ``"recurrent"``, the definition.

    Returns:
      Outputs ``[b, t, h, d]`` and final state ``[b, h, m, d]``, in float32 (float64 if an argument is
      float64). Chunked products have bfloat16 operands if the values are bfloat16.

    Raises:
      ValueError: for an unknown method, a chunk size below 1, no positions, or a shape that does not fit.
      TypeError: for arrays that are not floating point, or an initial state of another dtype.
    """
    check_choice("method", method, METHODS)
    check_float(keys=keys, queries=queries, values=values, log_decay=log_decay)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size!r}; it must be at least 1, or None for the default")
    if values.ndim != 4 or values.shape[1] < 1:
        raise ValueError(f"values has shape {values.shape}; it must be [batch, time >= 1, heads, channels]")
    batch, time, heads, d = values.shape
    m = keys.shape[-1]
    check_shape("keys", keys, (batch, time, heads, m))
    check_shape("queries", queries, (batch, time, heads, m))
    check_shape("log_decay", log_decay, (batch, time, heads))
    check_shape("segment_ids", segment_ids, (batch, time))
    check_shape("initial_state", initial_state, (batch, heads, m, d))
    dtype = wider(keys.dtype, queries.dtype, values.dtype, log_decay.dtype)
    state = jnp.zeros((batch, heads, m, d), dtype) if initial_state is None else initial_state
    assert_dtype(state, dtype, "initial_state")

    logs = log_decay.astype(dtype)
    if segment_ids is not None:
        logs = jnp.where(borders(segment_ids)[..., None], -jnp.inf, logs)
    key, query, values, logs, state = vary_together(
        (keys.astype(dtype), queries.astype(dtype), values, logs, state)
    )
    if method == "recurrent":
        outputs, state = _recurrent(key, query, values.astype(dtype), logs, state)
    else:
        operands = values.dtype if values.dtype == jnp.bfloat16 else dtype
        chunk = min(chunk_size or CHUNK_SIZE, time)
        inputs = (key, query, values, logs)
        outputs, state = scan_padded(partial(_block, operands), chunk, state, inputs, None, time)
    assert_dtype(outputs, dtype, "outputs")
    return outputs, state


def decayed_parts(
    axis: str,
    keys: Float[Array, "b t h m"],
    queries: Float[Array, "b t h m"],
    values: Float[Array, "b t h d"],
    log_decay: Float[Array, "b t h"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_state: Float[Array, "b h m d"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h m d"]]:
    """``decayed_accumulate`` over a sequence whose parts are on the devices along ``axis``.

    A part scales the state before it by the exponential of its summed logarithms and adds what it wrote; the
    devices exchange both, as in ``functional.memory.sequence_parallel``. Inside ``jax.shard_map`` only.

    Args:
      axis: name of the mesh axis.
      keys, queries, values, log_decay, segment_ids: of this device's part.
      initial_state: before the first part; equal on all devices.
      options: of ``decayed_accumulate``.

    Returns:
      Outputs of this part, and the state after the last part, equal on all devices.
    """
    outputs, added = decayed_accumulate(keys, queries, values, log_decay, segment_ids=segment_ids, **options)
    logs = log_decay.astype(added.dtype)
    first = jnp.zeros(logs.shape[:1], bool)
    if segment_ids is not None:
        logs = jnp.where(borders(segment_ids)[..., None], -jnp.inf, logs)
        count = lax.axis_size(axis)
        before = lax.ppermute(segment_ids[:, -1], axis, [(i, i + 1) for i in range(count - 1)])
        first = (before != segment_ids[:, 0]) & (lax.axis_index(axis) > 0)
    from_start = jnp.exp(jnp.cumsum(logs, axis=1))
    parts = lax.all_gather((added, from_start[:, -1], first), axis)
    state = jnp.zeros_like(added) if initial_state is None else initial_state

    def visit(state: Array, part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        added, decay, first = part
        state = jnp.where(first[:, None, None, None], 0.0, state)
        return added + decay[..., None, None] * state, state

    final, incoming = lax.scan(visit, state, parts)
    own = incoming[lax.axis_index(axis)]
    operands = values.dtype if values.dtype == jnp.bfloat16 else added.dtype
    decayed = from_start[..., None] * queries.astype(added.dtype)
    return outputs + contract("bchm,bhmd->bchd", operands, decayed, own), final
