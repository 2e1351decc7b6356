"""What a piece of a long row does to the state before it, under the erase rule (Pallas, Mosaic GPU).

A chunk of 64 positions with features ``k`` of keys and ``q`` of queries, values ``v``, strengths ``beta`` and
``T = (I + A)^-1``, ``A_ij = beta_i (k_i . k_j)`` for ``j < i``, takes the transposed state ``S`` before it to

    S + (v^T - S k^T) diag(beta) (T^T k)

and the gradient ``G`` of the state after it, where outputs have the gradient ``r``, to

    G - (G k^T) Y + r^T (q - P Y),    Y = T diag(beta) k,    P_ij = q_i . k_j for j <= i.

What does not depend on the state is made ahead by warpgroups of their own, so that two products of 64 follow
one another in a chunk; one program walks a piece. Products have 16-bit operands and float32 accumulators.

Sources: the chunked delta rule of https://arxiv.org/abs/2406.06484, whose ``T`` is the inverse that
https://github.com/jla-org/jax-linear-attention (Apache-2.0) computes; pieces and their maps as there.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.array_types import Array, Float
from holo_jax.kernels import mosaic
from holo_jax.kernels.chunk_tiles import CHUNK, WIDTH, Products, along, indices, load, tile, vector, zeros

_STAGES = 6  # even: of two makers each has its own
_Refs = dict[str, Any]


class _Form(NamedTuple):
    """Chunks of a piece, pieces of a row that are walked, of what numbers, and products of tiles."""

    steps: int
    walked: int
    dtype: Any
    product: Products


def transitions(
    keys: Float[Array, "b t h k"],
    values: Float[Array, "b t h d"],
    inverse: Float[Array, "b h t c"],
    strength: Float[Array, "b h t"],
    *,
    pieces: int,
    interpret: Any = None,
) -> Float[Array, "b p h s k"]:
    """``[A^T; B^T]`` of every piece but a row's last, which takes a state S to ``A S + B``; ``s = k + d``.

    Args:
      keys, values: bfloat16 or float16, ``k = d = 64``, t a multiple of ``64 pieces``.
      inverse: ``T`` of every chunk, in their dtype, ``c = 64``.
      strength: float32.
      pieces: of a row.
      interpret: parameters of Pallas' interpreter, or None.
    """
    b, t, h, _ = keys.shape
    walked = pieces - 1
    form = _Form(t // (CHUNK * pieces), walked, keys.dtype, Products(interpret is not None))
    body = partial(_transitions, form)
    room = partial(tile, keys.dtype, _STAGES)
    return _run(
        body,
        (keys, values, inverse, strength),
        name="piece_transitions",
        out=jax.ShapeDtypeStruct((b * walked, h, 2 * WIDTH, WIDTH), jnp.float32),
        scratch=dict(keys=room(), values=room(), inverse=room(), made=room(), strength=vector(_STAGES)),
        walkers=2,
        makers=1,
        grid=(b * walked, h),
        interpret=interpret,
    ).reshape(b, walked, h, 2 * WIDTH, WIDTH)


def reverse_terms(
    queries: Float[Array, "b t h k"],
    keys: Float[Array, "b t h k"],
    cotangent: Float[Array, "b t h d"],
    inverse: Float[Array, "b h t c"],
    strength: Float[Array, "b h t"],
    *,
    pieces: int,
    interpret: Any = None,
) -> Float[Array, "b p h d k"]:
    """Gradient of the state before every piece but a row's first, if the state after it has none; transposed.

    Args:
      queries, keys, inverse, strength, pieces, interpret: as in ``transitions``.
      cotangent: of the outputs, in the dtype of the keys.
    """
    b, t, h, _ = keys.shape
    walked = pieces - 1
    form = _Form(t // (CHUNK * pieces), walked, keys.dtype, Products(interpret is not None))
    body = partial(_reverse_terms, form)
    room = partial(tile, keys.dtype, _STAGES)
    return _run(
        body,
        (queries, keys, cotangent, inverse, strength),
        name="piece_reverse_terms",
        out=jax.ShapeDtypeStruct((b * walked, h, WIDTH, WIDTH), jnp.float32),
        # Queries and inverses are replaced by what is made of them.
        scratch=dict(queries=room(), keys=room(), cotangent=room(), inverse=room(), strength=vector(_STAGES)),
        walkers=1,
        makers=2,
        grid=(b * walked, h),
        interpret=interpret,
    ).reshape(b, walked, h, WIDTH, WIDTH)


def _run(
    body: Any,
    operands: tuple[Array, ...],
    *,
    name: str,
    out: Any,
    scratch: _Refs,
    walkers: int,
    makers: int,
    grid: tuple[int, int],
    interpret: Any,
) -> Array:
    """A program for every piece and head: warpgroups that walk, that make what they need, one that copies."""
    plgpu = mosaic.pallas()
    groups = walkers + makers + 1
    barriers = dict(
        come=plgpu.Barrier(num_arrivals=len(operands), num_barriers=_STAGES),
        made_come=plgpu.Barrier(num_barriers=_STAGES),
        free=plgpu.Barrier(num_arrivals=walkers, num_barriers=_STAGES),
        done=plgpu.Barrier(num_arrivals=groups),
    )
    names = [*scratch, *barriers, "state"]

    def run(*refs: Any, **held: Any) -> None:
        body(*refs[:-1], out_ref=refs[-1], held={n: held[n] for n in names})

    return plgpu.kernel(
        run,
        out_type=out,
        scratch_types=dict(**scratch, **barriers, state=plgpu.SMEM((walkers, WIDTH, WIDTH), jnp.float32)),
        grid=grid,
        grid_names=("piece", "head"),
        num_threads=groups,
        thread_name="group",
        interpret=interpret,
        kernel_name=name,
    )(*operands)


def _place(walked: int, skipped: int) -> tuple[Array, Array, Array, Array]:
    """(row, piece of it, index over rows and pieces walked, head)."""
    index = jax.lax.axis_index("piece")
    row, piece = jax.lax.div(index, walked), jax.lax.rem(index, walked) + skipped
    return row, piece, index, jax.lax.axis_index("head")


def _copies(held: _Refs, steps: int, sources: dict[str, Any]) -> None:
    """Asks for what every chunk needs as soon as its stage is free."""
    plgpu = mosaic.pallas()

    def ask(n: Any, slot: Any) -> None:
        for name, source in sources.items():
            plgpu.copy_gmem_to_smem(source(n), held[name].at[slot], held["come"].at[slot])

    for n in range(min(_STAGES, steps)):
        ask(n, n)

    @pl.loop(_STAGES, max(steps, _STAGES))
    def _refill(n: Array) -> None:
        slot = jax.lax.rem(n, _STAGES)
        plgpu.barrier_wait(held["free"].at[slot])
        ask(n, slot)

    for n in range(max(steps - _STAGES, 0), steps):
        plgpu.barrier_wait(held["free"].at[n % _STAGES])


def _end(held: _Refs) -> None:
    """No warpgroup leaves while another multiplies."""
    plgpu = mosaic.pallas()
    plgpu.barrier_arrive(held["done"])
    plgpu.barrier_wait(held["done"])


def _store(held: _Refs, which: int, state: Array, out: Any) -> None:
    plgpu = mosaic.pallas()
    held["state"].at[which][...] = state
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(held["state"].at[which], out)
    plgpu.wait_smem_to_gmem(0)


def _transitions(
    form: _Form,
    keys_ref: Any,
    values_ref: Any,
    inverse_ref: Any,
    strength_ref: Any,
    *,
    out_ref: Any,
    held: _Refs,
) -> None:
    plgpu = mosaic.pallas()
    steps, dtype, product = form.steps, form.dtype, form.product
    row, piece, index, head = _place(form.walked, 0)
    group = jax.lax.axis_index("group")
    keys, values, inverse, made, strength = (
        held[n] for n in ("keys", "values", "inverse", "made", "strength")
    )

    def rows(n: Any) -> Any:
        return pl.ds((piece * steps + n) * CHUNK, CHUNK)

    def walk(which: int, start: Array) -> None:
        """The increment (0) or the transition (1), which values do not reach."""

        def step(n: Array, state: Array) -> Array:
            slot = jax.lax.rem(n, _STAGES)
            plgpu.barrier_wait(held["come"].at[slot])
            factors = along(strength.at[slot], 1)
            if which == 0:
                value = load(values.at[slot].T)
                missing = (value - product(state.astype(dtype), keys.at[slot].T)) * factors
            else:
                missing = -product(state.astype(dtype), keys.at[slot].T) * factors
            missing = missing.astype(dtype)
            plgpu.barrier_wait(held["made_come"].at[slot])
            state = product.added(state, (missing, made.at[slot]))
            plgpu.barrier_arrive(held["free"].at[slot])
            return state

        state = jax.lax.fori_loop(0, steps, step, start)
        _store(held, which, state, out_ref.at[index, head, pl.ds((1 - which) * WIDTH, WIDTH)])

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
            slot = jax.lax.rem(n, _STAGES)
            plgpu.barrier_wait(held["come"].at[slot])
            made.at[slot][...] = product(inverse.at[slot].T, keys.at[slot]).astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(held["made_come"].at[slot])

    @pl.when(group == 3)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _copies(
            held,
            steps,
            dict(
                keys=lambda n: keys_ref.at[row, rows(n), head],
                values=lambda n: values_ref.at[row, rows(n), head],
                inverse=lambda n: inverse_ref.at[row, head, rows(n)],
                strength=lambda n: strength_ref.at[row, head, rows(n)],
            ),
        )

    _end(held)


def _reverse_terms(
    form: _Form,
    queries_ref: Any,
    keys_ref: Any,
    cotangent_ref: Any,
    inverse_ref: Any,
    strength_ref: Any,
    *,
    out_ref: Any,
    held: _Refs,
) -> None:
    plgpu = mosaic.pallas()
    steps, dtype, product = form.steps, form.dtype, form.product
    row, piece, index, head = _place(form.walked, 1)
    group = jax.lax.axis_index("group")
    queries, keys, cotangent, inverse, strength = (
        held[n] for n in ("queries", "keys", "cotangent", "inverse", "strength")
    )

    def rows(n: Any) -> Any:
        return pl.ds(((piece + 1) * steps - 1 - n) * CHUNK, CHUNK)

    @pl.when(group == 0)
    def _walk() -> None:
        plgpu.set_max_registers(168, action="increase")

        def step(n: Array, state: Array) -> Array:
            slot = jax.lax.rem(n, _STAGES)
            plgpu.barrier_wait(held["come"].at[slot])
            read = (-product(state.astype(dtype), keys.at[slot].T)).astype(dtype)
            plgpu.barrier_wait(held["made_come"].at[slot])
            state = product.added(state, (cotangent.at[slot].T, queries.at[slot]), (read, inverse.at[slot]))
            plgpu.barrier_arrive(held["free"].at[slot])
            return state

        start = zeros()
        _store(held, 0, jax.lax.fori_loop(0, steps, step, start), out_ref.at[index, head])

    def make(which: int) -> None:
        """Every other chunk: one after another they take longer than the walk."""

        @pl.loop(0, (steps + 1 - which) // 2)
        def _chunk(n: Array) -> None:
            slot = jax.lax.rem(2 * n + which, _STAGES)
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
        _copies(
            held,
            steps,
            dict(
                queries=lambda n: queries_ref.at[row, rows(n), head],
                keys=lambda n: keys_ref.at[row, rows(n), head],
                cotangent=lambda n: cotangent_ref.at[row, rows(n), head],
                inverse=lambda n: inverse_ref.at[row, head, rows(n)],
                strength=lambda n: strength_ref.at[row, head, rows(n)],
            ),
        )

    _end(held)
