"""Real features of phasor keys, cheap enough to fuse: one range reduction and two short polynomials.

A general ``sin`` and ``cos`` each carry a branch for huge arguments and a range reduction of their own, which
costs more on a GPU than reading the phases. Here ``phase = 2 pi n + r`` once, then with y = r / 2 in
[-pi/2, pi/2]

    s = sin y = y P(y^2),   c = cos y = Q(y^2),   sin r = 2 s c,   cos r = 1 - 2 s^2,

with minimax polynomials P and Q of degree 4 (errors 3.4e-9 and 4.7e-8).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from holo_jax.array_types import Array, Float
from holo_jax.precision import assert_wide

# 2 pi = HIGH + LOW; HIGH has 8 significant bits, so n * HIGH is exact for |n| < 2^16.
HIGH = 6.28125
LOW = 2.0 * math.pi - HIGH
_SIN = (9.99999976e-01, -1.66666476e-01, 8.33289854e-03, -1.98008185e-04, 2.59032786e-06)
_COS = (9.99999953e-01, -4.99999050e-01, 4.16635756e-02, -1.38536354e-03, 2.31523349e-05)


def _polynomial(coefficients: tuple[float, ...], z: Array) -> Array:
    value = jnp.full_like(z, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * z + coefficient
    return value


def sin_cos(phases: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """``(sin, cos)`` of float32 phases, within 7e-7 for |phase| up to 1e4 radians.

    The error grows to that from rounding in the reduction; float32 phases of that size are themselves only
    known to 5e-4.

    Raises:
      TypeError: unless the phases are float32.
    """
    if phases.dtype != jnp.float32:
        raise TypeError(f"phases has dtype {phases.dtype}; it must be float32")
    return sin_cos_reduced(phases, jnp.round(phases * (1.0 / (2.0 * math.pi))))


def sin_cos_reduced(phases: Array, turns: Array) -> tuple[Array, Array]:
    """``(sin, cos)`` of float32 phases given the whole number of turns nearest to each."""
    half = 0.5 * ((phases - turns * HIGH) - turns * LOW)
    z = half * half
    sine = half * _polynomial(_SIN, z)
    cosine = _polynomial(_COS, z)
    return 2.0 * sine * cosine, 1.0 - 2.0 * sine * sine


def _features(phases: Array, dtype: DTypeLike) -> Array:
    # One elementwise expression: a concatenation would keep compilers from fusing what made the phases.
    *lead, m = phases.shape
    sine, cosine = sin_cos(jnp.broadcast_to(phases[..., None, :], (*lead, 2, m)))
    first = lax.broadcasted_iota(jnp.int32, sine.shape, len(lead)) == 0
    return (jnp.where(first, cosine, sine) * (1.0 / math.sqrt(m))).astype(dtype).reshape(*lead, 2 * m)


_custom = jax.custom_vjp(_features, nondiff_argnums=(1,))


def _features_fwd(phases: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    return _features(phases, dtype), phases


def _features_bwd(dtype: DTypeLike, phases: Array, cotangent: Array) -> tuple[Array]:
    # sin and cos are recomputed: cheaper than keeping two float32 arrays for the backward pass.
    sine, cosine = sin_cos(phases)
    d_cosine, d_sine = jnp.split(cotangent.astype(jnp.float32), 2, axis=-1)
    return ((cosine * d_sine - sine * d_cosine) / math.sqrt(phases.shape[-1]),)


_custom.defvjp(_features_fwd, _features_bwd)


def phasor_features(phases: Float[Array, "... m"], dtype: DTypeLike) -> Float[Array, "... k"]:
    """``[cos, sin] / sqrt(m)`` in ``dtype``: the unit-norm real features of the keys, ``[..., 2 m]``.

    Values and gradients are computed in float32 and rounded once; the gradient is float32.

    Raises:
      TypeError: unless the phases are float32.
    """
    assert_wide(phases=phases)
    return _custom(phases, jnp.dtype(dtype))
