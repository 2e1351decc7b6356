"""The definition of the memory as a recurrence, and its parallel reference as an associative scan.

Both are written to be read and to be compared against; both hold an array per position as large as the
state, so they are for tests and short sequences.
"""

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array
from holo_jax.functional.binding import bind, unbind
from holo_jax.functional.memory.products import features, from_planes, planes
from holo_jax.functional.memory.state import MemoryState, compensated_add, step
from holo_jax.functional.segments import segmented_scan_sum


def recurrent(
    write: Array,
    read: Array,
    values: Array,
    gates: Array,
    erase: Array | None,
    border: Array,
    state: MemoryState,
) -> tuple[Array, MemoryState]:
    """``step`` over time; the state is emptied before the write of a border position."""

    def body(state: MemoryState, token: tuple) -> tuple[MemoryState, Array]:
        write, read, value, gate, erase, border = token
        state = jax.tree.map(
            lambda x: jnp.where(border.reshape(border.shape + (1,) * (x.ndim - 1)), jnp.zeros_like(x), x),
            state,
        )
        output, state = step(state, write, read, value, gate, erase)
        return state, output

    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (write, read, values, gates, erase, border))
    state, outputs = jax.lax.scan(body, state, by_time)
    return jnp.moveaxis(outputs, 0, 1), state


def associative_sum(
    write: Array, read: Array, values: Array, gates: Array, border: Array, state: MemoryState
) -> tuple[Array, Array, Array]:
    """Plain sum: prefix sums of the bound values under (value, reset flag); outputs, memory, residue."""
    binding = state.binding
    written = bind(write, gates[..., None] * values, binding=binding)
    total = segmented_scan_sum(written, border, 1)
    started = jnp.cumsum(border.astype(jnp.int32), axis=1) > 0
    started = started.reshape(started.shape + (1,) * (total.ndim - 2))
    initial = (state.memory + state.residue)[:, None]
    outputs = unbind(read, total + jnp.where(started, 0.0, initial), binding=binding)
    memory, residue = compensated_add(state.memory, state.residue, total[:, -1])
    return (
        outputs,
        jnp.where(started[:, -1], total[:, -1], memory),
        jnp.where(started[:, -1], jnp.zeros_like(residue), residue),
    )


def associative_erase(
    write: Array, read: Array, values: Array, gates: Array, erase: Array, border: Array, state: MemoryState
) -> tuple[Array, Array, Array]:
    """Erase rule: each token is the affine map ``S -> A S + B`` of the real state ``S = [Re M; Im M]``.

    ``A = I - e phi phi^T`` and ``B = g phi v^T``; at a border A = 0, which forgets everything exactly.
    Maps compose as ``(A2, B2) . (A1, B1) = (A2 A1, A2 B1 + B2)``.
    """
    highest = jax.lax.Precision.HIGHEST

    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        (a1, b1), (a2, b2) = left, right
        return jnp.matmul(a2, a1, precision=highest), jnp.matmul(a2, b1, precision=highest) + b2

    key = jnp.broadcast_to(features(write), (*values.shape[:3], 2 * write.shape[-1]))
    identity = jnp.eye(key.shape[-1], dtype=key.dtype).reshape(1, 1, 1, key.shape[-1], key.shape[-1])
    transition = identity - erase[..., None, None] * key[..., :, None] * key[..., None, :]
    transition = jnp.where(border[..., None, None, None], 0.0, transition)
    increment = key[..., :, None] * (gates[..., None] * values)[..., None, :]
    carried, added = jax.lax.associative_scan(combine, (transition, increment), axis=1)
    initial = planes(state.memory + state.residue)[:, None]
    memory = from_planes(jnp.matmul(carried, initial, precision=highest) + added)
    return unbind(read, memory, binding="outer"), memory[:, -1], jnp.zeros_like(state.residue)
