"""One step: golden metrics, exact means under accumulation, skipped steps bit for bit, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.common import micro_config
from train.loop import build
from train.model_functions import model_functions
from train.optimizer import learning_rate_schedule, make_optimizer
from train.sharding import batch_sharding, make_mesh, put_batch, replicated
from train.step import make_step_functions

CONFIG = micro_config()
GOLDEN = {"loss": 4.1679535, "grad_norm": 0.35243011, "learning_rate": 0.01 / 3, "num_targets": 120}


def one_device():
    return make_mesh(CONFIG.mesh, jax.devices()[:1])


def initial(steps, mesh, seed: int = 0):
    key = np.asarray(jax.random.key_data(jax.random.key(seed, impl="threefry2x32")))
    return steps.init(jax.device_put(key, replicated(mesh)))


def rows(step: int = 0, padded: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(step)
    tokens = generator.integers(64, size=(8, 16), dtype=np.int32)
    segments = np.ones((8, 16), np.int32)
    for row in range(padded):
        segments[row, 3 + row :] = 0
    return {"tokens": tokens, "segment_ids": segments}


def run(mesh, count: int = 3, parts: int = 1, padded: int = 0, config=CONFIG):
    _, steps = build(config.model, config.optimizer, config.num_steps, mesh)
    state, metrics = initial(steps, mesh), []
    for step in range(count):
        batch = put_batch(rows(step, padded), parts, batch_sharding(mesh))
        state, one = steps.train(state, batch)
        metrics.append(jax.device_get(one))
    return jax.device_get(state), metrics


def test_golden_first_step() -> None:
    _, (metrics,) = run(one_device(), 1, config=micro_config(model__preset="holo"))
    for name, value in GOLDEN.items():
        np.testing.assert_allclose(
            getattr(metrics, name),
            value,
            rtol=2e-5,
            err_msg=(
                f"{name} of the first step of the micro run has changed. Legitimate only if the change was "
                "meant to alter initialisation, the model's mathematics, the loss or clipping: then put the "
                "new value into GOLDEN and say so in CHANGELOG.md. A refactoring or a speed-up must not."
            ),
        )


def test_accumulation_is_the_exact_mean_over_targets() -> None:
    # The padded rows give the parts different numbers of targets: a mean of means would be off.
    whole_state, whole = run(one_device(), 3, parts=1, padded=5)
    state, parts = run(one_device(), 3, parts=4, padded=5)
    for a, b in zip(whole, parts, strict=True):
        assert a.num_targets == b.num_targets < 120
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole_state.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_padding_changes_nothing() -> None:
    mesh = one_device()
    _, steps = build(CONFIG.model, CONFIG.optimizer, CONFIG.num_steps, mesh)
    params = initial(steps, mesh).params
    first = rows(0, padded=5)
    second = {
        "tokens": np.where(first["segment_ids"] == 0, 7, first["tokens"]),
        "segment_ids": first["segment_ids"],
    }
    results = [
        jax.device_get(steps.evaluate(params, put_batch(batch, 1, batch_sharding(mesh))))
        for batch in (first, second)
    ]
    assert results[0] == results[1]


@pytest.mark.devices(8)
def test_eight_devices_equal_one() -> None:
    """The published mechanism; ``test_parallel.py`` has the other models and every axis alone."""
    config = micro_config(model__preset="seed", mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    one_state, one = run(one_device(), 4, config=config)
    state, eight = run(make_mesh(config.mesh), 4, config=config)
    for a, b in zip(one, eight, strict=True):
        assert abs(a.loss - b.loss) < 1e-5
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one_state.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.devices(8)
def test_initialisation_does_not_depend_on_the_mesh() -> None:
    states = []
    for mesh in (one_device(), make_mesh(micro_config(mesh__fsdp=8).mesh)):
        _, steps = build(CONFIG.model, CONFIG.optimizer, CONFIG.num_steps, mesh)
        states.append(jax.device_get(initial(steps, mesh)))
    for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(a, b)


NAN_LOSS, INFINITE_GRADIENT = 63, 62


@functools.cache
def poisoned_steps():
    """Steps whose loss, or gradient alone, is not finite for batches that begin with these tokens."""
    functions = model_functions(CONFIG.model)

    @jax.custom_vjp
    def infinite_gradient(loss, bad):
        return loss

    infinite_gradient.defvjp(
        lambda loss, bad: (loss, bad), lambda bad, g: (jnp.where(bad, jnp.inf, 1.0) * g, None)
    )

    def loss(params, tokens, segment_ids, key):
        total, count = functions.loss(params, tokens, segment_ids, key)
        total = infinite_gradient(total, tokens[0, 0] == INFINITE_GRADIENT)
        return total * jnp.where(tokens[0, 0] == NAN_LOSS, jnp.nan, 1.0), count

    optimizer = make_optimizer(CONFIG.optimizer, CONFIG.num_steps, functions.axes)
    schedule = learning_rate_schedule(CONFIG.optimizer, CONFIG.num_steps)
    return make_step_functions(functions._replace(loss=loss), optimizer, schedule, one_device())


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(tree))]


def test_non_finite_steps_are_skipped_bit_for_bit() -> None:
    mesh, steps = one_device(), poisoned_steps()
    state = initial(steps, mesh)
    first_tokens = [NAN_LOSS, 1, INFINITE_GRADIENT, NAN_LOSS, 1, 1]
    skipped, runs, rates = [], [], []
    for step, token in enumerate(first_tokens):
        batch = rows(step)
        batch["tokens"][0, 0] = token
        before = bits((state.params, state.opt_state))
        state, metrics = steps.train(state, put_batch(batch, 1, batch_sharding(mesh)))
        skipped.append(int(metrics.skipped))
        runs.append(int(metrics.nonfinite_run))
        rates.append(float(metrics.learning_rate))
        same = [a == b for a, b in zip(before, bits((state.params, state.opt_state)), strict=True)]
        assert all(same) if skipped[-1] else not any(same)
        assert int(state.step) == step + 1
    assert skipped == [1, 0, 1, 1, 0, 0]
    assert runs == [1, 0, 1, 2, 0, 0]
    assert int(state.skipped) == 3
    # The schedule counts updates, not steps.
    np.testing.assert_allclose(rates, [0.01 / 3, 0.01 / 3, 0.02 / 3, 0.02 / 3, 0.02 / 3, 0.01], rtol=1e-6)


def test_a_batch_without_targets_is_finite() -> None:
    mesh = one_device()
    _, steps = build(CONFIG.model, CONFIG.optimizer, CONFIG.num_steps, mesh)
    empty = {"tokens": np.zeros((8, 16), np.int32), "segment_ids": np.zeros((8, 16), np.int32)}
    _, metrics = steps.train(initial(steps, mesh), put_batch(empty, 1, batch_sharding(mesh)))
    assert float(metrics.loss) == 0 and int(metrics.num_targets) == 0 and not int(metrics.skipped)
