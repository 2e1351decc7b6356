"""The phasor memory: state, one step, whole sequences, reading."""

from holo_jax.functional.memory.accumulate import accumulate
from holo_jax.functional.memory.sequence_parallel import accumulate_parts
from holo_jax.functional.memory.state import MemoryState, compensated_add, init_memory, retrieve, step

__all__ = [
    "MemoryState",
    "accumulate",
    "accumulate_parts",
    "compensated_add",
    "init_memory",
    "retrieve",
    "step",
]
