"""``seed`` and ``dual`` against independent float64 transcriptions of the published equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from holo_jax.model import positional_turns
from tests.holo_jax.models import VOCAB, build, variant_config

TURN = 2 * np.pi / 2**32


def layer_norm(x: np.ndarray, p: dict) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["weight"] + p["bias"]


def published_forward(params: dict, turns: np.ndarray, ids: np.ndarray, *, dual: bool) -> np.ndarray:
    """Token by token: M += v e^{i theta}; y = Re(M conj(e^{i theta})) / sqrt(t), theta = omega t."""
    x = params["model"]["embedding"][ids]
    stacked = params["model"]["periods"]["blocks"][0]
    for layer in range(turns.shape[0]):
        p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
        omega = turns[layer].reshape(-1).astype(np.float64) * TURN
        normed = layer_norm(x, p["mixer_norm"])
        values = normed @ p["mixer"]["values"]["weight"]
        memory = np.zeros(values.shape[-1], complex)
        linked = np.zeros(values.shape[-1], complex)
        mixed = np.zeros_like(x)
        for t in range(len(ids)):
            rotor = np.exp(1j * omega * t)
            memory = memory + values[t] * rotor
            y = (memory * rotor.conj()).real / np.sqrt(t + 1)
            if dual:
                angle = np.pi * (normed @ p["mixer"]["phases"]["weight"])
                if t > 0:
                    linked = linked + values[t] * np.exp(1j * angle[t - 1])
                by_content = (linked * np.exp(-1j * angle[t])).real / np.sqrt(t + 1)
                weights = np.repeat(p["mixer"]["mix"], omega.size // p["mixer"]["mix"].shape[1], axis=1)
                y = weights[0] * y + weights[1] * by_content
            mixed[t] = y @ p["mixer"]["out"]["weight"]
        x = x + mixed
        hidden = layer_norm(x, p["mlp_norm"]) @ p["mlp"]["up"]["weight"] + p["mlp"]["up"]["bias"]
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        x = x + hidden @ p["mlp"]["down"]["weight"] + p["mlp"]["down"]["bias"]
    return layer_norm(x, params["model"]["norm"]) @ params["head"]["weight"]


@pytest.mark.parametrize("frequencies", ["uniform", "normal"])
@pytest.mark.parametrize("name", ["seed", "dual"])
def test_matches_the_published_equations(name: str, frequencies: str) -> None:
    config = variant_config(name, **({} if name == "dual" else dict(frequencies=frequencies)))
    model = build(config)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    ids = np.asarray(jax.random.randint(jax.random.key(0), (33,), 0, VOCAB))
    turns = np.asarray(positional_turns(config))[:, 0]
    expected = published_forward(params, turns, ids, dual=name == "dual")
    ours = nnx.jit(lambda m, i: m(i).logits)(model, jnp.asarray(ids)[None])[0]
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-4)


def test_positional_phasors_are_fixed_and_differ_by_layer() -> None:
    config = variant_config("seed")
    turns = positional_turns(config)
    assert (turns == positional_turns(config)).all()
    assert (turns[0] != turns[1]).any()
    assert (turns != positional_turns(config.replace(phasor_seed=1))).any()
    assert positional_turns(variant_config("holo")) is None
    parameters = nnx.state(build(config), nnx.Param)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(parameters))
