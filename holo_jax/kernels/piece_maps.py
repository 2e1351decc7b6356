"""What a piece of a long row does to the state before it, under the erase rule (Pallas, Mosaic GPU).

A chunk of 64 positions with features ``k`` of keys and ``q`` of queries, values ``v``, strengths ``beta`` and
``T = (I + A)^-1``, ``A_ij = beta_i (k_i . k_j)`` for ``j < i``, takes the transposed state ``S`` before it to

    S + (v^T - S k^T) diag(beta) (T^T k)

and the gradient ``G`` of the state after it, where outputs have the gradient ``r``, to

    G - (G k^T) Y + r^T (q - P Y),    Y = T diag(beta) k,    P_ij = q_i . k_j for j <= i.

What does not depend on the state is made ahead by a warpgroup of its own, so that two products of 64 follow
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

CHUNK = 64
WIDTH = 64
_STAGES = 6
_Refs = dict[str, Any]


class _Form(NamedTuple):
    """Chunks of a piece, pieces of a row that are walked, of what numbers, and whether interpreted."""

    steps: int
    walked: int
    dtype: Any
    interpreted: bool


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
    form = _Form(t // (CHUNK * pieces), walked, keys.dtype, interpret is not None)
    body = partial(_transitions, form)
    tile = partial(_tiles, dtype=keys.dtype)
    return _run(
        body,
        (keys, values, inverse, strength),
        name="piece_transitions",
        out=jax.ShapeDtypeStruct((b * walked, h, 2 * WIDTH, WIDTH), jnp.float32),
        scratch=dict(keys=tile(), values=tile(), inverse=tile(), made=tile(), strength=_vectors()),
        walkers=2,
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
    form = _Form(t // (CHUNK * pieces), walked, keys.dtype, interpret is not None)
    body = partial(_reverse_terms, form)
    tile = partial(_tiles, dtype=keys.dtype)
    return _run(
        body,
        (queries, keys, cotangent, inverse, strength),
        name="piece_reverse_terms",
        out=jax.ShapeDtypeStruct((b * walked, h, WIDTH, WIDTH), jnp.float32),
        # Queries and inverses are replaced by what is made of them.
        scratch=dict(queries=tile(), keys=tile(), cotangent=tile(), inverse=tile(), strength=_vectors()),
        walkers=1,
        grid=(b * walked, h),
        interpret=interpret,
    ).reshape(b, walked, h, WIDTH, WIDTH)


def _tiles(dtype: Any) -> Any:
    """A tile for every stage, laid out for asynchronous copies and the tensor cores."""
    plgpu = mosaic.pallas()
    swizzle = plgpu.find_swizzle(WIDTH * jnp.dtype(dtype).itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM((_STAGES, CHUNK, WIDTH), dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def _vectors() -> Any:
    return mosaic.pallas().SMEM((_STAGES, CHUNK), jnp.float32)


def _run(
    body: Any,
    operands: tuple[Array, ...],
    *,
    name: str,
    out: Any,
    scratch: _Refs,
    walkers: int,
    grid: tuple[int, int],
    interpret: Any,
) -> Array:
    """A program for every piece and head: ``walkers`` warpgroups, one that makes, one that copies."""
    plgpu = mosaic.pallas()
    barriers = dict(
        come=plgpu.Barrier(num_arrivals=len(operands), num_barriers=_STAGES),
        made_come=plgpu.Barrier(num_barriers=_STAGES),
        free=plgpu.Barrier(num_arrivals=walkers, num_barriers=_STAGES),
        done=plgpu.Barrier(num_arrivals=walkers + 2),
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
        num_threads=walkers + 2,
        thread_name="group",
        interpret=interpret,
        kernel_name=name,
    )(*operands)


def _place(walked: int, skipped: int) -> tuple[Array, Array, Array, Array]:
    """(row, piece of it, index over rows and pieces walked, head)."""
    index = jax.lax.axis_index("piece")
    row, piece = jax.lax.div(index, walked), jax.lax.rem(index, walked) + skipped
    return row, piece, index, jax.lax.axis_index("head")


def _product(form: _Form, a: Any, b: Any) -> Array:
    return _products(form, (a, b))[0]


def _products(form: _Form, *pairs: Any) -> tuple[Array, ...]:
    """Products of each pair; nothing may be moved over their end, which no register names."""
    plgpu = mosaic.pallas()
    if form.interpreted:  # the interpreter multiplies no registers
        wide = ([x[...].astype(jnp.float32) for x in pair] for pair in pairs)
        return tuple(jnp.dot(a, b, precision="highest") for a, b in wide)

    def multiply(*sums: Any) -> tuple[Array, ...]:
        for total, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(total, a, b)
        return tuple(total[...] for total in sums)

    shapes = [plgpu.ACC((WIDTH, WIDTH), jnp.float32) for _ in pairs]
    return jax.lax.optimization_barrier(pl.run_scoped(multiply, *shapes))


def _added(form: _Form, start: Array, *pairs: Any) -> Array:
    """``start`` and the products of all pairs."""
    plgpu = mosaic.pallas()
    if form.interpreted:
        return sum(_products(form, *pairs), start)

    def multiply(total: Any) -> None:
        for a, b in pairs:
            plgpu.wgmma(total, a, b)

    return jax.lax.optimization_barrier(pl.run_state(multiply)(plgpu.ACC.init(start)))


def _load(ref: Any, axis: int | None = None) -> Array:
    """A tile in the registers of the tensor cores, or a vector along its rows (0) or columns (1)."""
    plgpu = mosaic.pallas()
    layout = plgpu.Layout.WGMMA if axis is None else plgpu.Layout.WGMMA.reduce(1 - axis)
    return plgpu.load(ref, layout=layout)


def _along_columns(vector: Array) -> Array:
    return jax.lax.broadcast_in_dim(vector, (WIDTH, CHUNK), [1])


def _indices(axis: int) -> Array:
    plgpu = mosaic.pallas()
    return plgpu.broadcasted_iota(jnp.int32, (WIDTH, WIDTH), axis, layout=plgpu.Layout.WGMMA)


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
    steps, dtype = form.steps, form.dtype
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
            factors = _along_columns(_load(strength.at[slot], 1))
            if which == 0:
                value = _load(values.at[slot].T).astype(jnp.float32)
                missing = (value - _product(form, state.astype(dtype), keys.at[slot].T)) * factors
            else:
                missing = -_product(form, state.astype(dtype), keys.at[slot].T) * factors
            missing = missing.astype(dtype)
            plgpu.barrier_wait(held["made_come"].at[slot])
            state = _added(form, state, (missing, made.at[slot]))
            plgpu.barrier_arrive(held["free"].at[slot])
            return state

        state = jax.lax.fori_loop(0, steps, step, start)
        _store(held, which, state, out_ref.at[index, head, pl.ds((1 - which) * WIDTH, WIDTH)])

    @pl.when(group == 0)
    def _increment() -> None:
        plgpu.set_max_registers(184, action="increase")
        walk(0, plgpu.layout_cast(jnp.zeros((WIDTH, WIDTH), jnp.float32), plgpu.Layout.WGMMA))

    @pl.when(group == 1)
    def _transition() -> None:
        plgpu.set_max_registers(184, action="increase")
        walk(1, jnp.where(_indices(0) == _indices(1), 1.0, 0.0).astype(jnp.float32))

    @pl.when(group == 2)
    def _make() -> None:
        plgpu.set_max_registers(104, action="decrease")

        @pl.loop(0, steps)
        def _chunk(n: Array) -> None:
            slot = jax.lax.rem(n, _STAGES)
            plgpu.barrier_wait(held["come"].at[slot])
            made.at[slot][...] = _product(form, inverse.at[slot].T, keys.at[slot]).astype(dtype)
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
    steps, dtype = form.steps, form.dtype
    row, piece, index, head = _place(form.walked, 1)
    group = jax.lax.axis_index("group")
    queries, keys, cotangent, inverse, strength = (
        held[n] for n in ("queries", "keys", "cotangent", "inverse", "strength")
    )

    def rows(n: Any) -> Any:
        return pl.ds(((piece + 1) * steps - 1 - n) * CHUNK, CHUNK)

    @pl.when(group == 0)
    def _walk() -> None:
        plgpu.set_max_registers(208, action="increase")

        def step(n: Array, state: Array) -> Array:
            slot = jax.lax.rem(n, _STAGES)
            plgpu.barrier_wait(held["come"].at[slot])
            read = (-_product(form, state.astype(dtype), keys.at[slot].T)).astype(dtype)
            plgpu.barrier_wait(held["made_come"].at[slot])
            state = _added(form, state, (cotangent.at[slot].T, queries.at[slot]), (read, inverse.at[slot]))
            plgpu.barrier_arrive(held["free"].at[slot])
            return state

        start = plgpu.layout_cast(jnp.zeros((WIDTH, WIDTH), jnp.float32), plgpu.Layout.WGMMA)
        _store(held, 0, jax.lax.fori_loop(0, steps, step, start), out_ref.at[index, head])

    @pl.when(group == 1)
    def _make() -> None:
        plgpu.set_max_registers(208, action="increase")

        @pl.loop(0, steps)
        def _chunk(n: Array) -> None:
            slot = jax.lax.rem(n, _STAGES)
            plgpu.barrier_wait(held["come"].at[slot])
            factors = _along_columns(_load(strength.at[slot], 1))
            scaled = (_load(inverse.at[slot]).astype(jnp.float32) * factors).astype(dtype)
            erased, read = _products(form, (scaled, keys.at[slot]), (queries.at[slot], keys.at[slot].T))
            inverse.at[slot][...] = erased.astype(dtype)
            read = jnp.where(_indices(0) >= _indices(1), read, 0.0).astype(dtype)
            plgpu.commit_smem()
            left = _load(queries.at[slot]).astype(jnp.float32) - _product(form, read, inverse.at[slot])
            queries.at[slot][...] = left.astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(held["made_come"].at[slot])

    @pl.when(group == 2)
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
