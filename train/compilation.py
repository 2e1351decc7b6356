"""What the compiler is asked for where a step runs on several GPUs: to send while it computes.

The loop over layers finds gradients of one layer a turn and, with ``fsdp``, needs the weights of one. Left
to its defaults XLA joins the exchanges of a layer: they wait for its last gradient and have only the end of
the turn to hide behind. Asked to, it moves them into the next turn (weights: into the turn before), where
the whole of a layer's computation runs beside them. Sent one by one, seven of a layer began one after the
other with nothing beside the first four; and what runs beside a collective is slower, so that few long ones,
at the full rate of the links, cost least. Where blocks are unrolled those of several layers are joined: up to
``JOINED`` bytes a step of two H200s takes 90.6 ms where 16 MiB took 95.6 (``docs/results/scaling_two``).

Over ``data`` alone unrolled blocks can say themselves in which order gradients are summed
(``Exchange.in_order``). The compiler then has to begin a sum when it can, not just before
it is used; to let a second begin beside it, because that of the embedding is known last and is the longest;
and not to join gradients by copying them into one array and out of it: NCCL takes many arrays at a time. (By
copies they are one array, written by us.)

The compiled schedules of jax 0.11.2 for four H100s say so; ``eval.scaling`` measures both (``overlap``).

What ``Exchange`` sends by copies (an all-to-all) goes by copy engines among the devices of one process, where
the compiler is told to; processes of their own use NCCL for it.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from holo_jax.exchange import Exchange
from holo_jax.parallel import DATA

_KINDS = ("all_reduce", "reduce_scatter", "all_gather")
JOINED = 64 * 2**20
_DEFAULT = 30 * 2**20 + 7
_IN_ORDER = {
    "xla_gpu_experimental_collective_start_as_early_as_possible": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
    "xla_disable_hlo_passes": "all-reduce-contiguous",
}
_NAMED_MODES = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)


def compiler_options(
    mesh: Mesh,
    exchange: Exchange = Exchange(),  # noqa: B008 (frozen)
    *,
    overlap: bool = True,
    joined: int = JOINED,
) -> dict[str, Any] | None:
    """Options for ``jax.jit`` or ``compile`` of a step on ``mesh``; None for one device, or no GPUs.

    Args:
      exchange: how its devices send weights and gradients.
      overlap: False for what the compiler would do by itself.
      joined: up to how many bytes collectives are joined.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != "gpu":
        return None
    found = overlapping(overlap, joined) | {"xla_gpu_use_memcpy_local_p2p": exchange.transport == "copies"}
    if overlap and exchange.in_order and mesh.shape[DATA] == mesh.size:
        found |= _IN_ORDER
    return found


def overlapping(overlap: bool, joined: int = JOINED) -> dict[str, Any]:
    """The options about time, by the names that this version of XLA has for them."""
    found: dict[str, Any] = {}
    for kind in _KINDS:
        found[f"xla_gpu_{kind}_combine_threshold_bytes"] = joined if overlap else _DEFAULT
        if _NAMED_MODES:
            mode = "ON" if overlap else "DEFAULT"
            found[f"xla_gpu_pipeline_{kind}"] = f"COLLECTIVE_PIPELINING_MODE_{mode}"
        else:
            found[f"xla_gpu_enable_pipelined_{kind}"] = overlap
    return found
