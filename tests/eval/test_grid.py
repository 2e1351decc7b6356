"""The grid trainer on a model whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import recall
from eval.grid import Grid, Trained, choose_rate, select_rate, train

SETTINGS = dict(warmup=0.1, weight_decay=0.0, clip=10.0, b2=0.99, log_every=20)


def init(key):
    return {"w": 0.1 * jax.random.normal(key, (3, 2))}


def draw(key):
    x = jax.random.normal(key, (16, 3))
    return x, x @ jnp.arange(6.0).reshape(3, 2)


def loss(params, batch):
    x, y = batch
    return jnp.mean(jnp.square(x @ params["w"] - y))


@pytest.fixture(scope="module")
def trained():
    grid = Grid(seeds=(0, 1), rates=(1e-4, 0.2), steps=100, **SETTINGS)
    counted = []
    result = train(grid, init, loss, draw, done=counted.append)
    assert counted == [20] * 5
    return result


def test_every_seed_and_rate_is_trained(trained):
    assert trained.params["w"].shape == (2, 2, 3, 2)
    assert trained.losses.shape == (2, 2, 5)
    assert trained.steps.tolist() == [20, 40, 60, 80, 100]
    assert not trained.skipped.any()
    assert (trained.losses[:, 1, -1] < 0.1).all()
    assert (trained.losses[:, 0, -1] > 1.0).all()
    assert np.abs(select_rate(trained.params, 1)["w"][0] - np.arange(6.0).reshape(3, 2)).max() < 0.3
    assert trained.losses[0, 1, 0] != trained.losses[1, 1, 0]


def test_a_grid_member_is_what_it_would_be_alone(trained):
    alone = train(Grid(seeds=(1,), rates=(0.2,), steps=100, **SETTINGS), init, loss, draw)
    np.testing.assert_allclose(alone.params["w"][0, 0], trained.params["w"][1, 1], rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing():
    broken = train(
        Grid(seeds=(0,), rates=(0.2,), steps=20, **SETTINGS), init, lambda p, b: loss(p, b) * jnp.nan, draw
    )
    assert np.isnan(broken.losses).all()
    start = init(jax.random.fold_in(jax.random.key(0), 0))["w"]
    np.testing.assert_allclose(broken.params["w"][0, 0], start, rtol=1e-6)
    assert broken.skipped.tolist() == [[20]]
    with pytest.raises(FloatingPointError, match="at every learning rate"):
        choose_rate(broken.score(np.array([[0.5]])))


def test_the_schedule_rises_and_falls_to_zero():
    grid = Grid(seeds=(0,), rates=(1.0,), steps=100, **SETTINGS)
    sizes = [float(grid.schedule(jnp.float32(s))) for s in (0, 9, 55, 100)]
    assert sizes[0] == pytest.approx(0.1)
    assert sizes[1] == pytest.approx(1.0)
    assert sizes[2] == pytest.approx(0.5)
    assert sizes[3] == pytest.approx(0.0, abs=1e-6)


def test_the_rate_is_chosen_over_seeds_and_diverged_rates_are_out():
    assert choose_rate(np.array([[0.1, 0.9, np.nan], [0.2, 0.4, 1.0]])) == 1
    assert choose_rate(np.array([[np.nan, 0.3]])) == 1


def test_what_a_diverged_member_scores_is_no_result():
    losses = np.array([[[1.0, np.nan], [1.0, 0.5]], [[1.0, 0.2], [np.nan, 0.5]]])
    members = Trained({}, losses, np.array([1, 2]), np.array([[1, 0], [0, 1]]))
    assert members.diverged.tolist() == [[True, False], [False, False]]
    scores = members.score(np.array([[0.9, 0.4], [0.9, 0.4]]))
    assert choose_rate(scores) == 1
    assert recall.validation(scores[:, 0], model="m").status == "diverged"
    assert recall.validation(scores[:, 1], model="m").value == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seeds=(1, 1)), "all different"),
        (dict(rates=()), "positive learning rates"),
        (dict(steps=30), "multiple of log_every"),
        (dict(warmup=1.0), "share of the steps"),
        (dict(clip=0.0), "clip is 0.0"),
    ],
)
def test_a_grid_is_checked(change, message):
    good = dict(seeds=(0,), rates=(1e-3,), steps=40, **SETTINGS)
    with pytest.raises(ValueError, match=message):
        Grid(**{**good, **change})
