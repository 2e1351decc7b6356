"""Chunked plain sum for the elementwise binding, on real planes.

Inside a chunk, prefix sums are a product with a lower triangular matrix of ones, which has its zeros where
two positions are in different segments: one product serves packed and unpacked rows, its gradient is the
same product transposed, and it runs several times faster than a prefix tree on CPU.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from holo_jax.array_types import Array
from holo_jax.functional.memory.chunks import block_length, keep, prefix_states, scan_padded
from holo_jax.functional.memory.products import contract
from holo_jax.functional.memory.state import MemoryState
from holo_jax.functional.segments import Runs
from holo_jax.functional.trigonometry import sincos

Tree = Any


def _block(chunk: int, state: Tree, inputs: Tree, runs: Runs | None) -> tuple[Tree, Array]:
    write, read, values, gates = inputs
    batch, length, heads, d = values.shape
    count = length // chunk
    by_chunk = (batch, count, chunk, heads, d)
    causal = jnp.tril(jnp.ones((chunk, chunk), gates.dtype))
    spec, sees, survives = "cs,bnshd->bnchd", None, None
    if runs is not None:
        here = runs.here.reshape(batch, count, chunk)
        sees = here == runs.before.reshape(batch, count, chunk)[..., :1]
        survives = sees[..., -1]
        same = here[..., :, None] == here[..., None, :]
        causal = jnp.where(same, causal.reshape(1, 1, chunk, chunk), 0.0)
        spec = "bncs,bnshd->bnchd"
    written = gates[..., None] * values.astype(gates.dtype)

    def part(state: Tree, key: Array, query: Array) -> tuple[Tree, Array]:
        total = contract(spec, gates.dtype, causal, (written * key).reshape(by_chunk))
        state, before = prefix_states(state, total[:, :, -1], survives, axis=1)
        start = jnp.broadcast_to(before[:, :, None], by_chunk)
        return state, query * (total + keep(sees, start)).reshape(batch, length, heads, d)

    write_sin, write_cos = sincos(write)
    read_sin, read_cos = sincos(read)
    real, real_output = part(state[0], write_cos, read_cos)
    imag, imag_output = part(state[1], write_sin, read_sin)
    return (real, imag), real_output + imag_output


def chunked_hadamard(
    write: Array, read: Array, values: Array, gates: Array, runs: Runs | None, state: MemoryState, chunk: int
) -> tuple[Array, Array, Array]:
    """Prefix sums inside chunks, a tree over the chunks of a block, compensated addition between blocks.

    Arguments as in ``accumulate``, phases and gates in the memory dtype, gates not None. Returns outputs,
    memory and residue. The backward pass holds the inputs and one state per block.
    """
    time = values.shape[1]
    chunk, length = block_length(time, chunk)
    parts = ((state.memory.real, state.residue.real), (state.memory.imag, state.residue.imag))
    outputs, ((re, re_rest), (im, im_rest)) = scan_padded(
        partial(_block, chunk), length, parts, (write, read, values, gates), runs, time
    )
    return outputs, lax.complex(re, im), lax.complex(re_rest, im_rest)
