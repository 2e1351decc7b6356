"""The dtype policy: one object that says which array has which precision, and the checks that hold it.

Every border of the package states its dtypes through a ``Precision``; nothing is promoted or cast
on the way. Three facts decide the defaults:

* bfloat16 has 8 significant bits: ``cos(9.7 t)`` computed from a bfloat16 phase is noise by
  t = 16k, so phases are float32 (or uint32 turns, see ``functional.phasors``).
* A running sum in bfloat16 stops growing once the addend falls under half a unit of the sum
  ("swamping"), so memories and every accumulation are float32 / complex64.
* The softmax over a vocabulary and its loss need float32.
"""

import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from holo_jax.array_types import Array

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_WIDE = ("float32", "float64")


def complex_dtype(real: DTypeLike) -> np.dtype:
    """The complex dtype whose components are ``real``.

    Raises:
      TypeError: for a real dtype without complex counterpart (there is no complex bfloat16).
    """
    name = jnp.dtype(real).name
    if name == "float32":
        return jnp.dtype(jnp.complex64)
    if name == "float64":
        return jnp.dtype(jnp.complex128)
    raise TypeError(f"no complex dtype has components of dtype {name}; use float32 or float64")


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes by role.

    Attributes:
      params: master parameters (float32).
      storage: activations and matrix products (bfloat16 on accelerators, float32 for exact tests).
      phases: angles in radians (never narrower than float32).
      memory: real and imaginary parts of memories and of every accumulation.
      logits: logits and loss.
    """

    params: str = "float32"
    storage: str = "bfloat16"
    phases: str = "float32"
    memory: str = "float32"
    logits: str = "float32"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            allowed = _FLOATS if field.name == "storage" else _WIDE
            if value not in allowed:
                raise ValueError(
                    f"precision.{field.name} is {value!r}; it must be one of {', '.join(allowed)}"
                )

    @property
    def complex_memory(self) -> np.dtype:
        """Dtype of a complex memory."""
        return complex_dtype(self.memory)


FULL = Precision(storage="float32")
MIXED = Precision()


def assert_wide(**arrays: Array | None) -> None:
    """Asserts that accumulators and phases are float32/float64 (or their complex pairs).

    Raises:
      TypeError: naming the array and its dtype.
    """
    for name, array in arrays.items():
        if array is not None and jnp.dtype(array.dtype).name not in (*_WIDE, "complex64", "complex128"):
            raise TypeError(
                f"{name} has dtype {array.dtype}; it must be float32 or wider (swamping, phase noise)"
            )


def assert_dtype(array: Array, dtype: DTypeLike, name: str) -> None:
    """Asserts an exact dtype with chex, naming the array."""
    try:
        chex.assert_type(array, jnp.dtype(dtype))
    except AssertionError as error:
        raise TypeError(f"{name} has dtype {array.dtype}; it must be {jnp.dtype(dtype).name}") from error
