"""Micro models shared by the tests of this folder."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from holo_jax.config import HoloConfig
from holo_jax.model import HoloForCausalLM
from holo_jax.precision import FULL, Precision

VOCAB = 50
SIZES = dict(vocab_size=VOCAB, hidden_size=16, hd_dim=16, head_dim=8, phasors=6, num_hidden_layers=2)

VARIANTS: dict[str, dict] = {
    "holo": dict(preset="holo"),
    "holo-sum": dict(preset="holo", erase=False),
    "holo-local": dict(preset="holo", value_conv=3),
    "seed": dict(preset="seed"),
    "dual": dict(preset="dual"),
    "dual-gated": dict(preset="dual", write_gate=True, short_conv=4),
    "hadamard-content": dict(preset="holo", binding="hadamard", erase=False),
    "attention": dict(preset="attention"),
    "attention-window": dict(preset="attention", attention_window=5, key_conv=3),
    "ssm": dict(preset="ssm"),
    "hybrid": dict(preset="holo", anchor_every=2),
}


def variant_config(name: str, *, precision: Precision = FULL, **overrides: object) -> HoloConfig:
    changes = dict(VARIANTS[name]) | overrides
    preset = changes.pop("preset")
    return HoloConfig.preset(preset, **SIZES | dict(precision=precision) | changes)


@cache
def variant(name: str, precision: Precision = FULL) -> HoloForCausalLM:
    return build(variant_config(name, precision=precision))


def build(config: HoloConfig, seed: int = 0) -> HoloForCausalLM:
    """A model with random parameters: taps, gates and mixing weights off their symmetric start.

    Drawn by NumPy on the abstract model, which costs no compilation.
    """
    graphdef, params = nnx.split(nnx.eval_shape(lambda: HoloForCausalLM(config, rngs=nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        noise = rng.normal(size=leaf.shape)
        if "embedding" in name or "head'" in name:
            values = 0.02 * noise
        elif "taps" in name:
            values = 0.3 * noise
        elif "weight" in name and len(leaf.shape) > 2 and "norm" not in name:
            values = noise / np.sqrt(leaf.shape[-2])
        elif "erase" in name or "bias" in name:
            values = 0.1 * noise
        else:
            values = 1 + 0.05 * noise
        return jnp.asarray(values, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, params))
