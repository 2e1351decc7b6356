"""Gradients of the states between chunks under the erase rule, from a row's end on (Pallas, Mosaic GPU).

A chunk of 64 positions with features ``k`` of keys and ``q`` of queries, strengths ``beta`` and
``T = (I + A)^-1``, ``A_ij = beta_i (k_i . k_j)`` for ``j < i``, takes the transposed gradient ``G`` of the
state after it, where outputs have the gradient ``r``, to

    G - (G k^T) Y + r^T (q - P Y),    Y = T diag(beta) k,    P_ij = q_i . k_j for j <= i.

``Y`` and ``q - P Y`` are made ahead by two warpgroups in turns. Products have 16-bit operands and float32
accumulators.

Sources as of ``piece_maps``.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.array_types import Array, Float
from holo_jax.kernels import mosaic
from holo_jax.kernels.hopper.chunk_tiles import CHUNK, WIDTH, along, indices, load, tile, zeros
from holo_jax.kernels.hopper.piece_program import Refs, Walk, store


def terms(
    queries: Float[Array, "b t h k"],
    keys: Float[Array, "b t h k"],
    cotangent: Float[Array, "b t h d"],
    inverse: Float[Array, "b h t c"],
    strength: Float[Array, "b h t"],
    *,
    pieces: int,
    interpret: Any = None,
) -> Float[Array, "b p h d k"]:
    """Gradient of the state before every piece but a row's first, if the state after it has none; float32.

    Args:
      queries, keys, inverse, strength, pieces, interpret: as of ``piece_maps.transitions``.
      cotangent: r, in the dtype of the keys.
    """
    b, t, h, _ = keys.shape
    walked = pieces - 1
    # An even number of stages: each maker has its own.
    walk = Walk(b, h, t // (CHUNK * pieces), walked, 1, 6, 1, 2, keys.dtype, interpret)
    out = jax.ShapeDtypeStruct((b * walked, h, WIDTH, WIDTH), jnp.float32)
    operands = (queries, keys, cotangent, inverse, strength)
    found = walk.run(_walk, operands, "piece_reverse_terms", out, _rooms(walk), 5)
    return found.reshape(b, walked, h, WIDTH, WIDTH)


def between(
    queries: Float[Array, "b t h k"],
    keys: Float[Array, "b t h k"],
    cotangent: Float[Array, "b t h d"],
    inverse: Float[Array, "b h t c"],
    strength: Float[Array, "b h t"],
    ends: Float[Array, "bp h d k"] | None,
    *,
    pieces: int,
    interpret: Any = None,
) -> Float[Array, "b h n d k"]:
    """Gradient of the state after every chunk, in the dtype of the keys.

    Args:
      queries, keys, cotangent, inverse, strength, pieces, interpret: as of ``terms``.
      ends: gradient of the state after every piece, float32; None is nothing.
    """
    b, t, h, _ = keys.shape
    walk = Walk(b, h, t // (CHUNK * pieces), pieces, 0, 4, 1, 2, keys.dtype, interpret)
    out = jax.ShapeDtypeStruct((b, h, t // CHUNK, WIDTH, WIDTH), keys.dtype)
    operands = (queries, keys, cotangent, inverse, strength, *(() if ends is None else (ends,)))
    rooms = _rooms(walk) | {"left": tile(keys.dtype, 2)}
    return walk.run(_walk, operands, "reverse_states", out, rooms, 5)


def _rooms(walk: Walk) -> Refs:
    # Queries and inverses are replaced by what is made of them.
    rooms = {name: walk.room() for name in ("queries", "keys", "cotangent", "inverse")}
    return rooms | {"strength": walk.numbers()}


def _walk(form: Walk, refs: Any, held: Refs) -> None:
    plgpu = mosaic.pallas()
    queries_ref, keys_ref, cotangent_ref, inverse_ref, strength_ref, *ends_ref, out_ref = refs
    steps, dtype, product = form.steps, form.dtype, form.product
    row, piece, index, head = form.place()
    group = jax.lax.axis_index("group")
    queries, keys, cotangent, inverse, strength = (
        held[n] for n in ("queries", "keys", "cotangent", "inverse", "strength")
    )

    def keep(n: Array, state: Array) -> None:
        """Stores the gradient behind the step's chunk."""
        half = jax.lax.rem(n, 2)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        held["left"].at[half][...] = state
        plgpu.commit_smem()
        out = out_ref.at[row, head, piece * steps + steps - 1 - n]
        plgpu.copy_smem_to_gmem(held["left"].at[half], out)

    @pl.when(group == 0)
    def _carry() -> None:
        plgpu.set_max_registers(168, action="increase")
        start = zeros()
        if ends_ref:
            plgpu.copy_gmem_to_smem(ends_ref[0].at[index, head], held["state"].at[0], held["start"])
            plgpu.barrier_wait(held["start"])
            start = load(held["state"].at[0])

        def step(n: Array, state: Array) -> Array:
            slot = jax.lax.rem(n, form.stages)
            narrow = state.astype(dtype)
            plgpu.barrier_wait(held["come"].at[slot])
            read = (-product(narrow, keys.at[slot].T)).astype(dtype)
            if "left" in held:
                keep(n, narrow)
            plgpu.barrier_wait(held["made_come"].at[slot])
            state = product.added(state, (cotangent.at[slot].T, queries.at[slot]), (read, inverse.at[slot]))
            plgpu.barrier_arrive(held["free"].at[slot])
            return state

        state = jax.lax.fori_loop(0, steps, step, start)
        if "left" in held:
            plgpu.wait_smem_to_gmem(0)
        else:
            store(held, 0, state, out_ref.at[index, head])

    def make(which: int) -> None:
        """Every other chunk: one after another they take longer than the walk."""

        @pl.loop(0, (steps + 1 - which) // 2)
        def _chunk(n: Array) -> None:
            slot = jax.lax.rem(2 * n + which, form.stages)
            plgpu.barrier_wait(held["come"].at[slot])
            factors = along(strength.at[slot], 1)
            scaled = (load(inverse.at[slot]) * factors).astype(dtype)
            erased, read = product.apart((scaled, keys.at[slot]), (queries.at[slot], keys.at[slot].T))
            inverse.at[slot][...] = erased.astype(dtype)
            read = jnp.where(indices(0) >= indices(1), read, 0.0).astype(dtype)
            plgpu.commit_smem()
            left = load(queries.at[slot]) - product(read, inverse.at[slot])
            queries.at[slot][...] = left.astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(held["made_come"].at[slot])

    for which in (0, 1):

        @pl.when(group == 1 + which)
        def _make(which: int = which) -> None:
            plgpu.set_max_registers(152, action="increase")
            make(which)

    @pl.when(group == 3)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")
        names = ("queries", "keys", "cotangent", "inverse", "strength")
        given = (queries_ref, keys_ref, cotangent_ref, inverse_ref, strength_ref)
        form.copies(held, form.sources(dict(zip(names, given, strict=True)), reverse=True))
