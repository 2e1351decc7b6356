"""``silu(gate) * up`` of few rows, with the norm that stands before both maps (Pallas, lowered to Triton).

The norm's weight is in the maps already. One over the root mean square, a number a row, is multiplied to
their results: the normed rows are never written, and no kernel makes them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array, Float

# Columns that a program has at a time, and how often: their loads all stand before the first use.
_BLOCK, _TURNS = 512, 2
_WARPS = 4


def inverse_rms(ref: Any, row: Array, width: int, eps: float) -> Array:
    """One over the root mean square of a row."""
    columns = jax.lax.iota(jnp.int32, 1 << (width - 1).bit_length())
    x: Any = plgpu.load(ref.at[row, columns], mask=columns < width, other=0.0)
    x = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.sum(x * x, axis=0) * (1.0 / width) + eps)


def gated(
    y: Float[Array, "b f"], x: Float[Array, "b e"], *, eps: float, interpret: bool = False
) -> Float[Array, "b h"]:
    """The hidden layer of the denoiser.

    Args:
      y: maps of ``x`` times the norm's weight: ``up`` and then ``gate``.
      x: what is normed, in the storage dtype.
      eps: of the norm.
      interpret: run in Pallas' interpreter, anywhere.

    Returns:
      In the storage dtype.
    """
    (rows, width), hidden, storage = x.shape, y.shape[1] // 2, x.dtype

    def kernel(ins: tuple[Any, Any], out: Any) -> None:
        row, first = pl.program_id(1), pl.program_id(0) * _BLOCK * _TURNS
        places = [first + turn * _BLOCK + jax.lax.iota(jnp.int32, _BLOCK) for turn in range(_TURNS)]
        maps = [
            [plgpu.load(ins[0].at[row, half * hidden + at], mask=at < hidden, other=0.0) for half in range(2)]
            for at in places
        ]
        inverse = inverse_rms(ins[1], row, width, eps)
        for at, own in zip(places, maps, strict=True):
            up, gate = ((part * inverse).astype(storage).astype(jnp.float32) for part in own)
            # A sigmoid as a root squared: a quotient is many instructions.
            root = jax.lax.rsqrt(1.0 + jnp.exp(-gate))
            plgpu.store(out.at[row, at], (gate * (root * root) * up).astype(storage), mask=at < hidden)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, hidden), storage),
        grid=(pl.cdiv(hidden, _BLOCK * _TURNS), rows),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="decode_gate",
    )((y, x))
