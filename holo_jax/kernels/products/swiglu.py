"""The gated denoiser ``W3 (silu(W1 x) * W2 x)``: in plain products, or with its activation inside them.

On Hopper the kernels of jax-linear-attention form ``silu(gate) * up`` in the epilogue of the first product
and its gradient in the epilogue of the product that goes back, from float32 accumulators: no pass over the
hidden width remains between them. Plain products round gate, up and hidden gradient to the storage dtype.

Source: https://github.com/jla-org/jax-linear-attention (Apache-2.0), version 0.1.0.
"""

import math

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Float
from holo_jax.functional.gradient_once import gradient_once
from holo_jax.kernels.block import uses
from holo_jax.kernels.capability import partitioned
from holo_jax.kernels.hopper import backend as hopper

_ROWS, _DEPTH, _COLUMNS = 128, 64, 256


def unsupported(x: Array, up: Array) -> str | None:
    """Why the kernels cannot run this call, or None."""
    reason = hopper.missing()
    if reason is not None:
        return reason
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x has dtype {x.dtype}; it must be bfloat16 or float16"
    rows, (depth, columns) = math.prod(x.shape[:-1]), up.shape
    if rows % _ROWS or depth % _DEPTH or columns % _COLUMNS:
        return (
            f"x has {rows} rows of {depth} and the hidden width is {columns}; they must be multiples of"
            f" {_ROWS}, {_DEPTH} and {_COLUMNS}"
        )
    if partitioned():
        return "the computation spans several devices; call it inside jax.shard_map"
    return None


def swiglu_runs(x: Array, up: Array, backend: str) -> bool:
    """Whether the kernels compute this call."""
    return uses(backend, "products") and unsupported(x, up) is None


def swiglu(
    x: Float[Array, "b t e"],
    gate: Float[Array, "e f"],
    up: Float[Array, "e f"],
    down: Float[Array, "f e"],
    *,
    backend: str = "auto",
) -> Float[Array, "b t e"]:
    """``(silu(x gate) * (x up)) down`` with operands in the dtype of x and float32 accumulators.

    Args:
      x: input in the storage dtype.
      gate, up, down: weights, float32 masters.
      backend: ``"portable"``, or another ``block_backend`` for the kernels where they can run.
    """
    if swiglu_runs(x, up, backend):
        from jla.ops.mosaic_gpu.fused_gemm import swiglu_mlp

        return swiglu_mlp(x, jnp.stack([gate, up], axis=1), down, compute_dtype=x.dtype)
    gated, hidden = (_product(x, weight) for weight in (gate, up))
    return _product(jax.nn.silu(gated) * hidden, down)


def _product(x: Array, weight: Array) -> Array:
    product = jnp.einsum("bti,io->bto", x, weight.astype(x.dtype), preferred_element_type=x.dtype)
    return gradient_once(product)
