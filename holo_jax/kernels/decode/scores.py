"""What drawing the next token needs of its logits, by one kernel (Pallas, Triton).

The token drawn has the highest score, a logit times the coldness plus noise, or that times what all have
alike. Each program finds the highest of its own ids, and ``choose`` the highest of the programs'.
"""

import math
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array, Float, Int, UInt32
from holo_jax.functional import noise
from holo_jax.kernels.decode.gate import inverse_rms
from holo_jax.kernels.instructions import fma, released

_NO_ID = 2**31 - 1
# Fours of logits that a program looks at; four have the words of one block of noise.
_BLOCKS = 256


class Drawing(NamedTuple):
    """How scores are made of logits.

    Attributes:
      keys: of the noise of a group, ``[C, b, 2]``: entry ``i`` for what follows its token ``i``; None takes
        the highest logit.
      coldness: logits are multiplied by it, one over the temperature, ``[1]`` in float32; None with no noise.
      allowed: number of ids that may be drawn, ``[1]`` in int32.
    """

    keys: UInt32[Array, "c b k"] | None
    coldness: Float[Array, "1"] | None
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
    logits: Float[Array, "b v"],
    drawing: Drawing,
    numbers: Int[Array, "n b"],
    stream: Float[Array, "b e"] | None = None,
    *,
    eps: float = 0.0,
    interpret: bool = False,
) -> Scores:
    """Scores of a token's logits.

    Args:
      logits: in float32.
      drawing: see ``Drawing``.
      numbers: its first row is the number of tokens of the group before this one, the same in all columns.
      stream: what is normed before the head, if logits are still to be divided by its root mean square.
      eps: of that norm.
      interpret: run in Pallas' interpreter, anywhere.
    """
    rows, outputs = logits.shape
    every = noise.blocks(outputs)
    programs = pl.cdiv(every, _BLOCKS)
    given = {"logits": logits, "numbers": numbers, "stream": stream, **drawing._asdict()}

    def kernel(refs: dict[str, Any], *results: Any) -> None:
        zero = pl.program_id(0) * 0
        block = pl.program_id(0) * _BLOCKS + jax.lax.iota(jnp.int32, _BLOCKS)
        columns = [jnp.where(block < every, block + word * every, outputs) for word in range(noise.WORDS)]
        row = jnp.full_like(block, pl.program_id(1))
        logits = [plgpu.load(refs["logits"].at[row, jnp.minimum(own, outputs - 1)]) for own in columns]
        allowed = jnp.minimum(plgpu.load(refs["allowed"].at[zero]), outputs)
        logits[0] = released(logits[0], not interpret)
        scores: list[Any] = logits
        if "keys" in refs:
            coldness = plgpu.load(refs["coldness"].at[zero])
            drawn = _noise(refs, pl.program_id(1) + zero, block, interpret)
            # In units of log 2, in which logarithms are the device's: no factor but of the logits.
            if stream is not None:
                coldness *= inverse_rms(refs["stream"], pl.program_id(1), stream.shape[1], eps)
            by = jnp.full((_BLOCKS,), coldness * math.log2(math.e))
            scores = [fma(own, by, added, not interpret) for own, added in zip(logits, drawn, strict=True)]
        best, at = _best(logits, scores, columns, allowed, interpret)
        plgpu.store(results[0].at[pl.program_id(1), pl.program_id(0)], best)
        plgpu.store(results[1].at[pl.program_id(1), pl.program_id(0)], at)

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
    logits: list[Any], scores: list[Any], columns: list[Array], allowed: Any, interpret: bool
) -> tuple[Array, Array]:
    """The highest score of some ids, not a number if a logit is not finite, and the lowest id that has it."""
    own = [jnp.where(at < allowed, score, -jnp.inf) for at, score in zip(columns, scores, strict=True)]
    best = jnp.max(reduce(jnp.maximum, own), axis=0)
    places = [jnp.where(x == best, at, _NO_ID) for at, x in zip(columns, own, strict=True)]
    # Nothing times a number is nothing.
    nothing: Any = jnp.zeros_like(logits[0])
    finite = reduce(lambda total, x: fma(x, jnp.zeros_like(x), total, not interpret), logits, nothing)
    return best + jnp.sum(finite, axis=0), jnp.min(reduce(jnp.minimum, places), axis=0)


def _noise(refs: dict[str, Any], row: Any, block: Array, interpret: bool) -> list[Array]:
    """Of all words of a row's blocks, for what follows the token."""
    index = plgpu.load(refs["numbers"].at[row * 0, row])
    first, second = (plgpu.load(refs["keys"].at[index, row, row * 0 + n]) for n in range(2))
    zero = jnp.zeros_like(first)
    # What is one number for all ids stays one: keys, and words of the first rounds.
    counter = (block.astype(jnp.uint32), zero, zero, zero)
    words = noise.philox((first, second), counter, noise.wide if interpret else _wide)
    return [-_log2(_exponential(noise.uniform(word), interpret), interpret) for word in words]


def _wide(factor: int, x: Array) -> tuple[Array, Array]:
    """As ``noise.wide``; the assembler makes one instruction of both words of an array."""
    if not x.ndim:
        return noise.wide(factor, x)

    def word(text: str) -> Array:
        [found] = plgpu.elementwise_inline_asm(
            f"{{ .reg .b32 o; .reg .b64 w; mul.wide.u32 w, $1, $2; mov.b64 {text}, w; }}",
            args=[x, jnp.full_like(x, factor)],
            constraints="=r,r,r",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.int32)],
        )
        return found.astype(jnp.uint32)

    return word("{o, $0}"), word("{$0, o}")


def _exponential(u: Array, interpret: bool) -> Array:
    """``-log2 u`` to 6e-6 of itself: the functions of the library are half of what drawing costs.

    The device's logarithm is off by 2e-7 near 1, whatever it is there: then it is a series.
    """
    x = 1.0 - u
    series: Array = jnp.full_like(x, math.log2(math.e) / 4)
    for n in (3, 2, 1):
        series = fma(series, x, jnp.full_like(x, math.log2(math.e) / n), not interpret)
    return jnp.where(x < 2.0**-5, x * series, -_log2(u, interpret))


def _log2(x: Array, interpret: bool) -> Array:
    """Of normal numbers."""
    if interpret:
        return jnp.log2(x)
    [found] = plgpu.elementwise_inline_asm(
        "lg2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return found
