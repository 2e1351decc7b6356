"""The parts of a block around its products and its memory, each as one pass over memory each way.

Products themselves are left to the compiler. What lies between them is here: residual sum and norm, the
norm and gate after a retrieval, phases. Each function carries its own gradient, and the input of a product,
which the gradient of its weight needs, is made again by the kernel that passes over the same rows: it is
neither kept nor made by a pass of its own.

Every function works on NVIDIA GPUs from Ampere on and in Pallas' interpreter elsewhere; ``unsupported`` says
where it does not.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from holo_jax.array_types import Array, Float, Int
from holo_jax.kernels import triton, triton_gated_norm, triton_gelu, triton_norm, triton_phases, triton_writes
from holo_jax.kernels.call import SCALED_NAME
from holo_jax.kernels.capability import compute_capability, partitioned
from holo_jax.kernels.triton_norm import Norm
from holo_jax.kernels.triton_phases import Walk

# What each value of ``block_backend`` may use. "products" are denoiser and loss by jax-linear-attention.
_USES = {
    "portable": (),
    "auto": ("products", "norms", "mixer"),
    "products": ("products",),
    "norms": ("products", "norms"),
    "mixer": ("products", "mixer"),
}
_TOKENS = 64
_WIDTHS = (128, 256, 512, 1024, 2048, 4096)
_HEADS = (16, 32, 64, 128)


def uses(backend: str, kind: str) -> bool:
    """Whether a backend may use kernels of a kind: ``products``, ``norms`` or ``mixer``."""
    return kind in _USES[backend]


def unsupported(x: Array) -> str | None:
    """Why rows ``[b, t, e]`` cannot be normed by these kernels, or None."""
    reason = _unsupported_here(x)
    if reason is None and x.shape[-1] not in _WIDTHS:
        reason = f"the width is {x.shape[-1]}; it must be one of {', '.join(map(str, _WIDTHS))}"
    return reason


def mixer_unsupported(x: Array, m: int, d: int) -> str | None:
    """Why a mixer with heads of m phasors and d channels cannot use these kernels, or None."""
    reason = _unsupported_here(x)
    for name, width in (("m", m), ("d", d)):
        if reason is None and width not in _HEADS:
            reason = f"{name} is {width}; it must be one of {', '.join(map(str, _HEADS))}"
    return reason


def _unsupported_here(x: Array) -> str | None:
    reason = triton.missing()
    if reason is not None:
        return reason
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"x has dtype {x.dtype}; it must be bfloat16, float16 or float32"
    if x.shape[0] * x.shape[1] % _TOKENS:
        return f"x has {x.shape[0] * x.shape[1]} rows; they must be a multiple of {_TOKENS}"
    if partitioned():
        return "the computation spans several devices; call it inside jax.shard_map"
    return None


def _interpreted() -> bool:
    return compute_capability() is None


def _op(run: Any) -> Any:
    """``run`` with a gradient of its own, whose forward rule has to call ``run`` itself.

    Inside of another such call kernels and products would be hidden from a rematerialisation policy.
    """
    return jax.custom_vjp(run, nondiff_argnums=(0,))


def _product(x: Array, weight: Array, dtype: Any) -> Array:
    """``[n, i] @ [i, o]``, operands in the dtype of x."""
    return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=dtype)


def _back(cotangent: Array, weight: Array, dtype: Any) -> Array:
    """The gradient of the input of a product, ``[n, o] @ [i, o]^T``."""
    axes = (((1,), (1,)), ((), ()))
    operands = cotangent.astype(dtype), weight.astype(dtype)
    return jax.lax.dot_general(*operands, axes, preferred_element_type=dtype)


def _of_weight(x: Array, cotangent: Array, weight: Array) -> Array:
    """The gradient of a weight, ``[n, i]^T @ [n, o]``, in the dtype of the weight."""
    axes = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(x, cotangent.astype(x.dtype), axes, preferred_element_type=weight.dtype)


def _apart(x: Array, cotangent: Array) -> tuple[Array, Array]:
    """Operands of a product of its own: the compiler would join those that share one, and copy the others."""
    return jax.lax.optimization_barrier((x, cotangent))


def _products(x: Array, weights: Any, dtypes: Any) -> tuple[Array, ...]:
    """Products of x, each of its own as in ``_apart``; weights stay where the compiler can slice them."""
    found = []
    for weight, dtype in zip(weights, dtypes, strict=True):
        found.append(_product(x, weight, dtype))
        x = jax.lax.optimization_barrier(x)
    return tuple(found)


def normed(
    x: Float[Array, "b t e"], scale: Float[Array, "e"], bias: Float[Array, "e"] | None, *, eps: float
) -> Float[Array, "b t e"]:
    """The norm of the rows of x: RMSNorm, or LayerNorm with a bias."""
    norm = Norm(eps, bias is not None, _interpreted())
    return _normed(norm, x.reshape(-1, x.shape[-1]), scale, bias).reshape(x.shape)


def _normed_run(norm: Norm, x: Array, scale: Array, bias: Array | None) -> Array:
    return triton_norm.forward(norm, x, None, scale, bias)[1]


def _normed_forward(norm: Norm, x: Array, scale: Array, bias: Array | None) -> tuple[Array, Any]:
    return _normed_run(norm, x, scale, bias), (x, scale, bias)


def _normed_backward(norm: Norm, saved: Any, cotangent: Array) -> Any:
    x, scale, bias = saved
    d_x, _, *rest = triton_norm.backward(norm, x, None, (cotangent,), scale, bias, again=False)
    return d_x, *_like(rest, (scale, bias))


_normed = _op(_normed_run)
_normed.defvjp(_normed_forward, _normed_backward)


def _like(gradients: Any, arrays: Any) -> Any:
    return jax.tree.map(lambda g, x: g.astype(x.dtype), tuple(gradients), tuple(arrays))


def normed_products(
    x: Float[Array, "b t e"],
    delta: Float[Array, "b t e"] | None,
    scale: Float[Array, "e"],
    bias: Float[Array, "e"] | None,
    weights: tuple[Float[Array, "e o"], ...],
    *,
    dtypes: tuple[Any, ...],
    eps: float,
) -> tuple[Float[Array, "b t e"], tuple[Float[Array, "b t o"], ...]]:
    """``x + delta``, and products of its norm with several weights.

    Args:
      x: the residual stream in the storage dtype.
      delta: what a branch adds to it, or None.
      scale, bias: of RMSNorm, or with a bias of LayerNorm; float32.
      weights: float32 masters; operands of the products have the dtype of x.
      dtypes: of the products.
      eps: of the norm.
    """
    lead = x.shape[:-1]
    norm = Norm(eps, bias is not None, _interpreted())
    rows = [None if a is None else a.reshape(-1, a.shape[-1]) for a in (x, delta)]
    total, products = _normed_products((norm, dtypes), *rows, scale, bias, weights)
    return total.reshape(x.shape), tuple(y.reshape(*lead, -1) for y in products)


def _normed_products_run(static: Any, x: Any, delta: Any, scale: Any, bias: Any, weights: Any) -> Any:
    norm, dtypes = static
    total, rows = triton_norm.forward(norm, x, delta, scale, bias)
    return total, _products(rows, weights, dtypes)


def _normed_products_forward(static: Any, x: Any, delta: Any, scale: Any, bias: Any, weights: Any) -> Any:
    total, products = _normed_products_run(static, x, delta, scale, bias, weights)
    return (total, products), (total, delta is None, scale, bias, weights)


def _normed_products_backward(static: Any, saved: Any, cotangents: Any) -> Any:
    norm, _ = static
    total, alone, scale, bias, weights = saved
    d_total, d_products = cotangents
    d_products = [d.astype(total.dtype) for d in d_products]
    parts = tuple(_back(d, w, total.dtype) for d, w in zip(d_products, weights, strict=True))
    d_x, rows, *rest = triton_norm.backward(norm, total, d_total, parts, scale, bias, again=True)
    assert rows is not None
    d_weights = tuple(_of_weight(*_apart(rows, d), w) for d, w in zip(d_products, weights, strict=True))
    return d_x, None if alone else d_x, *_like(rest, (scale, bias)), d_weights


_normed_products = _op(_normed_products_run)
_normed_products.defvjp(_normed_products_forward, _normed_products_backward)


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
    norm = Norm(eps, bias is not None, _interpreted())
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
    y = _product(hidden, down, x.dtype)
    return (total, y), (total, hidden, inputs, scale, bias, gate, up, down)


def _normed_swiglu_backward(norm: Any, saved: Any, cotangents: Any) -> Any:
    from jla.ops.mosaic_gpu import fused_gemm

    total, hidden, inputs, scale, bias, gate, up, down = saved
    d_total, d_y = cotangents
    narrow = down.astype(total.dtype)
    d_inputs = fused_gemm.swiglu_down_dgrad(d_y, narrow, inputs, cfg=fused_gemm.BWD_CONFIG)
    part = _back(d_inputs, _joined(gate, up, total.dtype), total.dtype)
    d_x, rows, *rest = triton_norm.backward(norm, total, d_total, (part,), scale, bias, again=True)
    assert rows is not None
    d_gate, d_up = jnp.moveaxis(fused_gemm.deinterleave(_of_weight(rows, d_inputs, gate)), -2, 0)
    return d_x, d_x, *_like(rest, (scale, bias)), d_gate, d_up, _of_weight(hidden, d_y, down)


_normed_swiglu = _op(_normed_swiglu_run)
_normed_swiglu.defvjp(_normed_swiglu_forward, _normed_swiglu_backward)


def gated_product(
    values: Float[Array, "b t h d"],
    factors: Float[Array, "b t h"] | None,
    gate: Float[Array, "b t f"],
    weight: Float[Array, "h d"],
    out: Float[Array, "f e"],
    *,
    eps: float,
) -> Float[Array, "b t e"]:
    """``(silu(gate) * RMSNorm(values * factors) * weight) out``, with the norm a head in float32.

    Args:
      values: retrievals in the storage dtype.
      factors: float32, what they are multiplied by first; None is 1.
      gate: in the storage dtype, ``f = h d``.
      weight: of the norm, float32.
      out: the output map, float32 master.
      eps: of the norm.
    """
    b, t, h, d = values.shape
    inputs = {"values": values.reshape(b * t, h * d), "gate": gate.reshape(b * t, h * d), "weight": weight}
    if factors is not None:
        inputs["factors"] = factors.reshape(b * t, h)
    return _gated_product(Norm(eps, False, _interpreted()), inputs, out).reshape(b, t, -1)


def _gated_product_run(norm: Norm, inputs: dict[str, Array], out: Array) -> Array:
    gated = triton_gated_norm.forward(norm, inputs)
    return _product(gated, out, gated.dtype)


def _gated_product_forward(norm: Norm, inputs: dict[str, Array], out: Array) -> tuple[Array, Any]:
    return _gated_product_run(norm, inputs, out), (inputs, out)


def _gated_product_backward(norm: Norm, saved: Any, cotangent: Array) -> Any:
    inputs, out = saved
    found = triton_gated_norm.backward(norm, inputs, _back(cotangent, out, cotangent.dtype))
    d_inputs = {name: found[f"d_{name}"].astype(x.dtype) for name, x in inputs.items()}
    return d_inputs, _of_weight(found["gated"], cotangent, out)


_gated_product = _op(_gated_product_run)
_gated_product.defvjp(_gated_product_forward, _gated_product_backward)


def scaled_heads(values: Float[Array, "b t h d"], factors: Float[Array, "b t h"]) -> Float[Array, "b t h d"]:
    """Values times one float32 factor a head, in the dtype of the values; one pass for both gradients.

    The result is named for rematerialisation policies (``SCALED_NAME``) and is all that going back needs: the
    gradient of a factor is ``sum(d_result * result) / factor``, and 0 where the factor is. So a block keeps
    the result in place of the values, and makes neither again.
    """
    return _scaled_heads(_interpreted(), values, factors)


def _scaled_heads_run(interpret: bool, values: Array, factors: Array) -> Array:
    del interpret
    scaled = (values.astype(jnp.float32) * factors[..., None]).astype(values.dtype)
    return checkpoint_name(scaled, SCALED_NAME)


def _scaled_heads_forward(interpret: bool, values: Array, factors: Array) -> tuple[Array, Any]:
    scaled = _scaled_heads_run(interpret, values, factors)
    return scaled, (scaled, factors)


def _scaled_heads_backward(interpret: bool, saved: Any, cotangent: Array) -> Any:
    scaled, factors = saved
    tokens = factors.shape[0] * factors.shape[1]
    wide = (x.reshape(tokens, -1) for x in (scaled, factors, cotangent))
    d_values, d_factors = triton_gated_norm.scale_backward(*wide, interpret=interpret)
    return d_values.reshape(scaled.shape), d_factors.reshape(factors.shape)


_scaled_heads = _op(_scaled_heads_run)
_scaled_heads.defvjp(_scaled_heads_forward, _scaled_heads_backward)


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
    static = Norm(eps, bias is not None, _interpreted()), keep
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
    inputs = _product(rows, up, x.dtype)
    hidden = triton_gelu.forward(inputs, up_bias, interpret=norm.interpret)
    saved = (total, inputs, hidden if keep else None, delta is None, scale, bias, up, up_bias, down)
    return (total, _product(hidden, down, x.dtype)), saved


def _normed_gelu_backward(static: Any, saved: Any, cotangents: Any) -> Any:
    norm, keep = static
    total, inputs, hidden, alone, scale, bias, up, up_bias, down = saved
    d_total, d_y = cotangents
    d_hidden = _back(d_y, down, total.dtype)
    d_inputs, made, d_up_bias = triton_gelu.backward(
        inputs, up_bias, d_hidden, again=not keep, interpret=norm.interpret
    )
    hidden = hidden if keep else made
    part = _back(d_inputs, up, total.dtype)
    d_x, rows, *rest = triton_norm.backward(norm, total, d_total, (part,), scale, bias, again=True)
    assert rows is not None and hidden is not None
    d_down = _of_weight(hidden, d_y, down)
    d_up = _of_weight(rows, d_inputs, up)
    d_up_bias = d_up_bias.astype(up_bias.dtype)
    return d_x, None if alone else d_x, *_like(rest, (scale, bias)), d_up, d_up_bias, d_down


_normed_gelu = _op(_normed_gelu_run)
_normed_gelu.defvjp(_normed_gelu_forward, _normed_gelu_backward)


def convolved_features(
    raw: Float[Array, "b t w"],
    taps: Float[Array, "2 k f"],
    bias: Float[Array, "g h"],
    inside: Int[Array, "b t"] | None,
    *,
    m: int,
    dtype: Any,
    gated: bool = False,
    walk: Walk | None = None,
) -> tuple[Float[Array, "b t h c"], Float[Array, "b t h c"], tuple[Float[Array, "b h t"], ...]]:
    """Features of keys and queries, and gates, from one product of the input.

    Features are ``[cos, sin] / sqrt(m)`` of two causal convolutions of the raw phases, ``c = 2 m``; gates are
    sigmoids of the columns behind the phases. ``gated`` multiplies the features of a key by its first gate,
    which then is rounded together with them.

    Args:
      raw: float32 raw phases, then g raw gates a head, those of one kind side by side: ``w = f + g h``, or
        more, and columns behind those are ignored.
      taps: float32 of the write and of the read convolution.
      bias: float32, added to the raw gates.
      inside: positions inside segments, ``[b or 1, t]``; None where every row is one segment.
      m: phasors of a head.
      dtype: of the features; the gradient of ``raw`` is rounded to it. Gates are float32.
      gated: whether the first gate is folded into the keys.
      walk: shape of a program; chosen if None.
    """
    b, t, _ = raw.shape
    if walk is None:
        # The interpreter compiles every position of a run on its own.
        walk = Walk(m, taps.shape[1], rows=max(1, 256 // m))
        walk = walk._replace(rows=2, steps=3, ahead=2, interpret=True) if _interpreted() else walk
    static = walk._replace(gated=gated), jnp.dtype(dtype)
    *found, gates = _convolved_features(static, raw, taps, bias, inside)
    keys, queries = (x.reshape(b, t, -1, 2 * m) for x in found)
    return keys, queries, gates


def _convolved_features_run(
    static: Any, raw: Array, taps: Array, bias: Array, inside: Array | None
) -> tuple[Array, Array, tuple[Array, ...]]:
    walk, dtype = static
    return triton_phases.forward(walk, raw, taps, bias, inside, dtype)


def _convolved_features_forward(
    static: Any, raw: Array, taps: Array, bias: Array, inside: Array | None
) -> Any:
    return _convolved_features_run(static, raw, taps, bias, inside), (raw, taps, bias, inside)


def _convolved_features_backward(static: Any, saved: Any, cotangents: Any) -> Any:
    raw, taps, bias, inside = saved
    d_raw, d_taps, d_bias = triton_phases.backward(static[0], raw, taps, bias, inside, *cotangents)
    return d_raw.astype(raw.dtype), d_taps, d_bias, None


_convolved_features = _op(_convolved_features_run)
_convolved_features.defvjp(_convolved_features_forward, _convolved_features_backward)


def write_factors(
    gates: Float[Array, "b h t"], inside: Int[Array, "b t"] | None, *, eps: float = 1e-6
) -> Float[Array, "b t h"]:
    """``1 / retrieval_scale("sqrt_writes", gates)``, by one small kernel each way.

    Args:
      gates: float32 write gates.
      inside: positions inside segments, ``[b or 1, t]``; None where every row is one segment.
      eps: added under the root.
    """
    return _write_factors((eps, _interpreted()), gates, inside)


def _write_factors_run(static: Any, gates: Array, inside: Array | None) -> Array:
    eps, interpret = static
    return triton_writes.forward(gates, inside, eps=eps, interpret=interpret)


def _write_factors_forward(static: Any, gates: Array, inside: Array | None) -> tuple[Array, Any]:
    factors = _write_factors_run(static, gates, inside)
    return factors, (gates, factors, inside)


def _write_factors_backward(static: Any, saved: Any, cotangent: Array) -> Any:
    gates, factors, inside = saved
    return triton_writes.backward(gates, factors, inside, cotangent, interpret=static[1]), None


_write_factors = _op(_write_factors_run)
_write_factors.defvjp(_write_factors_forward, _write_factors_backward)
