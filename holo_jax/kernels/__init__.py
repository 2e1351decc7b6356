"""Accumulation by the fastest form this machine can run; every form has the same mathematics.

``backend="portable"`` is plain JAX (``holo_jax.functional.accumulate``); ``"auto"`` picks a kernel
where one is installed and its hardware is present, and the portable form elsewhere.
"""

from typing import Any

from holo_jax.array_types import Array
from holo_jax.functional import MemoryState
from holo_jax.functional import accumulate as _portable

BACKENDS = ("auto", "portable")


def accumulate(
    write_phases: Array,
    read_phases: Array,
    values: Array,
    gates: Array | None = None,
    erase: Array | None = None,
    *,
    backend: str = "auto",
    **options: Any,
) -> tuple[Array, MemoryState]:
    """``holo_jax.functional.accumulate`` by a chosen backend; arguments and results are the same.

    Raises:
      ValueError: for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"memory_backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    return _portable(write_phases, read_phases, values, gates, erase, **options)
