"""Accumulation by the fastest form this machine can run; every form has the same mathematics.

``backend="portable"`` is plain JAX (``holo_jax.functional.accumulate``). ``"auto"`` picks the first kernel
that is installed, whose hardware is present and that supports the call, else the portable form. A backend
asked for by name runs or raises ``BackendUnavailableError``: it is never replaced.
"""

from functools import partial
from typing import Any, NamedTuple

import jax

from holo_jax.array_types import Array
from holo_jax.functional import MemoryState
from holo_jax.functional import accumulate as _portable
from holo_jax.functional import accumulate_parts as _parts
from holo_jax.kernels import block, capability, ensemble
from holo_jax.kernels.block.convolved_sum import convolved_sum
from holo_jax.kernels.call import READ_NAME, SCALED_NAME, Call
from holo_jax.kernels.capability import BackendUnavailableError
from holo_jax.kernels.hadamard import backend as triton
from holo_jax.kernels.hadamard import positions as triton_positions
from holo_jax.kernels.hadamard.positions import Positions
from holo_jax.kernels.hopper import backend as hopper
from holo_jax.kernels.hopper import parts as hopper_parts
from holo_jax.kernels.outer import backend as triton_outer
from holo_jax.kernels.phasor_features import phasor_features, sin_cos
from holo_jax.kernels.products.linear_cross_entropy import linear_cross_entropy
from holo_jax.kernels.products.swiglu import swiglu, swiglu_runs

__all__ = [
    "AUTOMATIC",
    "BACKENDS",
    "READ_NAME",
    "SCALED_NAME",
    "Backend",
    "BackendUnavailableError",
    "Positions",
    "accumulate",
    "accumulate_parts",
    "available",
    "block",
    "capability",
    "choose",
    "convolved_sum",
    "linear_cross_entropy",
    "phasor_features",
    "sin_cos",
    "swiglu",
    "swiglu_runs",
]

_KERNELS = {"hopper": hopper, "triton": triton, "triton_outer": triton_outer}
# A kernel joins when it has been equal to the definition, and faster, on hardware; the fastest comes first.
AUTOMATIC = ("triton_outer", "hopper", "triton")
# Parts of a sequence are cheapest where their maps are found before their outputs.
_OF_PARTS = ("hopper", "triton", "triton_outer")
BACKENDS = ("auto", "ensemble", "portable", *_KERNELS)


class Backend(NamedTuple):
    """One backend as this process sees it.

    Attributes:
      name: what ``memory_backend`` calls it.
      usable: whether some call can run here.
      reason: why not, or what it covers.
    """

    name: str
    usable: bool
    reason: str


def available() -> tuple[Backend, ...]:
    """Every backend, whether it can run in this process, and why not."""
    found = [Backend("portable", True, "plain JAX, everything, everywhere")]
    for name, module in _KERNELS.items():
        reason = module.missing()
        found.append(Backend(name, reason is None, reason or module.COVERS))
    return tuple(found)


def choose(call: Call, backend: str = "auto", automatic: tuple[str, ...] = AUTOMATIC) -> str:
    """The backend that will run ``call``; ``auto`` picks among ``automatic``.

    Raises:
      ValueError: for an unknown backend.
      BackendUnavailableError: if a kernel named by ``backend`` cannot run the call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"memory_backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "portable" or not call.well_formed:
        return "portable"
    if backend in _KERNELS:
        reason = _KERNELS[backend].unsupported(call)
        if reason is not None:
            raise BackendUnavailableError(
                f"memory_backend is {backend!r}, which cannot run this call: {reason}"
            )
        return backend
    # A kernel works in whole chunks, so on less than one it only adds work.
    long_enough = call.values.shape[1] >= 64
    names = automatic if long_enough else ()
    if not triton_outer.measured(call):
        names = tuple(name for name in names if name != "triton_outer")
    return next((name for name in names if _KERNELS[name].unsupported(call) is None), "portable")


def accumulate(
    write_phases: Array,
    read_phases: Array,
    values: Array,
    gates: Array | None = None,
    erase: Array | None = None,
    *,
    backend: str = "auto",
    factors: Array | None = None,
    positions: Positions | None = None,
    **options: Any,
) -> tuple[Array, MemoryState]:
    """``holo_jax.functional.accumulate`` by a chosen backend; arguments and results are the same.

    Args:
      write_phases, read_phases, values, gates, erase, options: see there.
      backend: which form runs.
      factors: float32 ``[1 or b, t]``, what outputs are multiplied by; no gradient is taken of them.
      positions: what both phases are those of, where they are; a kernel may then read no phases.

    Raises:
      ValueError: for an unknown backend.
      BackendUnavailableError: if a kernel named by ``backend`` cannot run the call.
    """
    call = Call(write_phases, read_phases, values, gates, erase, **options)
    chosen = choose(call, backend)
    ensembles = backend == "ensemble" and chosen != "portable"
    if chosen == "triton" and not ensembles:  # it multiplies before it rounds, in the same pass
        # With gates its gradient was slower than from phases (docs/log.md, 2026-11-28).
        if positions is not None and gates is None:
            return triton_positions.accumulate(call, positions, factors=_constant(factors))
        return triton.accumulate(call, factors=_constant(factors))
    if ensembles:
        outputs, state = ensemble.accumulate(_KERNELS[chosen].accumulate, call)
    else:
        outputs, state = _run(call, chosen)
    return _multiplied(outputs, factors), state


def accumulate_parts(
    axis: str,
    write_phases: Array,
    read_phases: Array,
    values: Array,
    gates: Array | None = None,
    erase: Array | None = None,
    *,
    backend: str = "auto",
    factors: Array | None = None,
    **options: Any,
) -> tuple[Array, MemoryState, MemoryState]:
    """``holo_jax.functional.accumulate_parts`` along ``axis``, each part by a chosen backend.

    ``factors`` as in ``accumulate``, of this part.

    Raises:
      ValueError: for an unknown backend.
      BackendUnavailableError: if a kernel named by ``backend`` cannot run a part.
    """
    inputs = (write_phases, read_phases, values, gates, erase)
    chosen = choose(Call(*inputs, **options), backend, _OF_PARTS)
    chained = _hopper_parts if chosen == "hopper" else None
    run = partial(accumulate, backend=backend)
    outputs, before, after = _parts(run, axis, *inputs, chained=chained, **options)
    return _multiplied(outputs, factors), before, after


def _hopper_parts(
    *inputs: Any, axis: str, continues: Array, initial: Array, **options: Any
) -> tuple[Array, Array, Array]:
    return hopper_parts.accumulate(Call(*inputs, **options), axis, continues, initial)


def _multiplied(outputs: Array, factors: Array | None) -> Array:
    factors = _constant(factors)
    return outputs if factors is None else outputs * factors[..., None, None]


def _constant(factors: Array | None) -> Array | None:
    # Behind a border: fused, what makes a factor would be computed once an element.
    return None if factors is None else jax.lax.optimization_barrier(jax.lax.stop_gradient(factors))


def _run(call: Call, backend: str) -> tuple[Array, MemoryState]:
    return _portable(**call._asdict()) if backend == "portable" else _KERNELS[backend].accumulate(call)
