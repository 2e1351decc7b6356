"""Recall of vectors through one block: the task, its scoring, and a micro run that tells presets apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import capacity_view, raw_recall
from eval.capacity import Settings
from eval.common import Reporter, freeze, load_config
from eval.decoders import make_book
from eval.models import build_config
from eval.results import mean

KEY = jax.random.key(0)


def settings(**changes) -> Settings:
    config = load_config("capacity", "quick")
    config.sections = ("presets",)
    with config.unlocked():
        config.presets.update(
            dict(channels=8, words=8, train_pairs=2, test_pairs=(2,), batch=32, test_memories=64)
        )
        config.presets.shared.head_dim = 16
        config.presets.grid.update(dict(steps=150, log_every=150))
        config.presets.update(changes)
    return freeze(Settings, config)


def test_pairs_then_queries_and_their_scores():
    book = make_book(KEY, 5, 4)
    sequence, words = raw_recall.draw(KEY, book, memories=3, pairs=6)
    assert sequence.shape == (3, 18, 8)
    written, asked = np.asarray(sequence[:, :12]).reshape(3, 6, 2, 8), np.asarray(sequence[:, 12:])
    assert not written[:, :, 0, 4:].any() and not written[:, :, 1, :4].any() and not asked[..., 4:].any()
    for memory in range(3):
        for query, word in zip(asked[memory], words[memory], strict=True):
            (pair,) = np.flatnonzero((written[memory, :, 0] == query).all(-1))
            np.testing.assert_array_equal(written[memory, pair, 1, 4:], book[word])
    perfect = raw_recall.score(book[words], words, book)
    assert (float(perfect[0]), float(perfect[1])) == (0.0, 1.0)
    wrong = raw_recall.score(book[(words + 1) % 5], words, book)
    assert float(wrong[0]) > 0.5 and float(wrong[1]) == 0.0


def test_the_answer_is_read_from_what_was_written_before():
    config = build_config(
        dict(preset="holo", hd_dim=16, phasors=4), dict(hidden_size=8, head_dim=8), "float32"
    )
    config = config.replace(num_hidden_layers=1)
    block = raw_recall.OneBlock(config)
    sequence, _ = raw_recall.draw(KEY, make_book(KEY, 5, 4), memories=2, pairs=3)
    first = jax.jit(jax.grad(lambda x: block.recall(block.init(KEY), x)[:, 0].sum()))(sequence)
    seen = np.asarray(jnp.abs(first).sum((0, 2)))
    assert (seen[:7] > 0).all() and not seen[7:].any()


@pytest.mark.slow
def test_content_addressing_recalls_vectors_and_positions_do_not():
    """Without any denoiser; fixed positional phasors cannot tell which value belongs to a key."""
    chosen = settings(
        select=("holo_nomlp", "seed_nomlp"),
    )
    reporter = Reporter("capacity", chosen, (0,), out=None, command="x")
    raw_recall.evaluate(chosen.presets, reporter, KEY)
    results = reporter.results()
    accuracy = {v.where["model"]: v.value for v in results.select("accuracy")}
    assert accuracy["holo_nomlp"] >= 0.95
    assert accuracy["seed_nomlp"] <= 0.75  # one of two values, by chance right in more than half of the reads
    assert any("control of the harness" in note for note in results.notes)
    text = capacity_view.table(results)
    assert "Top-1 by preset" in text and "seed_nomlp" in text


@pytest.mark.slow
def test_attention_below_the_line_fails_the_control():
    chosen = settings(select=("attention",), control_from=1.1, grid=dict(
        seeds=(0,), rates=(1e-2,), steps=1, warmup=0.0, weight_decay=0.0, clip=1.0, b2=0.98, log_every=1,
    ))  # fmt: skip
    reporter = Reporter("capacity", chosen, (0,), out=None, command="x")
    raw_recall.evaluate(chosen.presets, reporter, KEY)
    assert len(reporter.failed_controls) == 1 and "must reach 1.1" in reporter.failed_controls[0]


def test_presets_are_drawn_by_denoiser_in_one_colour():
    chosen = settings(select=("holo_sum", "holo_sum_nomlp", "dual_nomlp"), test_pairs=(2, 4))
    reporter = Reporter("capacity", chosen, (0,), out=None, command="x")
    for model, score in {"holo_sum": 0.9, "holo_sum_nomlp": 0.5, "dual_nomlp": 0.7}.items():
        for pairs in chosen.presets.test_pairs:
            where = {"section": "presets", "model": model, "pairs": pairs}
            reporter.add(mean("accuracy", np.array([score / pairs]), **where))
            reporter.add(mean("mse", np.array([1 - score / pairs]), **where))
    figures = capacity_view.figures(reporter.results(), "light")
    assert set(figures) == {"presets"}
    axes = figures["presets"].axes
    assert [a.get_title(loc="left") for a in axes[:2]] == ["denoiser: own MLP", "denoiser: none"]
    drawn = [{line.get_label(): line for line in axis.lines} for axis in axes]
    assert [set(lines) for lines in drawn] == 2 * [{"holo_sum"}, {"holo_sum", "dual"}]
    np.testing.assert_allclose(drawn[3]["dual"].get_ydata(), [0.65, 0.825])
    assert len({lines["holo_sum"].get_color() for lines in drawn}) == 1


def test_settings_are_checked():
    with pytest.raises(ValueError, match="did you mean 'seed'"):
        settings(select=("sead",))
    with pytest.raises(ValueError, match="hold train_pairs"):
        settings(test_pairs=(3,))
