"""Holographic memory language models in JAX.

>>> from holo_jax import HoloConfig, HoloForCausalLM
>>> from flax import nnx
>>> model = HoloForCausalLM(HoloConfig(hidden_size=256, hd_dim=512, num_hidden_layers=4), rngs=nnx.Rngs(0))
>>> outputs = model(input_ids, labels=input_ids)

Pure functions are in ``holo_jax.functional``.
"""

from holo_jax import functional
from holo_jax.config import HoloConfig
from holo_jax.model import CausalLMOutput, HoloForCausalLM, HoloModel, ModelState, init_state
from holo_jax.precision import FULL, MIXED, Precision

__version__ = "0.1.0"

__all__ = [
    "FULL",
    "MIXED",
    "CausalLMOutput",
    "HoloConfig",
    "HoloForCausalLM",
    "HoloModel",
    "ModelState",
    "Precision",
    "functional",
    "init_state",
]
