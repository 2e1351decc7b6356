"""One token in one pass less over the memory, for decoding: there, the memory is what has to be moved."""

import jax.numpy as jnp

from holo_jax.array_types import Array
from holo_jax.functional.binding import bind, unbind
from holo_jax.functional.memory.state import MemoryState, compensated_add
from holo_jax.functional.trigonometry import sincos


def decode_step(
    state: MemoryState, write: Array, read: Array, value: Array, gate: Array, erase: Array | None
) -> tuple[Array, MemoryState]:
    """The same as ``step``, with the read taken from the memory as it was before the write:

        unbind(k_b, M + bind(k_a, w)) = unbind(k_b, M) + <k_b, k_a> w,

    where ``<k_b, k_a>`` is the mean of ``cos(a - b)`` (outer), or each component's (hadamard). What is
    erased is read in the same pass. Arguments as in ``step``, all given, in the memory dtype.
    """
    binding = state.binding
    held = state.memory + state.residue
    written = gate[..., None] * value
    if erase is not None:
        written = written - erase[..., None] * unbind(write, held, binding=binding)
    before = unbind(read, held, binding=binding)
    (write_sin, write_cos), (read_sin, read_cos) = sincos(write), sincos(read)
    overlap = write_cos * read_cos + write_sin * read_sin
    if binding == "outer":
        overlap = jnp.mean(overlap, axis=-1, keepdims=True)
    memory, residue = compensated_add(state.memory, state.residue, bind(write, written, binding=binding))
    return before + overlap * written, MemoryState(memory, residue, state.writes + jnp.square(gate))
