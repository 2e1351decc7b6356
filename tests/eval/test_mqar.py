"""The MQAR generator and its packing, against hand-written cases and its stated distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import mqar
from eval.mqar import Examples, Task

SIZES = dict(length=32, pairs=4, vocab_size=64)


def draw(seed: int, examples: int = 64, **options) -> Examples:
    return jax.tree.map(
        np.asarray, mqar.generate(jax.random.key(seed), examples=examples, **SIZES, **options)
    )


@pytest.fixture(scope="module")
def drawn() -> Examples:
    return draw(0)


def test_pairs_come_first_and_queries_ask_them(drawn):
    tokens, places, answers = drawn
    keys, values = tokens[:, 0:8:2], tokens[:, 1:8:2]
    assert tokens.shape == (64, 32)
    assert ((keys >= 1) & (keys < 32)).all()
    assert ((values >= 32) & (values < 64)).all()
    assert (answers == values).all()
    assert (np.take_along_axis(tokens, places, 1) == keys).all()
    assert ((places >= 8) & (places < 32) & (places % 2 == 0)).all()
    for row in (*keys, *values, *places):
        assert len(set(row.tolist())) == 4


def test_non_queries_are_zero_or_random():
    tokens, places, _ = draw(1, random_non_queries=False)
    rest = np.ones_like(tokens, bool)
    rest[:, :8] = False
    np.put_along_axis(rest, places, False, 1)
    assert (tokens[rest] == 0).all()
    assert len(np.unique(draw(1).tokens[rest])) == 64


def test_a_seed_gives_the_same_sequences(drawn):
    assert (draw(0).tokens == drawn.tokens).all()
    assert (draw(1).tokens != drawn.tokens).any()


def test_gaps_follow_the_power_law():
    examples = mqar.generate(jax.random.key(0), examples=20_000, length=32, pairs=1, vocab_size=64)
    gaps = (np.asarray(examples.places)[:, 0] - 2) // 2
    weights = np.arange(1, 16) ** (0.01 - 1.0)
    expected = weights / weights.sum()
    seen = np.bincount(gaps, minlength=15) / gaps.size
    assert np.abs(seen - expected).max() < 4 * np.sqrt(expected.max() / gaps.size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(pairs=9), "at least 4 x pairs"),
        (dict(length=31), "length is 31"),
        (dict(pairs=0), "pairs is 0"),
        (dict(vocab_size=8), "vocab_size is 8"),
    ],
)
def test_sizes_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        mqar.generate(jax.random.key(0), examples=1, **{**SIZES, **change})


def test_packing_by_hand():
    short = Examples(
        tokens=jnp.array([[1, 9, 1, 0], [2, 8, 2, 0], [3, 7, 3, 0]]),
        places=jnp.array([[2], [2], [2]]),
        answers=jnp.array([[9], [8], [7]]),
    )
    long = Examples(jnp.array([[1, 9, 2, 8, 2, 1, 0, 0]]), jnp.array([[5, 4]]), jnp.array([[9, 8]]))
    packed = jax.jit(lambda examples: mqar.pack(examples, 9))([short, long])
    assert packed.tokens.tolist() == [
        [1, 9, 1, 0, 2, 8, 2, 0, 0],
        [3, 7, 3, 0, 0, 0, 0, 0, 0],
        [1, 9, 2, 8, 2, 1, 0, 0, 0],
    ]
    assert packed.segment_ids.tolist() == [
        [1, 1, 1, 1, 2, 2, 2, 2, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 0],
    ]
    assert packed.rows.tolist() == [0, 0, 1, 2, 2]
    assert packed.places.tolist() == [2, 6, 2, 5, 4]
    assert packed.answers.tolist() == [9, 8, 7, 9, 8]
    assert packed.weights.tolist() == [0.25, 0.25, 0.25, 0.125, 0.125]
    answers = mqar.oracle(packed.tokens, packed.segment_ids)[packed.rows, packed.places]
    assert answers.tolist() == packed.answers.tolist()
    with pytest.raises(ValueError, match="does not fit"):
        mqar.pack([long], 4)


def test_the_oracle_scores_one_and_a_blind_guess_chance():
    tasks = (Task(16, 2, 300), Task(64, 8, 70))
    packed = jax.jit(lambda key: mqar.batch(key, tasks, width=64, vocab_size=64))(jax.random.key(3))
    assert packed.answers.size == 2 * 300 + 8 * 70
    found = mqar.oracle(packed.tokens, packed.segment_ids)[packed.rows, packed.places]
    assert (found == packed.answers).all()
    blind = jax.random.randint(jax.random.key(4), packed.answers.shape, 32, 64)
    assert abs(float((blind == packed.answers).mean()) - 1 / 32) < 0.025
