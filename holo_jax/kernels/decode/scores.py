"""Logits of a token by one kernel, which also leaves what drawing the next token needs (Pallas, Triton).

The token drawn has the highest score, a logit over the temperature plus noise. A program that makes a few
logits knows the highest of its scores, so nobody reads all of them again: ``choose`` finds the highest
of the programs'. The head's product is ``products``' of kind ``maps``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array, Float, Int
from holo_jax.kernels.decode import products as decode_products

_NO_ID = 2**31 - 1
# Logits that a program looks at, where it does not make them.
_LOGITS = 1024


class Drawing(NamedTuple):
    """How scores are made of logits.

    Attributes:
      noise: a group's, ``[C, b, v]`` in float32: entry ``i`` for what follows its token ``i``; None takes the
        highest logit.
      temperature: logits are divided by it, ``[1]`` in float32; None with no noise.
      allowed: number of ids that may be drawn, ``[1]`` in int32.
    """

    noise: Float[Array, "c b v"] | None
    temperature: Float[Array, "1"] | None
    allowed: Int[Array, "1"]


class Scores(NamedTuple):
    """What programs found, each of its own ids.

    Attributes:
      best: the highest score ``[b, p]``; not a number if a logit is not finite.
      at: the lowest id that has it ``[b, p]``.
    """

    best: Float[Array, "b p"]
    at: Int[Array, "b p"]


def scores(
    x: Float[Array, "b e"],
    weight: Float[Array, "v e"],
    norm: Float[Array, " e"],
    drawing: Drawing,
    numbers: Int[Array, "n b"],
    *,
    eps: float,
    dtype: Any,
    interpret: bool = False,
) -> tuple[Float[Array, "b v"], Scores]:
    """Logits and scores.

    Args:
      x: the residual stream after the last block, in the storage dtype.
      weight: of the head, in the storage dtype.
      norm: weight of the norm before it.
      drawing: see ``Drawing``.
      numbers: its first row is the number of tokens of the group before this one, the same in all columns.
      eps: of the norm.
      dtype: that logits are rounded to.
      interpret: run in Pallas' interpreter, anywhere.

    Returns:
      Logits in float32, and ``Scores``.
    """
    rows, depth = x.shape
    outputs = weight.shape[0]
    tiling = decode_products.tiling_of(depth)
    call = decode_products.Product("maps", rows, depth, outputs, eps, tiling, interpret)
    programs = pl.cdiv(outputs, tiling.outputs)
    given = {"x": x, "weight": weight, "norm": norm, "numbers": numbers, **drawing._asdict()}

    def kernel(refs: dict[str, Any], *results: Any) -> None:
        columns = decode_products.columns(call)
        # Indices are traced: what loads by numbers alone the interpreter refuses.
        zero = pl.program_id(0) * 0
        allowed = plgpu.load(refs["allowed"].at[zero])
        # Asked for before the weights. Of what no id has, the last id's.
        noises = [_noise(refs, row, jnp.minimum(columns, outputs - 1)) for row in range(rows)]
        for row, (noise, [sums]) in enumerate(zip(noises, decode_products.products(call, refs), strict=True)):
            logits = sums.astype(dtype).astype(jnp.float32)
            here = (jnp.full_like(columns, row), columns)
            plgpu.store(results[0].at[here], logits, mask=columns < outputs)
            # Columns past the end hold the last one's logits once more.
            best, at = _best(refs, logits, noise, columns, jnp.minimum(allowed, outputs), interpret)
            own = (row + zero, pl.program_id(0))
            plgpu.store(results[1].at[own], best)
            plgpu.store(results[2].at[own], at)

    logits, best, at = pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((rows, outputs), jnp.float32),
            jax.ShapeDtypeStruct((rows, programs), jnp.float32),
            jax.ShapeDtypeStruct((rows, programs), jnp.int32),
        ),
        grid=(programs,),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=tiling.outputs, num_stages=1),
        interpret=interpret,
        name="decode_scores",
    )({name: array for name, array in given.items() if array is not None})
    return logits, Scores(best, at)


def of_logits(
    logits: Float[Array, "b v"], drawing: Drawing, numbers: Int[Array, "n b"], *, interpret: bool = False
) -> Scores:
    """Scores of logits that are there: of more rows, whose head's product is the compiler's.

    Args:
      logits: in float32.
      drawing, numbers, interpret: as in ``scores``.
    """
    rows, outputs = logits.shape
    programs = pl.cdiv(outputs, _LOGITS)
    given = {"logits": logits, "numbers": numbers, **drawing._asdict()}

    def kernel(refs: dict[str, Any], *results: Any) -> None:
        program, row = pl.program_id(0), pl.program_id(1)
        columns = program * _LOGITS + jax.lax.iota(jnp.int32, _LOGITS)
        inside = jnp.minimum(columns, outputs - 1)
        found = plgpu.load(refs["logits"].at[jnp.full_like(columns, row), inside])
        allowed = jnp.minimum(plgpu.load(refs["allowed"].at[program * 0]), outputs)
        best, at = _best(refs, found, _noise(refs, row, inside), columns, allowed, interpret)
        plgpu.store(results[0].at[row, program], best)
        plgpu.store(results[1].at[row, program], at)

    return Scores(
        *pl.pallas_call(
            kernel,
            out_shape=(
                jax.ShapeDtypeStruct((rows, programs), jnp.float32),
                jax.ShapeDtypeStruct((rows, programs), jnp.int32),
            ),
            grid=(programs, rows),
            compiler_params=None if interpret else plgpu.CompilerParams(num_warps=4, num_stages=1),
            interpret=interpret,
            name="decode_scores",
        )({name: array for name, array in given.items() if array is not None})
    )


def _best(
    refs: dict[str, Any], logits: Any, noise: Array | None, columns: Array, allowed: Any, interpret: bool
) -> tuple[Array, Array]:
    """The highest score of some ids, not a number if a logit is not finite, and the lowest id that has it."""
    found: Any = logits
    if noise is not None:
        temperature = jnp.full_like(found, plgpu.load(refs["temperature"].at[pl.program_id(0) * 0]))
        found = _quotient(found, temperature, interpret) + noise
    found = jnp.where(columns < allowed, found, -jnp.inf)
    best = jnp.max(found, axis=0)
    at = jnp.min(jnp.where(found == best, columns, _NO_ID), axis=0)
    finite = jnp.min(jnp.where(jnp.abs(logits) < jnp.inf, 1, 0), axis=0)
    return jnp.where(finite != 0, best, jnp.nan), at


def _noise(refs: dict[str, Any], row: Any, columns: Array) -> Array | None:
    """Of a row's columns, for what follows the token."""
    if "noise" not in refs:
        return None
    index = jnp.full_like(
        columns, plgpu.load(refs["numbers"].at[pl.program_id(0) * 0, row + pl.program_id(0) * 0])
    )
    return plgpu.load(refs["noise"].at[index, jnp.full_like(columns, row), columns])


def _quotient(x: Array, y: Array, interpret: bool) -> Array:
    """As the compiler divides: Triton's own quotient may be off by a bit or two."""
    if interpret:
        return x / y
    [found] = plgpu.elementwise_inline_asm(
        "div.rn.f32 $0, $1, $2;",
        args=[x, y],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return found
