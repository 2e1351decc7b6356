"""The synthetic needle: hand-checked haystacks, streaming against one pass, and a micro run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import haystack, models, needle, needle_view
from eval.common import Reporter, freeze, load_config
from eval.results import absent

GRID = dict(
    seeds=(0, 1), rates=(1e-2,), steps=10, warmup=0.1, weight_decay=0.1, clip=1.0, b2=0.98, log_every=10
)
MICRO = dict(
    models={
        "small": dict(preset="attention", hd_dim=16),
        "holo_256": dict(preset="holo", hd_dim=16, phasors=8),
    },
    select=("holo_256",),
    shared=dict(vocab_size=16, hidden_size=16, num_hidden_layers=1, head_dim=16, memory_backend="portable"),
    kinds=4,
    filler_from=10,
    train=((8, 4), (16, 2)),
    width=16,
    lengths=(16, 32),
    depths=(0.0, 1.0),
    rows=4,
    piece=16,
    forward_rows=2,
    grid=GRID,
    control_from=0.0,
)


def settings(**changes) -> needle.Settings:
    config = load_config("needle", "quick")
    config.update({**MICRO, **changes})
    return freeze(needle.Settings, config)


def build(length: int, depth: float, size: int) -> np.ndarray:
    """Whole sequences, piece by piece."""
    keys, values = jnp.array([2, 3]), jnp.array([6, 7])
    start = jnp.broadcast_to(haystack.needle_start(depth, length), (2,))
    make = functools.partial(haystack.piece, size=size, vocab_size=16, filler_from=10)
    pieces = [make(jax.random.key(0), keys, values, start, length, first) for first in range(0, length, size)]
    return np.concatenate(pieces, axis=1)


def test_haystacks_by_hand():
    rows = build(16, 0.5, 8)
    # 16 - 2 - 3 = 11 places after the first; half of them, rounded to even, is 6.
    assert rows[:, 6:9].tolist() == [[0, 2, 6], [0, 3, 7]]
    assert rows[:, 14:].tolist() == [[1, 2], [1, 3]]
    filler = np.delete(rows, [6, 7, 8, 14, 15], axis=1)
    assert ((filler >= 10) & (filler < 16)).all()
    assert len(np.unique(filler)) == 6
    assert build(16, 0.0, 16)[0, :3].tolist() == [0, 2, 6]
    assert build(16, 1.0, 16)[0, 11:].tolist() == [0, 2, 6, 1, 2]
    assert (haystack.oracle(rows) == jnp.array([6, 7])).all()


def test_training_batches_are_packed_and_the_oracle_solves_them():
    tokens, segments, rows, places, answers = jax.jit(lambda k: needle.training_batch(k, settings()))(
        jax.random.key(1)
    )
    assert tokens.shape == (4, 16)
    assert segments[0].tolist() == [1] * 8 + [2] * 8
    assert segments[2].tolist() == [1] * 16
    assert rows.tolist() == [0, 0, 1, 1, 2, 3]
    assert places.tolist() == [7, 15, 7, 15, 15, 15]
    whole = jnp.stack([tokens[r, p - 7 : p + 1] for r, p in zip(rows[:4], places[:4], strict=True)])
    assert (haystack.oracle(whole) == answers[:4]).all()
    assert (haystack.oracle(tokens[2:]) == answers[4:]).all()


@pytest.mark.slow
def test_pieces_and_one_pass_give_the_same_answers():
    chosen = settings(rows=16, forward_rows=8, piece=16)
    config = models.build_config(chosen.models["holo_256"], chosen.shared, "float32")
    functions = models.build(config)
    params = functions.init(jax.random.key(0))
    ask = jax.jit(functools.partial(needle.streamed, functions, config, chosen))
    whole = jax.jit(functools.partial(needle.forwarded, functions, chosen, length=64))
    found = []
    for seed in range(6):
        key = jax.random.key(seed)
        pieces = np.asarray(ask(params, key, 64, 0.3))
        np.testing.assert_array_equal(pieces, np.asarray(whole(params, key, depth=0.3)))
        found.append(pieces)
    assert 0 < np.mean(found) < 1


@pytest.mark.slow
def test_a_micro_run_has_every_cell():
    chosen = settings(select=("small",))
    reporter = Reporter("needle", chosen, chosen.grid.seeds, out=None, command="python -m eval.needle")
    needle.evaluate(chosen, reporter)
    results = reporter.results()
    for length in (16, 32):
        for depth in (0.0, 1.0):
            assert results.one("accuracy", model="small", length=length, depth=depth).n == 8
            assert len(results.select("accuracy_seed", length=length, depth=depth)) == 2
    assert "small" in needle_view.table(results)
    assert set(needle_view.figures(results, "dark")) == {"needle"}


def test_a_cell_out_of_memory_is_named_and_fails_the_control_of_attention():
    chosen = settings(control_from=0.9)
    reporter = Reporter("needle", chosen, (0,), out=None, command="x")
    reporter.add(absent("accuracy", "oom", detail="", model="small", length=16, depth=0.0))
    assert "OOM" in needle_view.table(reporter.results())
    needle._control("small", chosen, reporter)
    assert len(reporter.failed_controls) == 1


def test_a_model_that_cannot_be_trained_has_no_number_in_any_cell(monkeypatch):
    def run(*_):
        raise MemoryError

    monkeypatch.setattr(needle, "run_model", run)
    reporter = Reporter("needle", settings(), (0,), out=None, command="x")
    needle.evaluate(settings(), reporter)
    assert needle_view.table(reporter.results()).count("OOM") == 4
    assert needle_view.figures(reporter.results(), "light")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(filler_from=16), "filler_from is 16"),
        (dict(kinds=8), "kinds is 8"),
        (dict(lengths=(24,)), "multiple of piece"),
        (dict(depths=(2.0,)), "depths lie in"),
        (dict(train=((5, 4),)), "must divide width"),
        (dict(rows=3), "multiple of forward_rows"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)


@pytest.mark.parametrize("variant", ["full", "quick"])
def test_every_variant_is_valid(variant):
    chosen = freeze(needle.Settings, load_config("needle", variant))
    assert chosen.rows * len(chosen.grid.seeds) >= 200
    for entry in chosen.models.values():
        models.build_config(entry, chosen.shared, chosen.storage)
