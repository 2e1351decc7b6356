"""eval.recall on a model small enough for a test: scoring, controls, results, plots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import mqar, recall, recall_view
from eval.common import Reporter, freeze, load_config
from eval.merge import merge
from eval.models import MISSING_CONTROL, build_config, check_selection, state_floats
from eval.results import Results

MICRO = dict(
    models={
        "small": dict(preset="attention", hd_dim=16),
        "holo_512": dict(preset="holo", hd_dim=16, phasors=4),
    },
    select=("small",),
    control_from=0.0,
    shared=dict(vocab_size=16, hidden_size=16, num_hidden_layers=1, head_dim=8, memory_backend="portable"),
    train=((8, 1, 32),),
    width=8,
    test=((8, 1), (16, 2)),
    averaged=2,
    test_width=16,
    test_rows=16,
    test_batch=16,
)
GRID = dict(
    seeds=(0, 1), rates=(1e-2,), steps=40, warmup=0.1, weight_decay=0.1, clip=1.0, b2=0.98, log_every=20
)


def settings(**changes) -> recall.Settings:
    config = load_config("recall", "quick")
    config.update({**MICRO, "grid": GRID, **changes})
    return freeze(recall.Settings, config)


@pytest.fixture(scope="module")
def results() -> Results:
    chosen = settings(published=True)
    reporter = Reporter("recall", chosen, chosen.grid.seeds, out=None, command="python -m eval.recall")
    recall.evaluate(chosen, reporter)
    assert reporter.failed_controls == []
    return reporter.results()


@pytest.mark.slow
def test_a_run_has_every_cell(results, tmp_path):
    results.write(tmp_path)
    for length, pairs in ((8, 1), (16, 2)):
        value = results.one("accuracy", model="small", length=length, pairs=pairs)
        assert value.n == 2
        per_seed = results.select("accuracy_seed", model="small", length=length)
        assert [v.n for v in per_seed] == [16 * 16 // length * pairs] * 2
        assert value.value == pytest.approx(np.mean([v.value for v in per_seed]))
    assert results.one("state_bytes", model="small").value == 4 * 2 * 16 * 16
    losses = [v.value for v in results.select("train_loss")]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_views_show_ours_and_the_published(results):
    text = recall_view.table(results)
    assert "small" in text
    assert "not measured here" in text
    figures = recall_view.figures(results, "dark")
    assert set(figures) == {"recall", "recall_state"}
    drawn = {t.get_text() for t in figures["recall_state"].axes[0].texts}
    assert {"DeltaNet", "Mamba-2", "Based"} <= drawn
    assert recall_view.family("holo_sum_4k") == "holo_sum"
    assert recall_view.family("attention_nomlp") == "attention_nomlp"
    assert recall_view.family("holo_nogate_4k") == "holo_nogate"
    assert recall_view._name("holo_nogate") == "holo (erase), no output gate"
    assert recall_view._look("holo_nogate")["color"] == recall_view._look("holo")["color"]


def test_scoring_an_oracle_and_a_blind_guess():
    chosen = settings()
    batches = jax.jit(lambda key: recall.test_batches(key, chosen, 16, 2))(jax.random.key(0))
    perfect = lambda b: mqar.oracle(b.tokens, b.segment_ids)[b.rows, b.places][None]  # noqa: E731
    assert recall.score(perfect, batches) == (np.array([32]), 32)
    right, n = recall.score(lambda b: jnp.zeros((3, b.answers.size), jnp.int32), batches)
    assert right.tolist() == [0, 0, 0]
    assert n == 32


@pytest.mark.slow
def test_attention_below_the_line_is_a_failed_control(results):
    for line, failures in ((0.0, 0), (1.1, 1)):
        reporter = Reporter("recall", settings(), (0,), out=None, command="x")
        reporter.add(*results.values)
        recall.check_control("small", settings(control_from=line), reporter)
        assert len(reporter.failed_controls) == failures  # one test is at a trained length, one beyond
    assert "harness" in reporter.failed_controls[0]


def test_out_of_memory_and_divergence_are_recorded_and_other_errors_are_not(monkeypatch):
    chosen = settings()

    def fail(error):
        def run(*_):
            raise error

        return run

    reporter = Reporter("recall", chosen, (0,), out=None, command="x")
    monkeypatch.setattr(recall, "run_model", fail(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")))
    recall.evaluate(chosen, reporter)
    assert reporter.results().one("accuracy_mean", model="small").status == "oom"
    assert "OOM" in recall_view.table(reporter.results())
    assert "could not be trained" in reporter.failed_controls[0]
    reporter = Reporter("recall", chosen, (0,), out=None, command="x")
    monkeypatch.setattr(recall, "run_model", fail(FloatingPointError("not finite at every learning rate")))
    recall.evaluate(chosen, reporter)
    assert "diverged" in recall_view.table(reporter.results())
    monkeypatch.setattr(recall, "run_model", fail(jax.errors.JaxRuntimeError("INVALID_ARGUMENT")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID"):
        recall.evaluate(chosen, reporter)


def test_selection_and_settings_are_checked():
    with pytest.raises(ValueError, match="did you mean 'holo_512'"):
        check_selection(MICRO["models"], ("holo_51",))
    with pytest.raises(ValueError, match="width is 4"):
        settings(width=4)
    with pytest.raises(ValueError, match="at least 4 x pairs"):
        settings(test=((8, 3),), averaged=1)


@pytest.mark.parametrize("variant", ["full", "zoology", "quick"])
def test_every_variant_is_valid_and_every_model_builds(variant):
    chosen = freeze(recall.Settings, load_config("recall", variant))
    for name, entry in chosen.models.items():
        config = build_config(entry, chosen.shared, chosen.storage)
        floats = state_floats(config, 256)
        assert floats > 0, name
        if name.endswith("_4k"):
            assert floats == 2 * 4096, name


def test_runs_of_different_models_merge(results):
    other = Results(
        **{
            **{
                f: getattr(results, f)
                for f in ("evaluation", "seeds", "device", "versions", "commit", "started")
            },
            "settings": {**results.settings, "select": ["holo_512"]},
            "values": tuple(v for v in results.values if v.source == "published"),
            "command": "python -m eval.recall --more",
        }
    )
    joined = merge([results, other])
    assert joined.settings["select"] == ("small", "holo_512")
    assert "--more" in joined.command
    assert len(joined.values) == len(results.values)
    # A part without attention says so; the whole has it.
    apart = Results(**{**vars(other), "notes": (MISSING_CONTROL,)})
    assert MISSING_CONTROL not in merge([results, apart]).notes
    assert MISSING_CONTROL in merge([apart]).notes
    changed = Results(**{**vars(other), "settings": {**other.settings, "power": 0.5}})
    with pytest.raises(ValueError, match="setting power"):
        merge([results, changed])


def test_models_of_a_section_merge(results):
    parts = [
        Results(
            **{
                **vars(results),
                "settings": {
                    "sections": ["presets"],
                    "presets": {"select": [name], "models": {**MICRO["models"]}},
                },
                "values": (),
                "notes": (MISSING_CONTROL,),
            }
        )
        for name in ("small", "holo_512")
    ]
    joined = merge(parts)
    assert joined.settings["presets"]["select"] == ("small", "holo_512")
    assert joined.settings["sections"] == ("presets",)
    assert MISSING_CONTROL not in joined.notes
    parts[1].settings["presets"]["models"]["later"] = {"preset": "ssm"}
    assert "later" in merge(parts).settings["presets"]["models"]
    parts[1].settings["presets"]["models"]["small"] = {"preset": "ssm"}
    with pytest.raises(ValueError, match=r"setting presets\.models\.small\.preset"):
        merge(parts)


def test_hosts_may_differ_where_nothing_is_timed(results):
    elsewhere = Results(
        **{**vars(results), "device": {**results.device, "host": "x86_64, 64 cores"}, "values": ()}
    )
    assert merge([results, elsewhere]).device["host"].endswith("; x86_64, 64 cores")
    timed = [Results(**{**vars(run), "evaluation": "speed"}) for run in (results, elsewhere)]
    with pytest.raises(ValueError, match="differ in device"):
        merge(timed)
    other = Results(**{**vars(elsewhere), "device": {**results.device, "kind": "another"}})
    with pytest.raises(ValueError, match="differ in device"):
        merge([results, other])
