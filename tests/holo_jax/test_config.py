"""Configurations: presets, validation with useful messages, round trips."""

import dataclasses

import pytest

from holo_jax.config import HoloConfig
from holo_jax.precision import Precision

PRESETS = ("holo", "seed", "dual", "attention", "ssm")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name: str) -> None:
    config = HoloConfig.preset(name, vocab_size=100, hidden_size=64, num_hidden_layers=2)
    assert HoloConfig.from_dict(config.to_dict()) == config


def test_presets_are_what_their_words_say() -> None:
    holo, seed, dual = HoloConfig(), HoloConfig.seed(), HoloConfig.dual()
    assert (holo.binding, holo.addressing, holo.erase, holo.read_scale) == ("outer", "content", True, "none")
    assert HoloConfig(erase=False).read_scale == "sqrt_writes"
    assert (seed.binding, seed.addressing, seed.write_gate, seed.read_scale) == (
        "hadamard",
        "position",
        False,
        "sqrt_time",
    )
    assert (seed.norm, seed.mlp, dual.addressing, dual.frequencies) == (
        "layernorm",
        "gelu",
        "both",
        "multiscale",
    )
    assert HoloConfig.attention(hidden_size=256).hd_dim == 256


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(hidden_size=0), ("hidden_size", "0", "positive")),
        (dict(hd_dim=100), ("hd_dim", "100", "head_dim")),
        (dict(binding="circular"), ("binding", "circular", "outer")),
        (dict(binding="hadamard"), ("erase", "outer")),
        (dict(write_gate=False), ("erase", "write_gate")),
        (dict(addressing="position"), ("addressing", "position", "hadamard")),
        (dict(anchor_every=5), ("anchor_every", "5", "12")),
        (dict(short_conv=1), ("short_conv", "1")),
        (dict(short_conv=-2), ("short_conv", "-2")),
        (dict(key_conv=1), ("key_conv", "1")),
        (dict(scan_unroll=0), ("scan_unroll", "0")),
        (dict(remat="sometimes"), ("remat", "sometimes", "full")),
    ],
)
def test_bad_values_are_refused_by_name(changes: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        HoloConfig(**changes)
    for word in words:
        assert word in str(error.value)


def test_bad_types_are_refused_by_name() -> None:
    for changes in (dict(hidden_size="64"), dict(erase=1), dict(vocab_size=True), dict(precision="float32")):
        with pytest.raises(TypeError, match=next(iter(changes))):
            HoloConfig(**changes)


def test_unknown_fields_name_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean hidden_size"):
        HoloConfig.from_dict({"hiden_size": 4})
    with pytest.raises(TypeError):
        HoloConfig(hiden_size=4)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        HoloConfig().hidden_size = 5


def test_precision_is_validated() -> None:
    with pytest.raises(ValueError, match=r"precision\.memory is 'bfloat16'"):
        Precision(memory="bfloat16")


def test_derived_sizes() -> None:
    config = HoloConfig(hd_dim=512, head_dim=64, phasors=32)
    assert (config.num_heads, config.key_dim, config.state_floats_per_layer) == (8, 32, 32768)
    assert HoloConfig.ssm(hd_dim=512).state_floats_per_layer == 32768
    assert HoloConfig.seed(hd_dim=512).state_floats_per_layer == 1024
    assert HoloConfig.attention().state_floats_per_layer == 0
    assert HoloConfig(anchor_every=4).layer_kinds == ("holo", "holo", "holo", "attention")
