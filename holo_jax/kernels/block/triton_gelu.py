"""Kernels of the exact GELU behind a bias (Pallas, lowered to Triton).

The backward pass may write the activation once more, so that only the input is kept. Arithmetic is float32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array
from holo_jax.kernels.block.triton_gated_norm import tokens_of
from holo_jax.kernels.instructions import exp2, reciprocal

_ROWS = 8
_COLUMNS = 256
_WARPS = 8
_FORWARD_TOKENS, _BACKWARD_TOKENS = 64, 128


# Of erf, within 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26).
_SCALE = 0.3275911
_SERIES = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def _normal(x: Array, *, approximate: bool) -> tuple[Array, Array]:
    """(distribution, density) of the standard normal; both from one exponential."""
    bell = exp2(x * x * (-0.5 / math.log(2.0)), approximate)
    t = reciprocal(1.0 + (_SCALE * math.sqrt(0.5)) * jnp.abs(x), approximate)
    series = jnp.full_like(t, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        series = series * t + coefficient
    tail = 0.5 * series * t * bell
    return jnp.where(x < 0.0, tail, 1.0 - tail), bell * (1.0 / math.sqrt(2.0 * math.pi))


def _launch(kernel: Any, inputs: dict[str, Any], shapes: Any, tokens: int, interpret: bool) -> Any:
    n, width = inputs["x"].shape
    columns = min(_COLUMNS, width)
    tile = pl.BlockSpec((tokens, columns), lambda i, j: (i, j))
    column = pl.BlockSpec((columns,), lambda i, j: (j,))
    row = pl.BlockSpec((1, columns), lambda i, j: (i, j))
    by_name = {"bias": column, "d_bias": row}
    return pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(n // tokens, width // columns),
        in_specs=({name: by_name.get(name, tile) for name in inputs},),
        out_specs={name: by_name.get(name, tile) for name in shapes},
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name=kernel.__name__,
    )(inputs)


def forward(x: Array, bias: Array, *, interpret: bool) -> Array:
    """``gelu(x + bias)``, ``[n, f]`` in the dtype of x; f a multiple of 256, or less and a power of two."""
    tokens = tokens_of(x.shape[0], _FORWARD_TOKENS)
    rows = min(_ROWS, tokens)

    def gelu_forward(ins: dict[str, Any], outs: dict[str, Any]) -> None:
        offset = ins["bias"][...].astype(jnp.float32)[None]

        def step(index: Array, _: None) -> None:
            at = (pl.ds(index * rows, rows), slice(None))
            value = ins["x"][at].astype(jnp.float32) + offset
            outs["y"][at] = (value * _normal(value, approximate=not interpret)[0]).astype(x.dtype)

        jax.lax.fori_loop(0, tokens // rows, step, None)

    shapes = {"y": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    return _launch(gelu_forward, {"x": x, "bias": bias}, shapes, tokens, interpret)["y"]


def backward(
    x: Array, bias: Array, cotangent: Array, *, again: bool = True, interpret: bool
) -> tuple[Array, Array | None, Array]:
    """(gradient of x, ``gelu(x + bias)`` if ``again``, gradient of the bias in float32)."""
    tokens = tokens_of(x.shape[0], _BACKWARD_TOKENS)
    rows = min(_ROWS, tokens)

    def gelu_backward(ins: dict[str, Any], outs: dict[str, Any]) -> None:
        offset = ins["bias"][...].astype(jnp.float32)[None]
        tiles = tokens // rows

        def load(index: Array) -> tuple[Array, Array]:
            at = (pl.ds(index * rows, rows), slice(None))
            return ins["x"][at], ins["cotangent"][at]

        def step(index: Array, carry: tuple[tuple[Array, ...], Array]) -> Any:
            loaded, total = carry
            at = (pl.ds(index * rows, rows), slice(None))
            value, pull = (a.astype(jnp.float32) for a in loaded)
            # No read passes a store, so the next tile's are asked for before this one's.
            loaded = load(jnp.minimum(index + 1, tiles - 1))
            value = value + offset
            below, density = _normal(value, approximate=not interpret)
            if again:
                outs["y"][at] = (value * below).astype(x.dtype)
            gradient = pull * (below + value * density)
            outs["d_x"][at] = gradient.astype(x.dtype)
            return loaded, total + gradient

        zero = jnp.zeros((rows, offset.shape[1]), jnp.float32)
        _, total = jax.lax.fori_loop(0, tiles, step, (load(jnp.int32(0)), zero))
        outs["d_bias"][...] = jnp.sum(total, axis=0)[None]

    whole = jax.ShapeDtypeStruct(x.shape, x.dtype)
    shapes = {"d_x": whole, "y": whole} if again else {"d_x": whole}
    shapes["d_bias"] = jax.ShapeDtypeStruct((x.shape[0] // tokens, x.shape[1]), jnp.float32)
    inputs = {"x": x, "bias": bias, "cotangent": cotangent}
    found = _launch(gelu_backward, inputs, shapes, tokens, interpret)
    return found["d_x"], found.get("y"), jnp.sum(found["d_bias"], axis=0)
