"""States before pieces of a row from the maps of the pieces, and gradients after them (Pallas, Triton).

One program composes the maps of a head for some rows of the transposed state, in registers, piece after
piece. Products are of bfloat16 in three terms (error 2^-16 a product): a chunk's own are of one term.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array, Float

_ROWS = 16
_WARPS = 4
_PRECISION = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3


def before(maps: Float[Array, "b p h s k"], *, interpret: bool = False) -> Float[Array, "b q h d k"]:
    """The transposed state before every piece of rows that begin from nothing, float32, ``q = p + 1``.

    Args:
      maps: ``[A^T; B^T]`` of every piece but the last, ``s = k + d``, as of ``piece_maps.transitions``.
      interpret: run in Pallas' interpreter.
    """
    b, walked, h, both, k = maps.shape
    return _compose(_before, (maps,), (b, walked + 1, h, both - k, k), "piece_states", interpret)


def after(
    maps: Float[Array, "b p h s k"], terms: Float[Array, "b p h d k"], *, interpret: bool = False
) -> Float[Array, "b q h d k"]:
    """The transposed gradient of the state after every piece, float32, where that after the last has none.

    Args:
      maps: as in ``before``.
      terms: of every piece but the first, as of ``piece_maps.reverse_terms``.
      interpret: run in Pallas' interpreter.
    """
    b, walked, h, d, k = terms.shape
    return _compose(_after, (maps, terms), (b, walked + 1, h, d, k), "piece_gradients", interpret)


def _compose(
    body: Any, operands: tuple[Array, ...], shape: tuple[int, ...], name: str, interpret: bool
) -> Array:
    b, pieces, h, d, _ = shape

    def whole(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, x.shape[1], None, *x.shape[3:]), lambda row, head, _: (row, 0, head, 0, 0))

    return pl.pallas_call(
        partial(body, pieces=pieces, precision=None if interpret else _PRECISION),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=(b, h, d // _ROWS),
        in_specs=[whole(x) for x in operands],
        out_specs=whole(jax.ShapeDtypeStruct(shape, jnp.float32)),  # type: ignore[arg-type]
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name=name,
    )(*operands)


def _before(maps: Any, out: Any, *, pieces: int, precision: Any) -> None:
    k = maps.shape[-1]
    first = pl.program_id(2) * _ROWS
    own, added = pl.ds(first, _ROWS), pl.ds(k + first, _ROWS)
    out[0, own] = jnp.zeros((_ROWS, k), jnp.float32)
    state = maps[0, added]
    out[1, own] = state
    steps = [(maps, piece, maps, piece) for piece in range(1, pieces - 1)]
    for piece, (transition, increment) in enumerate(_ahead(steps, k, added), 2):
        state = _dot(state, transition, 0, precision) + increment
        out[piece, own] = state


def _after(maps: Any, terms: Any, out: Any, *, pieces: int, precision: Any) -> None:
    k = maps.shape[-1]
    own = pl.ds(pl.program_id(2) * _ROWS, _ROWS)
    out[pieces - 1, own] = jnp.zeros((_ROWS, k), jnp.float32)
    state = terms[pieces - 2, own]
    out[pieces - 2, own] = state
    steps = [(maps, piece, terms, piece - 1) for piece in reversed(range(1, pieces - 1))]
    for n, (transition, term) in enumerate(_ahead(steps, k, own), 1):
        state = _dot(state, transition, 1, precision) + term
        out[pieces - 2 - n, own] = state


def _ahead(steps: list[Any], k: int, rows: Any) -> Iterator[tuple[Array, Array]]:
    """Transition and what is added to it, of one piece after another, each asked for a piece early."""
    held = None
    for maps, piece, added, at in steps:
        found = maps[piece, :k], added[at, rows]
        if held is not None:
            yield held
        held = found
    if held is not None:
        yield held


def _dot(state: Array, transition: Array, axis: int, precision: Any) -> Array:
    axes = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(
        state, transition, axes, precision=precision or "highest", preferred_element_type=jnp.float32
    )
