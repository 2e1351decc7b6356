"""Chunked plain sum for the elementwise binding, on real planes."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from holo_jax.array_types import Array
from holo_jax.functional.memory.chunks import advance, keep, scan_padded
from holo_jax.functional.memory.state import MemoryState
from holo_jax.functional.segments import Runs, segmented_sum

Tree = Any


def _block(state: Tree, inputs: Tree, runs: Runs | None) -> tuple[Tree, Array]:
    write, read, values, gates = inputs
    written = gates[..., None] * values.astype(gates.dtype)
    index = sees = survives = None
    if runs is not None:
        index = runs.index
        sees = runs.index == runs.before[:, :1]
        survives = sees[:, -1]

    outputs = jnp.zeros((), gates.dtype)
    after = []
    for rotate, (memory, residue) in zip((jnp.cos, jnp.sin), state, strict=True):
        total = segmented_sum(written * rotate(write), index)
        start = jnp.broadcast_to((memory + residue)[:, None], total.shape)
        outputs = outputs + rotate(read) * (total + keep(sees, start))
        after.append(advance(memory, residue, total[:, -1], survives))
    return tuple(after), outputs


def chunked_hadamard(
    write: Array, read: Array, values: Array, gates: Array, runs: Runs | None, state: MemoryState, chunk: int
) -> tuple[Array, Array, Array]:
    """Two-level sum: a tree over the positions of a chunk, compensated addition from chunk to chunk.

    Arguments as in ``accumulate``, phases and gates in the memory dtype, gates not None. Returns outputs,
    memory and residue. The backward pass holds the inputs and one state per chunk.
    """
    time = values.shape[1]
    parts = ((state.memory.real, state.residue.real), (state.memory.imag, state.residue.imag))
    outputs, ((re, re_rest), (im, im_rest)) = scan_padded(
        _block, min(chunk, time), parts, (write, read, values, gates), runs, time
    )
    return outputs, lax.complex(re, im), lax.complex(re_rest, im_rest)
