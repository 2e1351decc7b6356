"""Micro models shared by the tests of this folder."""

from functools import cache

import jax
from flax import nnx

from holo_jax.config import HoloConfig
from holo_jax.model import HoloForCausalLM
from holo_jax.precision import FULL, Precision

VOCAB = 50
SIZES = dict(vocab_size=VOCAB, hidden_size=16, hd_dim=16, head_dim=8, phasors=6, num_hidden_layers=2)

VARIANTS: dict[str, dict] = {
    "holo": dict(preset="holo"),
    "holo-sum": dict(preset="holo", erase=False),
    "seed": dict(preset="seed"),
    "dual": dict(preset="dual"),
    "dual-gated": dict(preset="dual", write_gate=True, short_conv=4),
    "hadamard-content": dict(preset="holo", binding="hadamard", erase=False),
    "attention": dict(preset="attention"),
    "attention-window": dict(preset="attention", attention_window=5),
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
    """A model whose convolution taps, gates and mixing weights are moved off their symmetric start."""
    model = HoloForCausalLM(config, rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(model, nnx.Param)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [
        leaf + 0.05 * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, moved))
