"""Capacity: the codebook, stored states, theory against Monte Carlo, write rules, decoders, a micro run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import capacity, capacity_view, decoders, write_rules
from eval.codebook import best_word, codes, top1_theory
from eval.common import Reporter, freeze, load_config
from eval.results import Results
from eval.state_dtypes import bytes_per_float, store
from eval.superposition import Load, Shape, measure, theory

KEY = jax.random.key(0)


def test_codes_are_signs_that_depend_on_the_word_alone():
    book = np.asarray(codes(KEY, jnp.arange(40), 70))
    assert book.shape == (40, 70)
    assert set(np.unique(book)) == {-1.0, 1.0}
    np.testing.assert_array_equal(codes(KEY, jnp.array([7, 3]), 70), book[[7, 3]])
    assert abs(book.mean()) < 0.1
    overlap = book @ book.T / 70
    assert np.abs(overlap - np.eye(40)).max() < 0.6


def test_the_best_word_is_found_across_blocks():
    book = np.asarray(codes(KEY, jnp.arange(50), 64))
    reads = book[[0, 15, 16, 49]] + 0.1
    word, average, variance = best_word(KEY, jnp.asarray(reads), 50, block=16)
    assert word.tolist() == [0, 15, 16, 49]
    scores = reads @ book.T / 64
    np.testing.assert_allclose(average, scores.mean(1), atol=1e-6)
    np.testing.assert_allclose(variance, scores.var(1), atol=1e-6)
    # Words beyond the vocabulary are not answers.
    word, _, _ = best_word(KEY, jnp.asarray(book[[49]]), 49, block=16)
    assert word[0] < 49


def test_theory_has_its_known_limits():
    assert top1_theory(1.0, 0.0, 0.0, 100) == 1.0
    assert top1_theory(0.0, 1.0, 1.0, 4) == pytest.approx(0.25, abs=1e-6)
    assert top1_theory(1.0, 1e-3, 1e-3, 1000) == pytest.approx(1.0)
    # 99% over 32,000 words at N = D / 21.5.
    found = theory(Shape("hadamard", 2048, 2048, 32_000), Load(95))
    assert found["accuracy"] == pytest.approx(0.99, abs=0.002)
    assert found["snr"] == pytest.approx(np.sqrt(2 * 2048 / 95), rel=0.01)


@pytest.mark.parametrize("shape", [Shape("hadamard", 256, 256, 64), Shape("outer", 8, 32, 64)])
def test_monte_carlo_is_on_the_theory_curve(shape):
    load = Load(32)
    runs = [measure(jax.random.key(seed), shape, load) for seed in range(6)]
    expected = theory(shape, load)
    correct = np.concatenate([np.asarray(r["correct"]) for r in runs])
    assert correct.size == 6 * 128
    if shape.binding == "hadamard":
        assert correct.mean() == pytest.approx(expected["accuracy"], abs=0.05)
    else:  # with 32 channels the scores are correlated, which the formula does not know
        assert expected["accuracy"] - 0.03 < correct.mean() < expected["accuracy"] + 0.15
    assert np.mean([r["mse"] for r in runs]) == pytest.approx(expected["mse"], rel=0.1)
    score, wrong = np.mean([r["score"] for r in runs]), np.mean([r["wrong"] for r in runs])
    assert score / np.sqrt(wrong) == pytest.approx(expected["snr"], rel=0.1)
    if shape.binding == "hadamard":
        # The same program serves other loads: distractors and gates are not compiled in.
        gated = Load(32, distractors=96, gate=0.95, distractor_gate=0.05)
        found = measure(KEY, shape, gated)
        assert float(found["mse"].mean()) == pytest.approx(theory(shape, gated)["mse"], rel=0.15)
        assert float(found["score"].mean()) == pytest.approx(0.95, abs=0.05)
        one = measure(KEY, shape, Load(128, gate=0.0))
        assert float(jnp.abs(one["score"]).max()) == 0.0
        with pytest.raises(ValueError, match="pairs is 33"):
            measure(KEY, shape, Load(33))
        with pytest.raises(ValueError, match="too many memories"):
            measure(KEY, shape, Load(1))


def test_states_in_few_bits():
    key = jax.random.key(1)
    memory = jax.lax.complex(*jax.random.normal(key, (2, 300)))
    errors = {}
    for dtype, bound in (("float32", 0.0), ("bfloat16", 2**-8), ("int8", 1 / 127), ("int4", 1 / 7)):
        error = jnp.abs(store(memory, dtype) - memory)
        errors[dtype] = float(error.mean())
        assert float(error.max()) <= bound * float(jnp.abs(memory).max()) * 2**0.5 + 1e-7
    assert errors["float32"] < errors["bfloat16"] < errors["int8"] < errors["int4"]
    assert not jnp.isnan(store(jnp.zeros(5, jnp.complex64), "int8")).any()
    draws = jnp.stack([store(memory, "int4", jax.random.fold_in(key, i)) for i in range(64)])
    assert float(jnp.abs(draws.mean(0) - memory).mean()) < 0.35 * errors["int4"]
    assert [bytes_per_float(d) for d in ("float32", "bfloat16")] == [4, 2]
    assert bytes_per_float("int4") == 0.5 + 4 / 128
    with pytest.raises(ValueError, match="dtype is 'int2'"):
        store(memory, "int2")


def test_write_rules_do_what_they_say():
    sizes = dict(m=8, d=64, pairs=4, vocabulary=32)
    for task in write_rules.TASKS:
        by_share = {}
        for share in (0.0, 1.0):
            runs = [
                write_rules.measure(jax.random.key(s), jnp.float32(share), task=task, **sizes)
                for s in range(8)
            ]
            by_share[share] = np.mean([np.asarray(r[0]) for r in runs])
            assert np.all([r[1] for r in runs])  # least squares holds 4 pairs in 16 features exactly
        assert by_share[1.0] >= 0.9
        if task == "distinct":
            assert by_share[0.0] >= 0.9
        else:
            assert by_share[0.0] <= 0.8  # the first value and the second are both there


def test_a_linear_decoder_meets_its_bound_and_the_nearest_word_beats_it():
    book = decoders.make_book(KEY, 16, 16)
    z, x = decoders.draw(KEY, book, dimension=256, pairs=4, memories=256, values="codebook")
    assert z.shape == x.shape == (1024, 16)
    a = decoders.least_squares(z, x)
    linear = float(decoders.error(z @ a, x).mean())
    assert linear == pytest.approx(decoders.linear_bound(256, 16, 4), rel=0.25)
    assert float(decoders.error(decoders.nearest(z @ a, book), x).mean()) < linear / 5
    trained = decoders.train_mlp(KEY, z @ a, x, jnp.array([3e-3]), steps=200, batch=64)
    denoised = jax.vmap(lambda p: decoders.error(decoders.mlp(p, z @ a), x).mean())(trained)
    assert float(denoised[0]) < linear
    with pytest.raises(ValueError, match="values is 'none'"):
        decoders.draw(KEY, book, dimension=256, pairs=4, memories=2, values="none")


def settings(**changes) -> capacity.Settings:
    config = load_config("capacity", "quick")
    config.update(changes)
    return freeze(capacity.Settings, config)


def test_a_micro_run_has_tables_and_plots(tmp_path):
    chosen = settings(
        sections=("gating", "rules"), gating_dimension=256, vocabulary=64, gating_lengths=(32, 128),
        rule_pairs=(4,), rule_shape=(8, 64), rule_vocabulary=32,
    )  # fmt: skip
    reporter = Reporter("capacity", chosen, (0,), out=None, command="python -m eval.capacity")
    capacity.evaluate(chosen, reporter)
    reporter.results().write(tmp_path)
    results = Results.read(tmp_path)
    ideal = results.one("accuracy", gate="ideal", length=128, source="measured")
    none = results.one("accuracy", gate="none", length=128, source="measured")
    assert ideal.low > none.high
    assert "write gate" in capacity_view.table(results)
    assert set(capacity_view.figures(results, "dark")) == {"capacity"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sections=("none",)), "sections has"),
        (dict(rule_shares=(2.0,)), "rule_shares has 2.0"),
        (dict(gating_lengths=(8,)), "must hold the 32 facts"),
        (dict(dtypes=("int2",)), "int2"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)
