"""Retrievals under the erase rule, and the states between chunks (Pallas, Mosaic GPU).

A chunk of 64 positions with features ``k`` of keys and ``q`` of queries, values ``v``, write gates ``g``,
erase gates ``e`` and ``T = (1 + diag(e) L)^-1``, ``L_ij = k_i . k_j`` for ``j < i``, takes the transposed
state ``S`` before it to

    S + W (T^T k),    W = v^T diag(g) - S k^T diag(e),

and its retrievals are ``q S^T + (P T) W^T``, ``P_ij = q_i . k_j`` for ``j <= i``. ``T^T k`` and ``P T`` are
made ahead; retrievals follow behind, by a warpgroup of their own. Products have 16-bit operands and float32
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
from holo_jax.kernels.hopper.piece_program import Refs, Walk

_MATRICES = ("keys", "values", "inverse", "queries")


def retrievals(
    keys: Float[Array, "b t h k"],
    values: Float[Array, "b t h d"],
    inverse: Float[Array, "b h t c"],
    gates: Float[Array, "b h t"],
    erase: Float[Array, "b h t"],
    queries: Float[Array, "b t h k"],
    starts: Float[Array, "bp h d k"] | None,
    *,
    pieces: int,
    interpret: Any = None,
) -> Float[Array, "b t h d"]:
    """Of every position, in the dtype of the keys.

    Args:
      keys, values, queries: bfloat16 or float16, ``k = d = 64``, t a multiple of ``64 pieces``.
      inverse: T of every chunk, in their dtype, ``c = 64``.
      gates, erase: float32.
      starts: transposed states before pieces, float32; None is nothing.
      pieces: of a row.
      interpret: parameters of Pallas' interpreter, or None.
    """
    plgpu = mosaic.pallas()
    given = dict(keys=keys, values=values, inverse=inverse, queries=queries, gates=gates, erase=erase)
    walk = _form(keys, pieces, 3, interpret)._replace(walkers=2)
    rooms = {name: tile(keys.dtype, 2) for name in ("state_left", "missing_left", "left")}
    rooms |= {name: plgpu.Barrier(num_barriers=2) for name in ("left_come", "left_free")}
    out = jax.ShapeDtypeStruct(values.shape, keys.dtype)
    return _run(walk, "retrievals", given, starts, rooms, out)


def states(
    keys: Float[Array, "b t h k"],
    values: Float[Array, "b t h d"],
    inverse: Float[Array, "b h t c"],
    gates: Float[Array, "b h t"],
    erase: Float[Array, "b h t"],
    starts: Float[Array, "bp h d k"] | None,
    *,
    pieces: int,
    interpret: Any = None,
) -> Float[Array, "b h n d k"]:
    """The transposed state before every chunk, in the dtype of the keys; arguments as of ``retrievals``."""
    b, t, h, _ = keys.shape
    given = dict(keys=keys, values=values, inverse=inverse, gates=gates, erase=erase)
    out = jax.ShapeDtypeStruct((b, h, t // CHUNK, WIDTH, WIDTH), keys.dtype)
    walk = _form(keys, pieces, 4, interpret)
    return _run(walk, "forward_states", given, starts, {"left": tile(keys.dtype, 2)}, out)


def _form(keys: Array, pieces: int, stages: int, interpret: Any) -> Walk:
    b, t, h, _ = keys.shape
    return Walk(b, h, t // (CHUNK * pieces), pieces, 0, stages, 1, 1, keys.dtype, interpret)


def _run(walk: Walk, name: str, given: Refs, starts: Array | None, rooms: Refs, out: Any) -> Array:
    rooms |= {n: walk.room() if n in _MATRICES else walk.numbers() for n in given} | {"made": walk.room()}
    names = list(given)

    def body(form: Walk, refs: Any, held: Refs) -> None:
        start = refs[len(names)] if starts is not None else None
        _walk(form, dict(zip(names, refs, strict=False)), start, refs[-1], held)

    operands = (*given.values(), *(() if starts is None else (starts,)))
    return walk.run(body, operands, name, out, rooms, len(names))


def _walk(form: Walk, given: Refs, starts_ref: Any, out_ref: Any, held: Refs) -> None:
    plgpu = mosaic.pallas()
    steps, dtype, product = form.steps, form.dtype, form.product
    row, piece, index, head = form.place()
    group = jax.lax.axis_index("group")
    reads = "queries" in given
    keys, values, inverse, made = (held[n] for n in ("keys", "values", "inverse", "made"))
    left = held["left"]

    def keep(half: Array, x: Array, out: Any) -> None:
        """Stores a tile once that of two steps ago has left."""
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        left.at[half][...] = x
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(left.at[half], out)

    @pl.when(group == 0)
    def _carry() -> None:
        plgpu.set_max_registers(152 if reads else 208, action="increase")
        start = zeros()
        if starts_ref is not None:
            plgpu.copy_gmem_to_smem(starts_ref.at[index, head], held["state"].at[0], held["start"])
            plgpu.barrier_wait(held["start"])
            start = load(held["state"].at[0])

        def step(n: Array, state: Array) -> Array:
            slot, half = jax.lax.rem(n, form.stages), jax.lax.rem(n, 2)
            narrow = state.astype(dtype)
            if reads:

                @pl.when(n >= 2)
                def _() -> None:
                    plgpu.barrier_wait(held["left_free"].at[half])

                held["state_left"].at[half][...] = narrow
            else:
                keep(half, narrow, out_ref.at[row, head, piece * steps + n])
            plgpu.barrier_wait(held["come"].at[slot])
            value = load(values.at[slot].T) * along(held["gates"].at[slot], 1)
            known = product(narrow, keys.at[slot].T)
            missing = (value - known * along(held["erase"].at[slot], 1)).astype(dtype)
            if reads:
                held["missing_left"].at[half][...] = missing
                plgpu.commit_smem()
                plgpu.barrier_arrive(held["left_come"].at[half])
            plgpu.barrier_wait(held["made_come"].at[slot])
            state = product.added(state, (missing, made.at[slot]))
            plgpu.barrier_arrive(held["free"].at[slot])
            return state

        jax.lax.fori_loop(0, steps, step, start)
        if reads:
            for n in range(max(steps - 2, 0), steps):
                plgpu.barrier_wait(held["left_free"].at[n % 2])
        else:
            plgpu.wait_smem_to_gmem(0)

    @pl.when(group == form.walkers)
    def _make() -> None:
        plgpu.set_max_registers(152 if reads else 208, action="increase")

        @pl.loop(0, steps)
        def _chunk(n: Array) -> None:
            slot = jax.lax.rem(n, form.stages)
            plgpu.barrier_wait(held["come"].at[slot])
            if reads:
                writing, scores = product.apart(
                    (inverse.at[slot].T, keys.at[slot]), (held["queries"].at[slot], keys.at[slot].T)
                )
                scores = jnp.where(indices(0) >= indices(1), scores, 0.0).astype(dtype)
                scores = product(scores, inverse.at[slot])
                plgpu.commit_smem()
                inverse.at[slot][...] = scores.astype(dtype)
            else:
                writing = product(inverse.at[slot].T, keys.at[slot])
            made.at[slot][...] = writing.astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(held["made_come"].at[slot])

    @pl.when(group == form.walkers + 1)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")
        form.copies(held, form.sources(given))

    if not reads:
        return

    @pl.when(group == 1)
    def _retrieve() -> None:
        plgpu.set_max_registers(144, action="increase")

        @pl.loop(0, steps)
        def _chunk(n: Array) -> None:
            slot, half = jax.lax.rem(n, form.stages), jax.lax.rem(n, 2)
            plgpu.barrier_wait(held["come"].at[slot])
            plgpu.barrier_wait(held["made_come"].at[slot])
            plgpu.barrier_wait(held["left_come"].at[half])
            state, missing = held["state_left"].at[half], held["missing_left"].at[half]
            found = product.added(zeros(), (held["queries"].at[slot], state.T), (inverse.at[slot], missing.T))
            plgpu.barrier_arrive(held["left_free"].at[half])
            plgpu.barrier_arrive(held["free"].at[slot])
            keep(half, found.astype(dtype), out_ref.at[row, form.chunk(piece, n), head])

        plgpu.wait_smem_to_gmem(0)
