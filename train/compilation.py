"""What the compiler is asked for where a step runs on several GPUs: to send while it computes.

The loop over layers finds gradients of one layer a turn and, with ``fsdp``, needs the weights of one. Left to
its defaults XLA joins the exchanges of a layer: they wait for its last gradient, are copied together and
apart, and have only the end of the turn to hide behind. Asked to, it moves them into the next turn (weights:
into the turn before), where the whole of a layer's computation runs beside them, each large array by itself.

The compiled schedules of jax 0.11.2 for four H100s say so; ``eval.scaling`` measures both (``overlap``).
"""

from typing import Any

import jax
from jax.sharding import Mesh

_KINDS = ("all_reduce", "reduce_scatter", "all_gather")
SEPARATE = 2**20  # bytes up to which arrays are sent together
_DEFAULT = 30 * 2**20 + 7
_NAMED_MODES = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)


def compiler_options(mesh: Mesh, *, overlap: bool = True) -> dict[str, Any] | None:
    """Options for ``jax.jit`` or ``compile`` of a step on ``mesh``; None for one device, or no GPUs.

    Args:
      overlap: False for what the compiler would do by itself.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != "gpu":
        return None
    return overlapping(overlap)


def overlapping(overlap: bool) -> dict[str, Any]:
    """The options themselves, by the names that this version of XLA has for them."""
    found: dict[str, Any] = {}
    for kind in _KINDS:
        found[f"xla_gpu_{kind}_combine_threshold_bytes"] = SEPARATE if overlap else _DEFAULT
        if _NAMED_MODES:
            mode = "ON" if overlap else "DEFAULT"
            found[f"xla_gpu_pipeline_{kind}"] = f"COLLECTIVE_PIPELINING_MODE_{mode}"
        else:
            found[f"xla_gpu_enable_pipelined_{kind}"] = overlap
    return found
