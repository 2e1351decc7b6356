"""Token mixers: the phasor memory and the baselines, behind one call.

``mixer(x, context, turns, state) -> (y, new_state)``: normalised input x of [b, t, e] in, mixed
values of the same shape out. ``state`` None starts from nothing and returns None, as in training.
"""

from holo_jax.mixers.attention import AttentionMixer, AttentionState
from holo_jax.mixers.context import Context
from holo_jax.mixers.memory import MemoryMixer, MemoryMixerState
from holo_jax.mixers.ssm import SsmMixer, SsmState

MIXERS = {"holo": MemoryMixer, "attention": AttentionMixer, "ssm": SsmMixer}

__all__ = [
    "MIXERS",
    "AttentionMixer",
    "AttentionState",
    "Context",
    "MemoryMixer",
    "MemoryMixerState",
    "SsmMixer",
    "SsmState",
]
