"""What drawing the next token needs of its logits, by one kernel (Pallas, Triton).

The token drawn has the highest score, a logit over the temperature plus noise. Each program finds the highest
of its own ids, and ``choose`` the highest of the programs'.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array, Float, Int

_NO_ID = 2**31 - 1
# Logits that a program looks at.
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


def of_logits(
    logits: Float[Array, "b v"], drawing: Drawing, numbers: Int[Array, "n b"], *, interpret: bool = False
) -> Scores:
    """Scores of a token's logits.

    Args:
      logits: in float32.
      drawing: see ``Drawing``.
      numbers: its first row is the number of tokens of the group before this one, the same in all columns.
      interpret: run in Pallas' interpreter, anywhere.
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
