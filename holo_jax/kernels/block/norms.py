"""Norms of the residual stream, and the products that read them."""

from typing import Any

from holo_jax.array_types import Array, Float
from holo_jax.kernels.block import triton_norm
from holo_jax.kernels.block.matrices import apart, back, like, of_weight, products
from holo_jax.kernels.block.support import interpreted, op
from holo_jax.kernels.block.triton_norm import Norm


def normed(
    x: Float[Array, "b t e"], scale: Float[Array, "e"], bias: Float[Array, "e"] | None, *, eps: float
) -> Float[Array, "b t e"]:
    """The norm of the rows of x: RMSNorm, or LayerNorm with a bias."""
    norm = Norm(eps, bias is not None, interpreted())
    return _normed(norm, x.reshape(-1, x.shape[-1]), scale, bias).reshape(x.shape)


def _normed_run(norm: Norm, x: Array, scale: Array, bias: Array | None) -> Array:
    return triton_norm.forward(norm, x, None, scale, bias)[1]


def _normed_forward(norm: Norm, x: Array, scale: Array, bias: Array | None) -> tuple[Array, Any]:
    return _normed_run(norm, x, scale, bias), (x, scale, bias)


def _normed_backward(norm: Norm, saved: Any, cotangent: Array) -> Any:
    x, scale, bias = saved
    found = triton_norm.backward(norm, x, None, (cotangent,), scale, bias, again=False)
    return found.total, *like((found.scale, found.bias), (scale, bias))


_normed = op(_normed_run)
_normed.defvjp(_normed_forward, _normed_backward)


def normed_products(
    x: Float[Array, "b t e"],
    delta: Float[Array, "b t e"] | None,
    offset: Float[Array, "e"] | None,
    scale: Float[Array, "e"],
    bias: Float[Array, "e"] | None,
    weights: tuple[Float[Array, "e o"], ...],
    *,
    dtypes: tuple[Any, ...],
    eps: float,
) -> tuple[Float[Array, "b t e"], tuple[Float[Array, "b t o"], ...]]:
    """``x + (delta + offset)``, and products of its norm with several weights.

    Args:
      x: the residual stream in the storage dtype.
      delta: what a branch adds to it, or None.
      offset: the bias of that branch, rounded to the dtype of x, or None. Its gradient, a sum over tokens, is
        taken where the gradients of ``scale`` and ``bias`` are.
      scale, bias: of RMSNorm, or with a bias of LayerNorm; float32.
      weights: float32 masters; operands of the products have the dtype of x.
      dtypes: of the products.
      eps: of the norm.
    """
    lead = x.shape[:-1]
    norm = Norm(eps, bias is not None, interpreted())
    rows = [None if a is None else a.reshape(-1, a.shape[-1]) for a in (x, delta)]
    total, products = _normed_products((norm, dtypes), *rows, offset, scale, bias, weights)
    return total.reshape(x.shape), tuple(y.reshape(*lead, -1) for y in products)


def _normed_products_run(
    static: Any, x: Any, delta: Any, offset: Any, scale: Any, bias: Any, weights: Any
) -> Any:
    norm, dtypes = static
    total, rows = triton_norm.forward(norm, x, delta, scale, bias, offset)
    return total, products(rows, weights, dtypes)


def _normed_products_forward(
    static: Any, x: Any, delta: Any, offset: Any, scale: Any, bias: Any, weights: Any
) -> Any:
    total, products = _normed_products_run(static, x, delta, offset, scale, bias, weights)
    return (total, products), (total, delta is None, offset, scale, bias, weights)


def _normed_products_backward(static: Any, saved: Any, cotangents: Any) -> Any:
    norm, _ = static
    total, alone, offset, scale, bias, weights = saved
    d_total, d_products = cotangents
    d_products = [d.astype(total.dtype) for d in d_products]
    parts = tuple(back(d, w, total.dtype) for d, w in zip(d_products, weights, strict=True))
    found = triton_norm.backward(
        norm, total, d_total, parts, scale, bias, again=True, offset=offset is not None
    )
    assert found.normed is not None
    d_weights = tuple(of_weight(*apart(found.normed, d), w) for d, w in zip(d_products, weights, strict=True))
    d_vectors = like((found.offset, found.scale, found.bias), (offset, scale, bias))
    return found.total, None if alone else found.total, *d_vectors, d_weights


_normed_products = op(_normed_products_run)
_normed_products.defvjp(_normed_products_forward, _normed_products_backward)
