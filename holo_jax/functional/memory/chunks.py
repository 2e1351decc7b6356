"""What the chunked forms share: padding of time, and the treatment of packed rows.

A chunk knows the run index of each of its positions and of the position before it. A position reads the
incoming state if its run is the incoming one; the chunk adds to the outgoing state what its last run wrote;
the incoming state survives the chunk if that run is the incoming one. Masks select (``where``), they do not
multiply, so nothing finite crosses a border, in values or gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from holo_jax.array_types import Array
from holo_jax.functional.memory.blocks import Body, scan_blocks
from holo_jax.functional.memory.state import compensated_add
from holo_jax.functional.segments import Runs, segmented_scan_sum

Tree = Any

# Chunks handled side by side: enough to fill wide devices, few enough to bound the transient arrays.
CHUNKS_PER_BLOCK = 8


def expand(mask: Array, ndim: int) -> Array:
    """Appends axes of length 1 up to rank ``ndim``."""
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def keep(mask: Array | None, x: Array) -> Array:
    """``x`` where the mask (over its leading dimensions) holds, else 0; ``x`` itself without a mask."""
    return x if mask is None else jnp.where(expand(mask, x.ndim), x, jnp.zeros_like(x))


def advance(memory: Array, residue: Array, total: Array, survives: Array | None) -> tuple[Array, Array]:
    """Adds what a block's last run wrote to the state, or replaces the state if its run has ended."""
    new, rest = compensated_add(memory, residue, total)
    if survives is None:
        return new, rest
    return jnp.where(expand(survives, total.ndim), new, total), keep(survives, rest)


def prefix_states(
    state: tuple[Array, Array], added: Array, survives: Array | None, axis: int
) -> tuple[tuple[Array, Array], Array]:
    """States before each chunk of a block, from what each chunk's last run wrote.

    Args:
      state: memory and residue before the block.
      added: what each chunk adds, the state's shape with the chunks on ``axis``.
      survives: whether the incoming state outlives each chunk, over the leading dimensions of ``added`` up to
        ``axis``; None if all do.
      axis: 1 or 2.

    Returns:
      Memory and residue after the block, and the value before each chunk, shaped as ``added``. The prefix is
      shifted, not subtracted: a state before a chunk never saw that chunk.
    """
    memory, residue = state
    count = added.shape[axis]
    alive = outlives = None
    if survives is None:
        total = lax.associative_scan(jnp.add, added, axis=axis)
    else:
        # The state before the block reaches past chunk n if it survived every chunk so far.
        alive = jnp.cumprod(survives.astype(jnp.int32), axis=axis) > 0
        outlives = lax.index_in_dim(alive, count - 1, axis, keepdims=False)
        total = segmented_scan_sum(added, ~survives, axis)
    start = jnp.expand_dims(memory + residue, axis)
    after = total + keep(alive, jnp.broadcast_to(start, total.shape))
    before = jnp.concatenate([start, lax.slice_in_dim(after, 0, count - 1, axis=axis)], axis=axis)
    last = lax.index_in_dim(total, count - 1, axis, keepdims=False)
    return advance(memory, residue, last, outlives), before


def block_length(time: int, chunk: int) -> tuple[int, int]:
    """Chunk size, not beyond ``time``, and positions per block: chunks are spread evenly over the blocks."""
    chunk = min(chunk, time)
    chunks = -(-time // chunk)
    blocks = -(-chunks // CHUNKS_PER_BLOCK)
    return chunk, -(-chunks // blocks) * chunk


def scan_padded(
    body: Body, length: int, state: Tree, inputs: Tree, runs: Runs | None, time: int
) -> tuple[Array, Tree]:
    """``scan_blocks`` over a time that ``length`` need not divide; outputs are cut to ``time``.

    Padding is zero everywhere, gates included, so it writes nothing; it continues the last run, so the state
    passes through it.
    """
    amount = -time % length
    if amount:
        inputs = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, amount)] + [(0, 0)] * (x.ndim - 2)), inputs)
    if runs is not None and amount:
        tail = jnp.broadcast_to(runs.here[:, -1:], (runs.here.shape[0], amount))
        runs = Runs(*(jnp.concatenate([x, tail], axis=1) for x in runs))
    outputs, state = scan_blocks(body, length, state, inputs, runs)
    return outputs[:, :time], state
