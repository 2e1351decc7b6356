"""Denoisers of a normed stream: SwiGLU by jax-linear-attention, GELU by a kernel of our own."""

from typing import Any

import jax.numpy as jnp

from holo_jax.array_types import Array, Float
from holo_jax.kernels.block import triton_gelu, triton_norm
from holo_jax.kernels.block.matrices import back, like, of_weight, product
from holo_jax.kernels.block.support import interpreted, op
from holo_jax.kernels.block.triton_norm import Norm


def normed_swiglu(
    x: Float[Array, "b t e"],
    delta: Float[Array, "b t e"],
    scale: Float[Array, "e"],
    bias: Float[Array, "e"] | None,
    gate: Float[Array, "e f"],
    up: Float[Array, "e f"],
    down: Float[Array, "f e"],
    *,
    eps: float,
) -> tuple[Float[Array, "b t e"], Float[Array, "b t e"]]:
    """``x + delta``, and ``kernels.swiglu`` of its norm by the kernels of jax-linear-attention."""
    norm = Norm(eps, bias is not None, interpreted())
    rows = (a.reshape(-1, a.shape[-1]) for a in (x, delta))
    total, y = _normed_swiglu(norm, *rows, scale, bias, gate, up, down)
    return total.reshape(x.shape), y.reshape(x.shape)


def _joined(gate: Array, up: Array, dtype: Any) -> Array:
    from jla.ops.mosaic_gpu import fused_gemm

    return fused_gemm.interleave(jnp.stack([gate, up], axis=1).astype(dtype))


def _normed_swiglu_run(
    norm: Any, x: Any, delta: Any, scale: Any, bias: Any, gate: Any, up: Any, down: Any
) -> Any:
    return _normed_swiglu_forward(norm, x, delta, scale, bias, gate, up, down)[0]


def _normed_swiglu_forward(
    norm: Any, x: Any, delta: Any, scale: Any, bias: Any, gate: Any, up: Any, down: Any
) -> Any:
    from jla.ops.mosaic_gpu import fused_gemm

    total, rows = triton_norm.forward(norm, x, delta, scale, bias)
    joined = _joined(gate, up, x.dtype)
    hidden, inputs = fused_gemm.swiglu_gate_up(rows, joined, save_gu=True, cfg=fused_gemm.FWD_CONFIG)
    y = product(hidden, down, x.dtype)
    return (total, y), (total, hidden, inputs, scale, bias, gate, up, down)


def _normed_swiglu_backward(norm: Any, saved: Any, cotangents: Any) -> Any:
    from jla.ops.mosaic_gpu import fused_gemm

    total, hidden, inputs, scale, bias, gate, up, down = saved
    d_total, d_y = cotangents
    narrow = down.astype(total.dtype)
    d_inputs = fused_gemm.swiglu_down_dgrad(d_y, narrow, inputs, cfg=fused_gemm.BWD_CONFIG)
    part = back(d_inputs, _joined(gate, up, total.dtype), total.dtype)
    found = triton_norm.backward(norm, total, d_total, (part,), scale, bias, again=True)
    assert found.normed is not None
    d_gate, d_up = jnp.moveaxis(fused_gemm.deinterleave(of_weight(found.normed, d_inputs, gate)), -2, 0)
    d_scale, d_bias = like((found.scale, found.bias), (scale, bias))
    return found.total, found.total, d_scale, d_bias, d_gate, d_up, of_weight(hidden, d_y, down)


_normed_swiglu = op(_normed_swiglu_run)
_normed_swiglu.defvjp(_normed_swiglu_forward, _normed_swiglu_backward)


def normed_gelu(
    x: Float[Array, "b t e"],
    delta: Float[Array, "b t e"] | None,
    scale: Float[Array, "e"],
    bias: Float[Array, "e"] | None,
    up: Float[Array, "e f"],
    up_bias: Float[Array, "f"],
    down: Float[Array, "f e"],
    *,
    eps: float,
    keep: bool = False,
) -> tuple[Float[Array, "b t e"], Float[Array, "b t e"]]:
    """``x + delta``, and ``gelu(norm(x + delta) up + up_bias) down``.

    ``keep`` holds the activation for the backward pass, which writes it once more otherwise.
    """
    static = Norm(eps, bias is not None, interpreted()), keep
    rows = [None if a is None else a.reshape(-1, a.shape[-1]) for a in (x, delta)]
    total, y = _normed_gelu(static, *rows, scale, bias, up, up_bias, down)
    return total.reshape(x.shape), y.reshape(x.shape)


def _normed_gelu_run(static: Any, *arguments: Any) -> Any:
    return _normed_gelu_forward(static, *arguments)[0]


def _normed_gelu_forward(
    static: Any, x: Any, delta: Any, scale: Any, bias: Any, up: Any, up_bias: Any, down: Any
) -> Any:
    norm, keep = static
    total, rows = triton_norm.forward(norm, x, delta, scale, bias)
    inputs = product(rows, up, x.dtype)
    hidden = triton_gelu.forward(inputs, up_bias, interpret=norm.interpret)
    saved = (total, inputs, hidden if keep else None, delta is None, scale, bias, up, up_bias, down)
    return (total, product(hidden, down, x.dtype)), saved


def _normed_gelu_backward(static: Any, saved: Any, cotangents: Any) -> Any:
    norm, keep = static
    total, inputs, hidden, alone, scale, bias, up, up_bias, down = saved
    d_total, d_y = cotangents
    d_hidden = back(d_y, down, total.dtype)
    d_inputs, made, d_up_bias = triton_gelu.backward(
        inputs, up_bias, d_hidden, again=not keep, interpret=norm.interpret
    )
    hidden = hidden if keep else made
    part = back(d_inputs, up, total.dtype)
    found = triton_norm.backward(norm, total, d_total, (part,), scale, bias, again=True)
    assert found.normed is not None and hidden is not None
    d_down = of_weight(hidden, d_y, down)
    d_up = of_weight(found.normed, d_inputs, up)
    d_delta = None if alone else found.total
    d_vectors = like((found.scale, found.bias, d_up_bias), (scale, bias, up_bias))
    return found.total, d_delta, *d_vectors[:2], d_up, d_vectors[2], d_down


_normed_gelu = op(_normed_gelu_run)
_normed_gelu.defvjp(_normed_gelu_forward, _normed_gelu_backward)
