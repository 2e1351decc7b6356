"""Storing a finished memory in fewer bits, and what it costs in bytes."""

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Complex

BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
_BLOCK = 128  # numbers that share one float32 scale


def bytes_per_float(dtype: str) -> float:
    """Bytes of one stored number, its share of the block's scale included."""
    _check(dtype)
    return BITS[dtype] / 8 + (4 / _BLOCK if dtype.startswith("int") else 0)


def store(memory: Complex[Array, "..."], dtype: str, key: Array | None = None) -> Complex[Array, "..."]:
    """The memory as it reads after a round trip through ``dtype``.

    Real and imaginary parts are numbers of their own. ``int8`` and ``int4`` are symmetric, with one float32
    scale (largest magnitude over 127 or 7) for 128 numbers. With a key, integers are rounded
    stochastically (unbiased: what a sum needs when it is stored again and again), else to the nearest.

    Raises:
      ValueError: for an unknown dtype.
    """
    _check(dtype)
    if dtype == "float32":
        return memory
    if dtype == "bfloat16":
        real, imaginary = (jax.lax.reduce_precision(x, 8, 7) for x in (memory.real, memory.imag))
        return jax.lax.complex(real, imaginary)
    numbers = jnp.stack([memory.real, memory.imag]).reshape(-1)
    padded = jnp.pad(numbers, (0, -numbers.size % _BLOCK)).reshape(-1, _BLOCK)
    most = 2.0 ** (BITS[dtype] - 1) - 1
    scale = jnp.max(jnp.abs(padded), axis=1, keepdims=True) / most
    units = padded / jnp.where(scale > 0, scale, 1.0)
    if key is None:
        whole = jnp.round(units)
    else:
        whole = jnp.floor(units + jax.random.uniform(key, units.shape))
    restored = (jnp.clip(whole, -most, most) * scale).reshape(-1)[: numbers.size].reshape(2, *memory.shape)
    return jax.lax.complex(restored[0], restored[1])


def _check(dtype: str) -> None:
    if dtype not in BITS:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(BITS)}")
