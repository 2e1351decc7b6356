"""What stands around the memory: features of raw phases, factors of values, norm and gate of a retrieval."""

from typing import Any

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from holo_jax.array_types import Array, Float, Int
from holo_jax.kernels.block import triton_gated_norm, triton_phases, triton_writes
from holo_jax.kernels.block.matrices import back, of_weight, product
from holo_jax.kernels.block.support import interpreted, op
from holo_jax.kernels.block.triton_norm import Norm
from holo_jax.kernels.block.triton_phases import Walk
from holo_jax.kernels.call import SCALED_NAME


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
        walk = walk._replace(rows=2, steps=3, ahead=2, interpret=True) if interpreted() else walk
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


_convolved_features = op(_convolved_features_run)
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
    return _write_factors((eps, interpreted()), gates, inside)


def _write_factors_run(static: Any, gates: Array, inside: Array | None) -> Array:
    eps, interpret = static
    return triton_writes.forward(gates, inside, eps=eps, interpret=interpret)


def _write_factors_forward(static: Any, gates: Array, inside: Array | None) -> tuple[Array, Any]:
    factors = _write_factors_run(static, gates, inside)
    return factors, (gates, factors, inside)


def _write_factors_backward(static: Any, saved: Any, cotangent: Array) -> Any:
    gates, factors, inside = saved
    return triton_writes.backward(gates, factors, inside, cotangent, interpret=static[1]), None


_write_factors = op(_write_factors_run)
_write_factors.defvjp(_write_factors_forward, _write_factors_backward)


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
    return _gated_product(Norm(eps, False, interpreted()), inputs, out).reshape(b, t, -1)


def _gated_product_run(norm: Norm, inputs: dict[str, Array], out: Array) -> Array:
    gated = triton_gated_norm.forward(norm, inputs)
    return product(gated, out, gated.dtype)


def _gated_product_forward(norm: Norm, inputs: dict[str, Array], out: Array) -> tuple[Array, Any]:
    return _gated_product_run(norm, inputs, out), (inputs, out)


def _gated_product_backward(norm: Norm, saved: Any, cotangent: Array) -> Any:
    inputs, out = saved
    found = triton_gated_norm.backward(norm, inputs, back(cotangent, out, cotangent.dtype))
    d_inputs = {name: found[f"d_{name}"].astype(x.dtype) for name, x in inputs.items()}
    return d_inputs, of_weight(found["gated"], cotangent, out)


_gated_product = op(_gated_product_run)
_gated_product.defvjp(_gated_product_forward, _gated_product_backward)


def scaled_heads(values: Float[Array, "b t h d"], factors: Float[Array, "b t h"]) -> Float[Array, "b t h d"]:
    """Values times one float32 factor a head, in the dtype of the values; one pass for both gradients.

    The result is named for rematerialisation policies (``SCALED_NAME``) and is all that going back needs: the
    gradient of a factor is ``sum(d_result * result) / factor``, and 0 where the factor is. So a block keeps
    the result in place of the values, and makes neither again.
    """
    return _scaled_heads(interpreted(), values, factors)


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


_scaled_heads = op(_scaled_heads_run)
_scaled_heads.defvjp(_scaled_heads_forward, _scaled_heads_backward)
