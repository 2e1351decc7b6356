"""Real features of phasor keys, and matrix products with stated operand and accumulator dtypes.

For real values and a real read-out the outer binding is linear attention with real features: with
``phi(a) = [cos a, sin a] / sqrt(m)``,

    Re(k_b^H k_a) = phi(b) . phi(a),      M = sum k v^T  <->  [Re M; Im M] = sum phi v^T,

so every product runs on real matrix units.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from holo_jax.array_types import Array, Complex, Float
from holo_jax.functional.trigonometry import sincos
from holo_jax.functional.varying import vary_together
from holo_jax.target import platform


def features(phases: Float[Array, "... m"]) -> Float[Array, "... k"]:
    """``[cos, sin] / sqrt(m)``, of unit norm; ``[..., m] -> [..., 2 m]``."""
    norm = math.sqrt(phases.shape[-1])
    sin, cos = sincos(phases)
    return jnp.concatenate([cos / norm, sin / norm], axis=-1)


def planes(memory: Complex[Array, "... m d"]) -> Float[Array, "... k d"]:
    """An outer memory as the real matrix ``[Re; Im]``; ``[..., m, d] -> [..., 2 m, d]``."""
    return jnp.concatenate([memory.real, memory.imag], axis=-2)


def from_planes(matrix: Float[Array, "... k d"]) -> Complex[Array, "... m d"]:
    """Inverse of ``planes``."""
    real, imag = jnp.split(matrix, 2, axis=-2)
    return lax.complex(real, imag)


def contract(spec: str, operands: DTypeLike, x: Array, y: Array) -> Array:
    """``einsum(spec, x, y)`` with operands of dtype ``operands`` and a float32 (or float64) accumulator.

    float32 operands are multiplied at full precision, not in TF32 or bfloat16 passes. The gradients are
    products of the same kind: without this rule, a float32 cotangent would pull a bfloat16 product up to
    float32 operands. Each index of ``spec`` must occur in at least two of its three terms.
    """
    x, y = vary_together((x, y))
    return _contract(spec, operands, x, y)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(spec: str, operands: DTypeLike, x: Array, y: Array) -> Array:
    accumulator = jnp.float64 if jnp.dtype(operands) == jnp.float64 else jnp.float32
    x, y = x.astype(operands), y.astype(operands)
    if platform() == "cpu":
        # XLA's CPU runtime lacks some bfloat16 products ("Unsupported element type for DotThunk"); the
        # product of two bfloat16 numbers is exact in float32, so this is the same function.
        x, y = x.astype(accumulator), y.astype(accumulator)
    return jnp.einsum(
        spec,
        x,
        y,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=accumulator,
    )


def _contract_fwd(spec: str, operands: DTypeLike, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return _contract(spec, operands, x, y), (x, y)


def _contract_bwd(
    spec: str, operands: DTypeLike, saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    x, y = saved
    terms, out = spec.split("->")
    left, right = terms.split(",")
    d_x = _contract(f"{out},{right}->{left}", operands, cotangent, y)
    d_y = _contract(f"{left},{out}->{right}", operands, x, cotangent)
    return d_x.astype(x.dtype), d_y.astype(y.dtype)


_contract.defvjp(_contract_fwd, _contract_bwd)
