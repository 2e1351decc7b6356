"""Validation shared by the pure functions: which binding, which dtype, which shape."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from holo_jax.array_types import Array
from holo_jax.precision import assert_wide

BINDINGS = ("hadamard", "outer")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def check_shape(name: str, array: Array | None, *allowed: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless ``array`` is None or has one of the allowed shapes."""
    if array is not None and array.shape not in allowed:
        wanted = " or ".join(str(shape) for shape in dict.fromkeys(allowed))
        raise ValueError(f"{name} has shape {array.shape}; it must be {wanted}")


def check_float(**arrays: Array | None) -> None:
    """Raises ``TypeError`` for an array that is not real floating point."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}; it must be real floating point")


def real_dtype(phases: Array, values: Array) -> np.dtype:
    """Dtype of the real and imaginary parts of a memory written with these arrays.

    float64 if either array is float64, else float32: a memory is never narrower, whatever the values are.

    Raises:
      TypeError: if the phases are narrower than float32, or an array is not real floating point.
    """
    assert_wide(phases=phases)
    check_float(phases=phases, values=values)
    return wider(phases.dtype, values.dtype)


def wider(*dtypes: DTypeLike) -> np.dtype:
    """float64 if any dtype is float64, else float32."""
    double = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if double else jnp.float32)
