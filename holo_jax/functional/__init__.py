"""Pure functions: phasors, binding, the phasor memory, the decay baseline."""

from holo_jax.functional.binding import bind, retrieval_scale, unbind
from holo_jax.functional.decay import decayed_accumulate, decayed_parts
from holo_jax.functional.memory import (
    MemoryState,
    accumulate,
    accumulate_parts,
    init_memory,
    retrieve,
    step,
)
from holo_jax.functional.phasors import (
    generate_multiscale_phasors,
    generate_random_phasors,
    phases_at,
    rope_frequencies,
    rotors,
)

__all__ = [
    "MemoryState",
    "accumulate",
    "accumulate_parts",
    "bind",
    "decayed_accumulate",
    "decayed_parts",
    "generate_multiscale_phasors",
    "generate_random_phasors",
    "init_memory",
    "phases_at",
    "retrieval_scale",
    "retrieve",
    "rope_frequencies",
    "rotors",
    "step",
    "unbind",
]
