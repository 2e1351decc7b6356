"""The schedule and the decay mask, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from holo_jax.config import HoloConfig
from tests.train.common import micro_config
from train.model_functions import model_functions
from train.optimizer import decay_mask, learning_rate_schedule, make_optimizer
from train.sharding import path_name

CONFIG = micro_config(optimizer__learning_rate=1.0, optimizer__warmup_steps=4, optimizer__final_ratio=0.1)


def test_schedule_by_hand() -> None:
    schedule = learning_rate_schedule(CONFIG.optimizer, 14)
    rates = [float(schedule(count)) for count in range(15)]
    np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[9], 0.1 + 0.9 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(rates[14], 0.1, rtol=1e-6)


def test_warmup_longer_than_the_run_never_reaches_past_it() -> None:
    config = micro_config(optimizer__warmup_steps=100).optimizer
    rates = [float(learning_rate_schedule(config, 5)(count)) for count in range(5)]
    assert all(np.diff(rates) > 0) and rates[-1] == pytest.approx(1e-2)


def decayed_names(config: HoloConfig) -> dict[str, bool]:
    functions = model_functions(config)
    leaves = jax.tree_util.tree_flatten_with_path(decay_mask(functions.axes))[0]
    return {path_name(path): value for path, value in leaves}


@pytest.mark.parametrize("preset", ["holo", "seed", "dual", "attention", "ssm"])
def test_only_matrices_at_the_residual_stream_decay(preset: str) -> None:
    size = dict(vocab_size=64, hidden_size=16, hd_dim=16, head_dim=8, num_hidden_layers=2)
    names = decayed_names(HoloConfig.preset(preset, **size))
    for name, decayed in names.items():
        parts = name.split(".")
        assert decayed == (parts[-1] in ("weight", "embedding") and not parts[-2].endswith("norm")), name
    assert any(names.values()) and not all(names.values())


def test_one_update_by_hand() -> None:
    config = base.get_config()
    config.optimizer.update(
        learning_rate=0.1, warmup_steps=0, final_ratio=1.0, weight_decay=0.5, clip_norm=1.0
    )
    config.name = "x"
    optimizer_config = micro_config(**{f"optimizer__{k}": v for k, v in config.optimizer.items()}).optimizer
    axes = {"matrix": ("embed", "mlp"), "vector": ("embed",)}
    params = {"matrix": jnp.full((1, 2), 2.0), "vector": jnp.full((2,), 2.0)}
    grads = {"matrix": jnp.full((1, 2), 3.0), "vector": jnp.full((2,), 3.0)}
    optimizer = make_optimizer(optimizer_config, 10, axes)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # The first Adam step moves by the learning rate against the sign; decay adds rate * 0.5 * 2.
    np.testing.assert_allclose(updates["vector"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["matrix"], -0.1 - 0.1, rtol=1e-5)


def test_muon_levels_the_spectrum_of_the_blocks_matrices_only() -> None:
    config = micro_config(
        optimizer__name="muon",
        optimizer__learning_rate=0.1,
        optimizer__warmup_steps=0,
        optimizer__final_ratio=1.0,
        optimizer__weight_decay=0.0,
        optimizer__clip_norm=0.0,
    ).optimizer
    axes = {
        "block": ("layers", "embed", "mlp"),
        "gate": ("layers", "embed", "heads"),
        "table": ("vocab", "embed"),
    }
    shapes = {"block": (2, 32, 16), "gate": (2, 32, 2), "table": (64, 32)}
    key = jax.random.key(0)
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    grads = {name: jax.random.normal(key, shape) for name, shape in shapes.items()}
    optimizer = make_optimizer(config, 10, axes)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for name in ("gate", "table"):
        # Adam with Nesterov momentum: the first step is the sign, (1 + b1 / (1 + b1)) times the rate.
        expected = -0.1 * (1 + 0.9 / 1.9) * np.sign(grads[name])
        np.testing.assert_allclose(updates[name], expected, rtol=1e-3)
    for layer in range(2):
        spectrum = np.linalg.svd(updates["block"][layer], compute_uv=False)
        before = np.linalg.svd(grads["block"][layer], compute_uv=False)
        assert spectrum.max() / spectrum.min() < 2 < before.max() / before.min()
        assert np.sum(np.asarray(updates["block"][layer]) * np.asarray(grads["block"][layer])) < 0
