"""What a piece of a long row does to the state before it, under the erase rule (Pallas, Mosaic GPU).

A chunk of 64 positions with features ``k`` of keys, values ``v``, write gates ``g``, erase gates ``e`` and
``T = (1 + diag(e) L)^-1``, ``L_ij = k_i . k_j`` for ``j < i``, takes the transposed state ``S`` before it to

    S + (v^T diag(g) - S k^T diag(e)) (T^T k).

``T^T k`` is made ahead, so that two products of 64 follow one another in a chunk. Products have 16-bit
operands and float32 accumulators.

Sources: the chunked delta rule of https://arxiv.org/abs/2406.06484, whose ``T`` is the inverse that
https://github.com/jla-org/jax-linear-attention (Apache-2.0) computes; pieces and their maps as there.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.array_types import Array, Float
from holo_jax.kernels import mosaic
from holo_jax.kernels.hopper.chunk_tiles import CHUNK, WIDTH, along, indices, load, zeros
from holo_jax.kernels.hopper.piece_program import Refs, Walk, store


def transitions(
    keys: Float[Array, "b t h k"],
    values: Float[Array, "b t h d"],
    inverse: Float[Array, "b h t c"],
    gates: Float[Array, "b h t"],
    erase: Float[Array, "b h t"],
    *,
    pieces: int,
    interpret: Any = None,
) -> Float[Array, "b p h s k"]:
    """``[A^T; B^T]`` of every piece but a row's last, which takes a state S to ``A S + B``; ``s = k + d``.

    Args:
      keys, values: bfloat16 or float16, ``k = d = 64``, t a multiple of ``64 pieces``.
      inverse: ``T`` of every chunk, in their dtype, ``c = 64``.
      gates, erase: float32.
      pieces: of a row.
      interpret: parameters of Pallas' interpreter, or None.
    """
    b, t, h, _ = keys.shape
    walked = pieces - 1
    walk = Walk(b, h, t // (CHUNK * pieces), walked, 0, 5, 2, 1, keys.dtype, interpret)
    rooms = {name: walk.room() for name in ("keys", "values", "inverse", "made")}
    rooms |= {name: walk.numbers() for name in ("gates", "erase")}
    rooms["state"] = mosaic.pallas().SMEM((2, WIDTH, WIDTH), jnp.float32)
    out = jax.ShapeDtypeStruct((b * walked, h, 2 * WIDTH, WIDTH), jnp.float32)
    operands = (keys, values, inverse, gates, erase)
    found = walk.run(_walk, operands, "piece_transitions", out, rooms, len(operands))
    return found.reshape(b, walked, h, 2 * WIDTH, WIDTH)


def _walk(form: Walk, refs: Any, held: Refs) -> None:
    plgpu = mosaic.pallas()
    *given, out_ref = refs
    steps, dtype, product = form.steps, form.dtype, form.product
    _, _, index, head = form.place()
    group = jax.lax.axis_index("group")
    keys, values, inverse, made = (held[n] for n in ("keys", "values", "inverse", "made"))

    def walk(which: int, start: Array) -> None:
        """The increment (0) or the transition (1), which values do not reach."""

        def step(n: Array, state: Array) -> Array:
            slot = jax.lax.rem(n, form.stages)
            plgpu.barrier_wait(held["come"].at[slot])
            value = load(values.at[slot].T) * along(held["gates"].at[slot], 1) if which == 0 else 0.0
            known = product(state.astype(dtype), keys.at[slot].T)
            missing = (value - known * along(held["erase"].at[slot], 1)).astype(dtype)
            plgpu.barrier_wait(held["made_come"].at[slot])
            state = product.added(state, (missing, made.at[slot]))
            plgpu.barrier_arrive(held["free"].at[slot])
            return state

        state = jax.lax.fori_loop(0, steps, step, start)
        store(held, which, state, out_ref.at[index, head, pl.ds((1 - which) * WIDTH, WIDTH)])

    @pl.when(group == 0)
    def _increment() -> None:
        plgpu.set_max_registers(184, action="increase")
        walk(0, zeros())

    @pl.when(group == 1)
    def _transition() -> None:
        plgpu.set_max_registers(184, action="increase")
        walk(1, jnp.where(indices(0) == indices(1), 1.0, 0.0).astype(jnp.float32))

    @pl.when(group == 2)
    def _make() -> None:
        plgpu.set_max_registers(104, action="decrease")

        @pl.loop(0, steps)
        def _chunk(n: Array) -> None:
            slot = jax.lax.rem(n, form.stages)
            plgpu.barrier_wait(held["come"].at[slot])
            made.at[slot][...] = product(inverse.at[slot].T, keys.at[slot]).astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(held["made_come"].at[slot])

    @pl.when(group == 3)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")
        names = ("keys", "values", "inverse", "gates", "erase")
        form.copies(held, form.sources(dict(zip(names, given, strict=True))))
