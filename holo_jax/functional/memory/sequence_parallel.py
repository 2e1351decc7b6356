"""The memory over a sequence divided along a mesh axis: a contiguous part a device, one memory.

To a part, whatever came before is one state, and the part is an affine map of it,

    M_out = A M_in + B,      y_t = y0_t + Q_t M_in,

where B and y0 are what accumulating from an empty memory gives, and A and Q_t what becomes of M_in until the
end of the part and until the read at t. For the plain sum A is the identity and Q_t the read itself. For the
erase rule A = prod_t (I - e_t phi_t phi_t^T), which is found in the same pass by value channels that write
nothing and begin as the identity. Devices exchange their (A, B), of the size of a state however long the part
is, and each composes those before its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from holo_jax.array_types import Array, Float, Int
from holo_jax.functional.binding import unbind
from holo_jax.functional.checks import real_dtype
from holo_jax.functional.memory.chain import own_part
from holo_jax.functional.memory.chunks import expand, keep
from holo_jax.functional.memory.products import contract, features, from_planes, planes
from holo_jax.functional.memory.state import MemoryState, check_erase, compensated_add, init_memory
from holo_jax.functional.segments import run_index

_UNROLLED = 8


class _Part(NamedTuple):
    """What a device tells the others of its part; exchanged along the axis.

    Attributes:
      added: B, what the last run of the part wrote, complex.
      transition: A, real ``[b, h, 2 m, 2 m]``; None is the identity.
      writes: sum of g^2 over that run.
      continues: whether the first position is of the same segment as the last one of the part before, [b].
      survives: whether the state before outlives the part, that is, no segment begins inside it, [b].
    """

    added: Array
    transition: Array | None
    writes: Array
    continues: Array
    survives: Array


def accumulate_parts(
    accumulate: Callable[..., tuple[Array, MemoryState]],
    axis: str,
    write_phases: Float[Array, "#b t h m"],
    read_phases: Float[Array, "#b t h m"],
    values: Float[Array, "b t h d"],
    gates: Float[Array, "b t h"] | None = None,
    erase: Float[Array, "b t h"] | None = None,
    *,
    binding: str,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_state: MemoryState | None = None,
    chained: Callable[..., tuple[Array, Array, Array]] | None = None,
    **options: Any,
) -> tuple[Float[Array, "b t h d"], MemoryState, MemoryState]:
    """``accumulate`` over a sequence whose parts are on the devices along ``axis``, inside ``jax.shard_map``.

    Equal to one ``accumulate`` over the whole sequence, in values and gradients, with memory, segment and
    rounding as there, but for a rounding of each part's total. Communication is an all-gather of one state a
    part (for the erase rule, of its transition too), and a reduce-scatter of the same in the backward pass
    (with ``chained``, an all-gather of a state's gradient).

    Args:
      accumulate: a form of ``holo_jax.functional.accumulate``, called once, on this device's part.
      axis: name of the mesh axis.
      write_phases, read_phases, values, gates, erase, binding, segment_ids: as in ``accumulate``, of this
        part. A segment goes on over the border of two parts where the ids on its two sides are equal.
      initial_state: memory before the first part; of its first position's segment. Equal on all devices.
      chained: the erase rule by ``holo_jax.functional.memory.chain``, if a form has it: the five inputs, then
        by name ``axis``, ``segment_ids``, ``continues``, ``initial`` (the real state before the first part),
        and options -> outputs, the real state before this part, and that after the last. None finds a part's
        map in the pass of its outputs, by more value channels; what pays depends on the form.
      options: passed on.

    Returns:
      Outputs of this part, the state before this part (empty where its first position begins a segment), and
      the state after the last part, equal on all devices. Differentiable as ``accumulate`` is.

    Raises:
      ValueError, TypeError: as ``accumulate``.
    """
    check_erase(binding, erase)
    batch, time, heads, d = values.shape
    m = write_phases.shape[-1]
    dtype = real_dtype(read_phases, jnp.zeros((), real_dtype(write_phases, values)))
    if initial_state is None:
        initial_state = init_memory(batch, heads, m, d, binding=binding, dtype=dtype)
    run = jnp.zeros((batch, time), jnp.int32) if segment_ids is None else run_index(segment_ids)
    continues, survives = _continues(axis, batch, segment_ids), run[:, -1] == 0
    options |= dict(binding=binding, segment_ids=segment_ids)
    if erase is not None and chained is not None:
        held = planes(initial_state.memory + initial_state.residue)
        given = (write_phases, read_phases, values, gates, erase)
        outputs, before, after = chained(*given, axis=axis, continues=continues, initial=held, **options)
        writes = _writes(axis, gates, run, (continues, survives), initial_state.writes)
        zeros = jnp.zeros_like(initial_state.memory)
        incoming = MemoryState(from_planes(before), zeros, writes[0])
        return outputs, incoming, MemoryState(from_planes(after), zeros, writes[1])
    inputs = (write_phases, read_phases)

    if erase is None:
        outputs, local = accumulate(*inputs, values, gates, None, **options)
        added, transition, query = local.memory + local.residue, None, None
    else:
        silent = jnp.zeros((batch, time, heads, 2 * m), values.dtype)
        widened = jnp.concatenate([values, silent], axis=-1)
        identity = from_planes(jnp.eye(2 * m, dtype=dtype))[None, None]
        start = jnp.concatenate([jnp.zeros((1, 1, m, d), identity.dtype), identity], axis=-1)
        start = jnp.broadcast_to(start, (batch, heads, m, d + 2 * m))
        begin = MemoryState(start, jnp.zeros_like(start), jnp.zeros((batch, heads), dtype))
        both, local = accumulate(*inputs, widened, gates, erase, initial_state=begin, **options)
        outputs, query = both[..., :d], both[..., d:]
        after = local.memory + local.residue
        added, transition = after[..., :d], keep(survives, planes(after[..., d:]))

    part = _Part(added, transition, local.writes, continues, survives)
    incoming, final = _compose(lax.all_gather(part, axis), initial_state, lax.axis_index(axis))
    held = incoming.memory + incoming.residue
    sees = None if segment_ids is None else run == 0
    if binding == "hadamard":
        carried = unbind(read_phases.astype(dtype), held[:, None], binding=binding)
    else:
        operands = values.dtype if values.dtype == jnp.bfloat16 else dtype
        if query is None:
            query = features(read_phases.astype(dtype))
            query = jnp.broadcast_to(query, (batch, *query.shape[1:]))
        carried = contract("bthm,bhmd->bthd", operands, query, planes(held))
    return outputs + keep(sees, carried), incoming, final


def _writes(
    axis: str, gates: Array | None, run: Array, flags: tuple[Array, Array], initial: Array
) -> tuple[Array, Array]:
    """Sums of g^2 before this part and after the last; ``flags`` are ``continues`` and ``survives``."""
    last = (run == run[:, -1:])[..., None]
    squares = jnp.where(last, 1.0 if gates is None else jnp.square(gates.astype(initial.dtype)), 0.0)
    own = jnp.broadcast_to(jnp.sum(squares, axis=1), initial.shape).astype(initial.dtype)
    before, state = [], initial
    for writes, continues, survives in zip(*lax.all_gather((own, *flags), axis), strict=True):
        before.append(keep(continues, state))
        state = writes + keep(survives, before[-1])
    return own_part(before, axis), state


def _continues(axis: str, batch: int, segment_ids: Array | None) -> Array:
    """Whether each row goes on with the segment of the part before; the first part does with the state."""
    if segment_ids is None:
        return jnp.ones((batch,), bool)
    count = lax.axis_size(axis)
    before = lax.ppermute(segment_ids[:, -1], axis, [(i, i + 1) for i in range(count - 1)])
    return (before == segment_ids[:, 0]) | (lax.axis_index(axis) == 0)


def _compose(parts: _Part, initial: MemoryState, index: Array) -> tuple[MemoryState, MemoryState]:
    """The state before part ``index``, and the one after the last part."""

    def visit(state: MemoryState, part: _Part) -> tuple[MemoryState, MemoryState]:
        state = jax.tree.map(lambda leaf: keep(part.continues, leaf), state)
        if part.transition is None:
            memory, residue = compensated_add(state.memory, state.residue, part.added)
        else:
            held = planes(state.memory + state.residue)
            highest = lax.Precision.HIGHEST
            memory = part.added + from_planes(jnp.matmul(part.transition, held, precision=highest))
            residue = jnp.zeros_like(memory)
        lives = part.survives
        after = MemoryState(
            jnp.where(expand(lives, memory.ndim), memory, part.added),
            keep(lives, residue),
            part.writes + keep(lives, state.writes),
        )
        return after, state

    count = parts.writes.shape[0]
    final, before = lax.scan(visit, initial, parts, unroll=min(count, _UNROLLED))
    own = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), before)
    return own, final
