"""Chunked plain sum and erase rule for the outer binding: matrix products on real features.

With ``phi_t`` the write and ``psi_t`` the read features (``products.features``), S = [Re M; Im M] and S0 the
state before the chunk, both rules write rank-one *news* u_t,

    S_t = S0 + sum_{s <= t} phi_s u_s^T,      y_t = S0^T psi_t + sum_{s <= t} (psi_t . phi_s) u_s,

so the outputs are masked attention inside the chunk plus one read of S0. Plain sum: u_t = g_t v_t. Erase
rule: u_t = g_t v_t - e_t S_{t-1}^T phi_t, a unit lower triangular system over the chunk (the WY form),

    (I + diag(e) tril(Phi Phi^T, -1)) U = diag(g) V - diag(e) Phi S0.

Source of the WY form for delta rules: Yang et al., "Parallelizing linear transformers with the delta rule
over sequence length" (arXiv:2406.06484); here with separate erase and write gates.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from holo_jax.array_types import Array
from holo_jax.functional.memory.chunks import advance, block_length, keep, prefix_states, scan_padded
from holo_jax.functional.memory.products import contract, features, from_planes, planes
from holo_jax.functional.memory.state import MemoryState
from holo_jax.functional.memory.triangular import unit_lower_inverse
from holo_jax.functional.segments import Runs

Tree = Any


class _Masks(NamedTuple):
    """Which pairs ``[b, h, n, c, c]``, positions ``[b, h, n, c]``, chunks ``[b, h, n]`` meet; None: all."""

    causal: Array
    sees: Array | None
    tail: Array | None
    survives: Array | None


def _masks(runs: Runs | None, batch: int, heads: int, count: int, chunk: int) -> _Masks:
    causal = jnp.tril(jnp.ones((chunk, chunk), bool)).reshape(1, 1, 1, chunk, chunk)
    if runs is None:
        return _Masks(causal, None, None, None)
    index = jnp.broadcast_to(runs.here.reshape(batch, 1, count, chunk), (batch, heads, count, chunk))
    before = runs.before.reshape(batch, 1, count, chunk)[..., :1]
    sees = index == before
    same = index[..., :, None] == index[..., None, :]
    return _Masks(causal & same, sees, index == index[..., -1:], sees[..., -1])


def _by_chunk(x: Array, chunk: int, batch: int) -> Array:
    """``[b or 1, t, h, ...] -> [b, h, n, c, ...]``."""
    x = x.reshape(x.shape[0], x.shape[1] // chunk, chunk, *x.shape[2:])
    x = jnp.moveaxis(x, 3, 1)
    return jnp.broadcast_to(x, (batch, *x.shape[1:]))


def _erase_states(
    state: Tree, fresh: Array, old: Array, phi_tail: Array, masks: _Masks, operands: DTypeLike
) -> tuple[Tree, Array, Array]:
    """Erase rule: final state, state before each chunk, and news ``fresh - old S0``, chunk after chunk."""

    def visit(state: Tree, item: Tree) -> tuple[Tree, Tree]:
        fresh, old, phi_tail, survives = item
        start = state[0] + state[1]
        news = fresh - contract("bhcm,bhmd->bhcd", operands, old, start)
        added = contract("bhcm,bhcd->bhmd", operands, phi_tail, news)
        return advance(state[0], state[1], added, survives), (start, news)

    items = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (fresh, old, phi_tail, masks.survives))
    state, stacked = lax.scan(visit, state, items)
    before, news = (jnp.moveaxis(x, 0, 2) for x in stacked)
    return state, before, news


def _block(
    chunk: int, operands: DTypeLike, state: Tree, inputs: Tree, runs: Runs | None
) -> tuple[Tree, Array]:
    write, read, values, gates, erase = inputs
    batch, length, heads, d = values.shape
    masks = _masks(runs, batch, heads, length // chunk, chunk)
    phi = features(_by_chunk(write, chunk, batch))
    psi = features(_by_chunk(read, chunk, batch))
    written = _by_chunk(gates[..., None] * values.astype(gates.dtype), chunk, batch)
    phi_tail = keep(masks.tail, phi)

    if erase is None:
        news = written
        added = contract("bhncm,bhncd->bhnmd", operands, phi_tail, news)
        state, before = prefix_states(state, added, masks.survives, axis=2)
    else:
        removal = _by_chunk(erase, chunk, batch)[..., None]
        strict = masks.causal & ~jnp.eye(chunk, dtype=bool).reshape(1, 1, 1, chunk, chunk)
        gram = jnp.where(strict, contract("bhncm,bhnsm->bhncs", operands, phi, phi), 0.0)
        inverse = unit_lower_inverse(removal * gram)
        fresh = contract("bhncs,bhnsd->bhncd", operands, inverse, written)
        old = contract("bhncs,bhnsm->bhncm", operands, inverse, removal * keep(masks.sees, phi))
        state, before, news = _erase_states(state, fresh, old, phi_tail, masks, operands)

    scores = jnp.where(masks.causal, contract("bhncm,bhnsm->bhncs", operands, psi, phi), 0.0)
    outputs = contract("bhncs,bhnsd->bhncd", operands, scores, news)
    outputs = outputs + contract("bhncm,bhnmd->bhncd", operands, keep(masks.sees, psi), before)
    return state, jnp.moveaxis(outputs, 1, 3).reshape(batch, length, heads, d)


def chunked_outer(
    write: Array,
    read: Array,
    values: Array,
    gates: Array,
    erase: Array | None,
    runs: Runs | None,
    state: MemoryState,
    chunk: int,
    operands: DTypeLike,
) -> tuple[Array, Array, Array]:
    """Chunked form of both rules; arguments as in ``accumulate``, phases and gates in the memory dtype.

    Products have operands of dtype ``operands`` and memory-dtype accumulators; features, triangular inverse
    and states are in the memory dtype. Returns outputs, memory and residue. The backward pass holds the
    inputs and one state per block.
    """
    time = values.shape[1]
    chunk, length = block_length(time, chunk)
    outputs, (memory, residue) = scan_padded(
        partial(_block, chunk, operands),
        length,
        (planes(state.memory), planes(state.residue)),
        (write, read, values, gates, erase),
        runs,
        time,
    )
    return outputs, from_planes(memory), from_planes(residue)
