"""Holographic memory language models in JAX.

>>> from holo_jax import HoloConfig, HoloForCausalLM
>>> from flax import nnx
>>> model = HoloForCausalLM(HoloConfig(hidden_size=256, hd_dim=512, num_hidden_layers=4), rngs=nnx.Rngs(0))
>>> outputs = model(input_ids, labels=input_ids)

Pure functions are in ``holo_jax.functional``; reading and generating in ``holo_jax.generate``:

>>> from holo_jax import load_pretrained
>>> from holo_jax.generate import generate
>>> run = load_pretrained("runs/quickstart")
>>> result = generate(run.model, [run.tokenizer.encode("def ")], max_new_tokens=64)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holo_jax import functional
    from holo_jax.config import HoloConfig
    from holo_jax.model import CausalLMOutput, HoloForCausalLM, HoloModel, ModelState, init_state
    from holo_jax.precision import FULL, MIXED, Precision
    from holo_jax.pretrained import Pretrained, load_pretrained
    from holo_jax.state_io import load_state, save_state

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
    "Pretrained",
    "functional",
    "init_state",
    "load_pretrained",
    "load_state",
    "save_state",
]

# Imported when asked for: tokenizers and manifests, which workers of ``train.prepare`` want, need no jax.
_HOMES = {
    "config": ("HoloConfig",),
    "model": ("CausalLMOutput", "HoloForCausalLM", "HoloModel", "ModelState", "init_state"),
    "precision": ("FULL", "MIXED", "Precision"),
    "pretrained": ("Pretrained", "load_pretrained"),
    "state_io": ("load_state", "save_state"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("holo_jax.functional")
    if name not in _HOME:
        raise AttributeError(f"module 'holo_jax' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"holo_jax.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
