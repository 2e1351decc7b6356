"""Phasor frequencies as exact integers, and the phases they have at a position.

A frequency is a ``uint32`` number of *turns*: ``n`` stands for ``n / 2**32`` of a full circle per
position. Unsigned products wrap at 2^32, which is exactly the reduction modulo one turn, so the phase at
position ``t`` is ``t * n mod 2**32`` without any rounding, for every ``t`` up to 2^32 - 1. Only the last
step, reading that integer as radians in float32, rounds (3e-7 rad at most). The naive float32 ``t * omega``
with ``omega`` of order 10 is off by 0.1 rad at t = 1e5 and by whole radians at 1e6.
"""

import math

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Complex, Float, UInt32
from holo_jax.functional.trigonometry import sincos
from holo_jax.precision import assert_dtype

_BITS = 32
_RADIANS_PER_UNIT = 2.0 * math.pi / 2.0**_BITS


def _normal_turns(key: Array, std: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Angles drawn from N(0, std^2) radians, as turns; one angle per entry of ``std``."""
    coarse_key, fine_key = jax.random.split(key)
    turns = jax.random.normal(coarse_key, std.shape, jnp.float32) * std / (2.0 * math.pi)
    # Exact in float32: both operands are close, or the second is zero.
    fraction = turns - jnp.round(turns)
    fraction = jnp.where(fraction >= 0.5, fraction - 1.0, fraction)
    coarse = (fraction * 2.0**_BITS).astype(jnp.int32)
    # A float32 has 24 bits, so the low bits of `coarse` are zero and the frequency would have a short
    # period. They are drawn too, uniformly over one rounding step of the normal variate.
    step = jnp.abs(turns) * 2.0 ** (_BITS - 23)
    fine = jax.random.uniform(fine_key, std.shape, jnp.float32) * step
    # `fine` can exceed int32 only for angles beyond 2^22 turns, which are uniform on the circle anyway.
    return coarse.astype(jnp.uint32) + jnp.minimum(fine, 2.0**31 - 128).astype(jnp.uint32)


def generate_random_phasors(
    key: Array, shape: tuple[int, ...], *, distribution: str = "uniform", std: float = 10.0
) -> UInt32[Array, "..."]:
    """Draws random frequencies, in turns per position.

    Args:
      key: a ``jax.random`` key.
      shape: shape of the result.
      distribution: ``"uniform"`` over the whole circle, or ``"normal"`` for N(0, std^2) radians per
        position wrapped to the circle.
      std: standard deviation in radians per position; read for ``"normal"`` only.

    Returns:
      uint32 turns: ``n`` advances the phase by ``2 pi n / 2**32`` radians per position.

    Raises:
      ValueError: for an unknown distribution, or a ``std`` that is not positive and finite.
    """
    if distribution == "uniform":
        return jax.random.bits(key, shape, jnp.uint32)
    if distribution == "normal":
        if not (std > 0.0 and math.isfinite(std)):
            raise ValueError(f"std is {std!r}; it must be positive and finite (radians per position)")
        return _normal_turns(key, jnp.full(shape, std, jnp.float32))
    raise ValueError(f"distribution is {distribution!r}; it must be 'uniform' or 'normal'")


def generate_multiscale_phasors(
    key: Array, heads: int, m: int, *, std_max: float = 10.0, std_min: float = 0.1
) -> UInt32[Array, "h m"]:
    """Draws normal frequencies whose standard deviation falls geometrically over the heads.

    Head ``j`` of ``h`` has standard deviation ``std_max * (std_min / std_max) ** (j / (h - 1))`` radians
    per position: the first heads tell neighbours apart, the last ones vary slowly along the sequence. A
    single head has ``std_max``.

    Returns:
      uint32 turns, ``[heads, m]``.

    Raises:
      ValueError: if ``heads`` or ``m`` is below 1, or unless ``0 < std_min <= std_max``.
    """
    for name, value in (("heads", heads), ("m", m)):
        if value < 1:
            raise ValueError(f"{name} is {value!r}; it must be at least 1")
    if not (0.0 < std_min <= std_max and math.isfinite(std_max)):
        raise ValueError(
            f"std_min is {std_min!r} and std_max {std_max!r}; they must be 0 < std_min <= std_max"
        )
    std = jnp.geomspace(std_max, std_min, heads, dtype=jnp.float32)
    return _normal_turns(key, jnp.broadcast_to(std[:, None], (heads, m)))


def phases_at(turns: UInt32[Array, "..."], positions: UInt32[Array, "b t"]) -> Float[Array, "b t ..."]:
    """Phase in radians of every frequency at every position.

    ``phase = 2 pi (t n mod 2**32) / 2**32``, taken in [-pi, pi).

    Args:
      turns: uint32 frequencies, any shape.
      positions: uint32 positions ``[b, t]``; every value up to 2^32 - 1 is exact.

    Returns:
      float32 radians ``[b, t, *turns.shape]``, within 3e-7 of the exact angle.

    Raises:
      TypeError: if either argument is not uint32 (a signed or float product would not wrap exactly).
    """
    assert_dtype(turns, jnp.uint32, "turns")
    assert_dtype(positions, jnp.uint32, "positions")
    wrapped = positions.reshape(positions.shape + (1,) * turns.ndim) * turns.reshape((1, 1, *turns.shape))
    signed = jax.lax.bitcast_convert_type(wrapped, jnp.int32)
    return signed.astype(jnp.float32) * jnp.float32(_RADIANS_PER_UNIT)


def rotors(turns: UInt32[Array, "..."], positions: UInt32[Array, "b t"]) -> Complex[Array, "b t ..."]:
    """Unit phasors ``e^{i phase(t)}`` as complex64 ``[b, t, *turns.shape]``; see ``phases_at``."""
    sin, cos = sincos(phases_at(turns, positions))
    return jax.lax.complex(cos, sin)


def rope_frequencies(n: int, base: float = 10000.0) -> Float[Array, " n"]:
    """Frequencies of rotary position embedding, ``base ** (-k / n)`` radians per position, k = 0..n-1.

    For comparison with random phasors (Su et al., "RoFormer", arXiv:2104.09864).

    Raises:
      ValueError: if ``n`` is below 1 or ``base`` is not above 1.
    """
    if n < 1:
        raise ValueError(f"n is {n!r}; it must be at least 1")
    if not base > 1.0:
        raise ValueError(f"base is {base!r}; it must be above 1")
    return jnp.float32(base) ** (-jnp.arange(n, dtype=jnp.float32) / n)
