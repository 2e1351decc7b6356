"""The speed harness: variants, sizes, the gate that holds speeds back, and a run of the quick variant."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import speed
from eval.common import Reporter, freeze, load_config
from eval.results import Results
from eval.speed_parts import gate, timing, train_step
from eval.speed_parts.models import TARGET_PRODUCTS, Size, model_config, parse_variant, product_parameters
from holo_jax import kernels

SMALL = Size(layers=2, width=64, vocab=128)


def settings(**changes) -> speed.Settings:
    config = load_config("speed", "quick")
    config.update(changes)
    return freeze(speed.Settings, config)


@pytest.mark.parametrize("name", ["holo", "holo_sum", "attention", "ssm", "seed", "dual"])
def test_models_have_one_size_in_products(name):
    config = model_config(name, Size(12, 1024, 32_000))
    assert abs(product_parameters(config) / TARGET_PRODUCTS - 1) < 0.05


def test_product_parameters_by_hand():
    config = model_config("attention", SMALL)
    block = 4 * 64 * 64 + 3 * 64 * config.mlp_dim
    assert product_parameters(config) == 2 * block + 64 * 128


def test_variants_are_parsed_and_refused():
    variant = parse_variant("holo@2048 remat=full unroll=12 chunk=512")
    assert (variant.model, variant.length, variant.remat, variant.unroll, variant.chunk) == (
        "holo",
        2048,
        "full",
        12,
        512,
    )
    assert variant.batch(32_768) == 16 and parse_variant("holo@65536").batch(32_768) == 1
    for text, message in (
        ("holo", "must look like"),
        ("rwkv@64", "names the model 'rwkv'"),
        ("holo@64 rematerialise=full", "unknown key 'rematerialise'"),
        ("holo@64 model=seed", "unknown key 'model'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_variant(text)


def test_every_full_setting_is_valid():
    full = freeze(speed.Settings, load_config("speed", "full"))
    assert set(full.profile) <= set(full.train)
    with pytest.raises(ValueError, match="parts names 'flops'"):
        dataclasses.replace(full, parts=("flops",))


def test_failures_are_named():
    assert timing.failure(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))[0] == "oom"
    assert timing.failure(ValueError("no\nmore")) == ("failed", "ValueError: no")
    built = timing.compile_all([timing.Job({"a": 1}, lambda: 1 / 0)], 1, lambda _: None)[0]
    assert built.program is None and built.status == "failed" and "ZeroDivisionError" in built.detail


def test_a_step_in_pieces_of_time_is_the_step():
    """The rematerialised pieces give the loss and the update of the whole sequence."""
    config = model_config("holo_sum", SMALL, precision=speed_precision())
    tokens = jax.random.randint(jax.random.key(0), (2, 64), 0, 128)
    results = []
    for chunk in (0, 16):
        init, step = train_step.make_step(config, 2, 64, chunk)
        (params, _), loss = jax.jit(step)(init(jax.random.key(1)), tokens)
        results.append((loss, params))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), results[0][1], results[1][1])
    # Adam's first step has size 3e-4 whatever the gradient; equal gradients give equal steps.
    assert np.median(jax.tree.leaves(moved)) < 1e-6


def speed_precision():
    from holo_jax.precision import FULL

    return FULL


def test_a_wrong_kernel_gets_no_speeds(monkeypatch, tmp_path):
    """A backend that is off by 3% fails the gate, and nothing that could use it is timed."""
    right = kernels.accumulate

    def wrong(*args, **options):
        outputs, state = right(*args, **options)
        return outputs * 1.03, state

    monkeypatch.setattr(kernels, "accumulate", wrong)
    monkeypatch.setattr(gate, "cases", lambda binding, dtype: [gate.Case(binding, False, 5, False, dtype)])
    chosen = settings()
    reporter = Reporter("speed", chosen, (0,), out=tmp_path, command="test")
    speed.evaluate(chosen, reporter)
    usable = [backend.name for backend in kernels.available() if backend.usable]
    assert len(reporter.failed_controls) == len(usable) + 1  # the portable form has two bindings
    results = Results.read(tmp_path)
    assert results.select("relative_error") and not results.select("milliseconds")
    assert not results.select("tokens_per_second")


@pytest.mark.slow
def test_quick_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gate, "cases", lambda binding, dtype: [gate.Case(binding, False, 5, False, dtype)])
    code = speed.main(
        [
            "--config=configs/eval/speed.py:quick",
            f"--out={tmp_path}",
            "--config.mixers=('holo@64',)",
            "--config.train=('holo@64 remat=dots',)",
        ]
    )
    assert code == 0, capsys.readouterr()
    results = Results.read(tmp_path)
    assert len(results.select("tokens_per_second")) == 1
    for value in results.select("milliseconds"):
        assert (
            value.value > 0 and results.one("floor_milliseconds", **value.where)
            if "direction" in value.where
            else True
        )
    assert "tokens/s" in (tmp_path / "table.md").read_text()
