"""Every configuration instantiates: read, model and optimizer shapes, shardings. Nothing is computed."""

import ast
import importlib
from pathlib import Path

import jax
import pytest

from train.loop import build
from train.run_config import RunConfig
from train.sharding import check_batch, make_mesh

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")


def load(name: str):
    return importlib.import_module(f"configs.{name}").get_config()


def test_there_are_configurations() -> None:
    assert {"base", "quickstart", "slimpajama", "seed", "dual", "attention", "ssm"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_instantiates(name: str) -> None:
    values = load(name)
    assert values.is_locked and values.name == name
    config = RunConfig.from_dict(values.to_dict())
    mesh = make_mesh(config.mesh, jax.devices()[:1])  # every one runs on a single device
    check_batch(mesh, config.global_batch_size, config.accumulation_steps, config.context_length)
    functions, steps = build(config.model, config.optimizer, config.num_steps, mesh)
    assert jax.tree.structure(steps.shapes) == jax.tree.structure(steps.shardings)
    assert all(leaf.dtype == config.model.precision.params for leaf in jax.tree.leaves(functions.shapes))


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_opens_with_how_to_run_it(name: str) -> None:
    text = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text())) or ""
    for heading in ("Command:", "Hardware:", "Duration:", "Expect:"):
        assert f"\n{heading}" in text, heading


def test_slimpajama_is_the_published_recipe() -> None:
    config = RunConfig.from_dict(load("slimpajama").to_dict())
    model = config.model
    assert (model.num_hidden_layers, model.hidden_size, model.hd_dim, model.vocab_size) == (
        12,
        1024,
        2048,
        32000,
    )
    assert config.optimizer.learning_rate == 3e-4
    assert config.tokens_per_step == 524_288 and config.context_length == 4096
    assert config.eval.context_length == 16_384


@pytest.mark.parametrize("name", ["seed", "dual", "attention", "ssm"])
def test_baselines_differ_in_the_model_only(name: str) -> None:
    ours, baseline = (RunConfig.from_dict(load(which).to_dict()).to_dict() for which in ("slimpajama", name))
    assert {field for field in ours if ours[field] != baseline[field]} == {"name", "model"}
