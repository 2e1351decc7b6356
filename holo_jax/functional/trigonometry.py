"""Sine and cosine together, cheaply: most of the arithmetic of a phasor memory is this one function.

The library functions reduce any argument exactly and compute sine and cosine apart; that costs more than all
the products of a memory around them. A phase is an angle of moderate size, of which both are wanted.
"""

import math

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Float

MAX_PHASE = 100_000.0


def _leading(x: float, unit: float) -> float:
    return math.floor(x / unit) * unit


# pi/2 in three parts; the products of the first two with a quadrant number need few bits, so they are exact.
_PART_1 = _leading(math.pi / 2, 2.0**-7)
_PART_2 = _leading(math.pi / 2 - _PART_1, 2.0**-19)
_PART_3 = math.pi / 2 - _PART_1 - _PART_2


def _series(square: Array, first: int, last: int) -> Array:
    """``sum (-1)^j square^j / (2 j + first)!`` up to the term ``1 / last!``, by Horner's rule."""
    total = jnp.full_like(square, 1.0 / math.factorial(last))
    for n in range(last - 2, first - 1, -2):
        total = 1.0 / math.factorial(n) - square * total
    return total


@jax.custom_jvp
def sincos(phases: Float[Array, "*s"]) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """``(sin, cos)`` of an angle in radians.

    float32: reduction to ``[-pi/4, pi/4]`` by a three-part pi/2 (Cody and Waite), then Taylor polynomials.
    The error is below 1e-7 up to ``MAX_PHASE``, where neighbouring float32 angles are 0.008 rad apart.
    Beyond it, and for infinite or NaN angles, both results are NaN rather than noise.

    Other dtypes use the library functions.
    """
    if phases.dtype != jnp.float32:
        return jnp.sin(phases), jnp.cos(phases)
    phases = jnp.where(jnp.abs(phases) <= MAX_PHASE, phases, jnp.nan)
    turn = jnp.round(phases * (2.0 / math.pi))
    rest = ((phases - turn * _PART_1) - turn * _PART_2) - turn * _PART_3
    square = rest * rest
    sin = rest * _series(square, 1, 9)
    cos = _series(square, 0, 10)
    quadrant = jnp.where(jnp.isnan(turn), 0.0, turn).astype(jnp.int32)
    swap = (quadrant & 1) == 1
    sin, cos = jnp.where(swap, cos, sin), jnp.where(swap, sin, cos)
    return jnp.where((quadrant & 2) == 2, -sin, sin), jnp.where(((quadrant + 1) & 2) == 2, -cos, cos)


@sincos.defjvp
def _sincos_jvp(primals, tangents):
    sin, cos = sincos(primals[0])
    return (sin, cos), (cos * tangents[0], -sin * tangents[0])
