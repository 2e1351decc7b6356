"""How a token is drawn, on logits small enough to check by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.generate.sampling import Sampling, draw, filter_sorted, row_keys, sample

P = np.array([0.5, 0.25, 0.15, 0.08, 0.02])
LOGITS = jnp.log(jnp.asarray([P], jnp.float32))


def kept(**options: float) -> list[bool]:
    """Which of the five tokens a filter leaves."""
    return np.isfinite(np.asarray(filter_sorted(LOGITS, Sampling(**options).numbers)))[0].tolist()


def draws(
    sampling: Sampling, n: int, logits: jnp.ndarray = LOGITS, seen: jnp.ndarray | None = None
) -> np.ndarray:
    """Share of each token among n rows with the same logits and other seeds."""
    rows = jnp.broadcast_to(logits, (n, logits.shape[-1]))
    seen = None if seen is None else jnp.broadcast_to(seen, rows.shape)
    seeds = jnp.arange(n, dtype=jnp.uint32)
    ids = sample(rows, sampling.numbers, seeds, jnp.full(n, 3, jnp.uint32), seen, plan=sampling.plan)
    assert ids.dtype == jnp.int32
    return np.bincount(np.asarray(ids), minlength=logits.shape[-1]) / n


@pytest.mark.parametrize(
    "options,expected",
    [
        (dict(), 5),
        (dict(top_k=2), 2),
        (dict(top_k=9), 5),
        (dict(top_p=0.5), 1),
        (dict(top_p=0.51), 2),
        (dict(top_p=0.97), 4),
        (dict(top_p=1e-6), 1),
        (dict(min_p=0.29), 3),
        (dict(min_p=0.31), 2),
        (dict(min_p=1.0), 1),
        (dict(top_k=3, top_p=0.8), 2),  # of the three, renormalised, two hold .83
        (dict(top_k=4, min_p=0.29), 3),
    ],
)
def test_filters(options: dict, expected: int) -> None:
    assert kept(**options) == [True] * expected + [False] * (5 - expected)


@pytest.mark.parametrize(
    "sampling,expected",
    [
        (Sampling(), P),
        (Sampling(temperature=0.5), P**2 / (P**2).sum()),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0, 0]),
        (Sampling(temperature=0.0), [1, 0, 0, 0, 0]),
        (Sampling(temperature=0.0, top_p=0.5), [1, 0, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling, expected: np.ndarray) -> None:
    n = 4000
    np.testing.assert_allclose(draws(sampling, n), expected, atol=4 * np.sqrt(0.25 / n))


def test_filters_find_tokens_wherever_they_are() -> None:
    """The vocabulary is not sorted; ids come back in its own order."""
    order = jnp.array([3, 0, 4, 1, 2])
    share = draws(Sampling(top_k=2), 2000, LOGITS[:, order])
    np.testing.assert_allclose(share, [0, 2 / 3, 0, 1 / 3, 0], atol=0.05)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = jnp.array([[2.0, 1.5, -1.0, -1.5]])
    greedy = Sampling(temperature=0.0, repetition_penalty=2.0)
    one = dict(seeds=jnp.zeros(1, jnp.uint32), positions=jnp.zeros(1, jnp.uint32), plan=greedy.plan)
    seen = jnp.array([[True, False, False, False]])
    assert sample(logits, greedy.numbers, seen=seen, **one) == 1
    assert sample(logits[:, 2:], greedy.numbers, seen=seen[:, :2], **one) == 1
    assert sample(logits, greedy.numbers, **one) == 0


def test_noise_is_a_function_of_seed_and_position_alone() -> None:
    logits = jnp.zeros((4, 1000))
    seeds, positions = jnp.array([1, 2, 1, 1], jnp.uint32), jnp.array([5, 5, 6, 5], jnp.uint32)
    plan = Sampling().plan
    ids = np.asarray(sample(logits, Sampling().numbers, seeds, positions, plan=plan))
    assert ids[0] == ids[3] and len({*ids[:3].tolist()}) == 3
    alone = sample(logits[:1], Sampling().numbers, seeds[1:2], positions[1:2], plan=plan)
    assert alone[0] == ids[1]


def test_a_draw_is_argmax_and_looks_at_flags_on_the_way() -> None:
    """The lower of equal scores, what is not a number before all others; flags of each row by themselves."""
    logits = jnp.array([[1.0, 3.0, 3.0, 2.0], [0.0, jnp.nan, 5.0, jnp.nan], [2.0, 1.0, -jnp.inf, 2.0]])
    plan = Sampling(temperature=0.0).plan
    keys = row_keys(jnp.zeros(3, jnp.uint32), jnp.zeros(3, jnp.uint32))
    ids, checks = draw(logits, Sampling().numbers, keys, checked=jnp.isfinite(logits), plan=plan)
    np.testing.assert_array_equal(ids, jnp.argmax(logits, axis=-1))
    np.testing.assert_array_equal(ids, [1, 1, 0])
    np.testing.assert_array_equal(checks, [True, False, False])
    assert ids.dtype == jnp.int32


def test_keys_of_many_positions_are_those_of_each() -> None:
    seeds, positions = jnp.array([7, 8], jnp.uint32), jnp.array([[3, 4], [5, 2**32 - 1]], jnp.uint32)
    keys = row_keys(seeds, positions)
    for n in range(2):
        np.testing.assert_array_equal(keys[n], row_keys(seeds, positions[n]))
    assert len({tuple(key) for key in np.asarray(keys).reshape(4, 2).tolist()}) == 4


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = LOGITS.at[0, 0].set(-jnp.inf)
    for sampling in (Sampling(), Sampling(top_p=0.9, min_p=0.01), Sampling(temperature=0.0)):
        assert draws(sampling, 500, logits)[0] == 0


@pytest.mark.parametrize(
    "options,error,message",
    [
        (dict(temperature=-0.1), ValueError, "temperature is -0.1; it must be zero or positive"),
        (dict(temperature=float("inf")), ValueError, "temperature is inf"),
        (
            dict(temperature=1e-40),
            ValueError,
            "temperature is 1e-40; it must be zero or positive, finite and at",
        ),
        (dict(temperature=float("nan")), ValueError, "temperature is nan"),
        (dict(top_k=-1), ValueError, "top_k is -1"),
        (dict(top_k=1.5), TypeError, "top_k is 1.5; it must be an integer"),
        (dict(top_p=0.0), ValueError, r"top_p is 0.0; it must be in \(0, 1\]"),
        (dict(top_p=1.01), ValueError, "top_p is 1.01"),
        (dict(min_p=-0.5), ValueError, "min_p is -0.5"),
        (dict(min_p=2), ValueError, "min_p is 2"),
        (dict(repetition_penalty=0), ValueError, "repetition_penalty is 0"),
        (dict(repetition_penalty=True), TypeError, "repetition_penalty is True"),
        (dict(temperature="1"), TypeError, "temperature is '1'; it must be a number"),
    ],
)
def test_bad_numbers_are_named(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Sampling(**options)
