"""RULER-style tasks: every sample can be answered from its prompt, fits its length, and is scored right."""

import dataclasses

import numpy as np
import pytest

from eval import ruler, ruler_view
from eval.common import Reporter, freeze, load_config
from eval.merge import merge
from eval.results import absent, mean
from eval.ruler_tasks import SINGLES, TASKS, fit, insert, make, oracle, prose, score


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize("task", TASKS)
def test_a_perfect_reader_scores_one_and_a_blind_one_nothing(task):
    depth = 0.5 if task in SINGLES else None
    blind = []
    for seed in range(10):
        sample = make(task, 30, depth, seed)
        assert score(oracle(sample.prompt), sample.answers) == 1.0
        other = make(task, 30, depth, seed + 100)
        blind.append(score(oracle(other.prompt), sample.answers))
    assert np.mean(blind) == 0.0
    assert len(sample.answers) == {"multivalue": 4, "multiquery": 4, "variables": 5}.get(task, 1)


@pytest.mark.parametrize("task", TASKS)
def test_samples_fit_and_are_reproducible(task):
    depth = 1.0 if task in SINGLES else None
    sample, ids, units = fit(task, 4000, encode, depth=depth, seed=3)
    assert 0.85 * 4000 <= len(ids) <= 4000
    assert ids == encode(sample.prompt)
    assert make(task, units, depth, 3) == sample
    again = fit(task, 4000, encode, depth=depth, seed=4, guess=int(0.98 * units))
    assert len(again[1]) <= 4000
    assert again[0].answers != sample.answers
    with pytest.raises(ValueError, match="without any haystack"):
        fit(task, 50, encode, depth=depth, seed=3)


def test_needles_by_hand():
    hay = ["a.", "b.", "c.", "d."]
    assert insert(hay, ["X."], [0.0]) == "X. a. b. c. d."
    assert insert(hay, ["X."], [0.5]) == "a. b. X. c. d."
    assert insert(hay, ["X."], [1.0]) == "a. b. c. d. X."
    assert insert(hay, ["X.", "Y."], [0.8, 0.2]) == "a. Y. b. c. X. d."
    for depth, share in ((0.0, 0.1), (0.5, 0.5), (1.0, 0.85)):
        prompt = make("single_1", 200, depth, 0).prompt
        assert prompt.index("One of the special") / len(prompt) == pytest.approx(share, abs=0.15)


def test_scores_by_hand():
    assert score("they are 12 and ABC", ("12", "abc")) == 1.0
    assert score("they are 12", ("12", "34", "56", "78")) == 0.25
    assert score("", ("12",)) == 0.0


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="task is 'none'"):
        make("none", 1, 0.5, 0)
    with pytest.raises(ValueError, match="have one, the others none"):
        make("multikey", 1, 0.5, 0)
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ValueError, match="it needs 100"):
        prose(str(tmp_path / "short.txt"))
    config = load_config("ruler", "full")
    with pytest.raises(ValueError, match="checkpoint is empty"):
        freeze(ruler.Settings, config)
    config.checkpoint = "random"
    config.lengths = (40,)
    with pytest.raises(ValueError, match="exceed answer_tokens"):
        freeze(ruler.Settings, config)


def test_a_text_of_ones_own(tmp_path):
    text = " ".join(f"This is sentence number {i} of the text." for i in range(150))
    (tmp_path / "own.txt").write_text(text)
    sample = make("single_2", 20, 0.5, 0, str(tmp_path / "own.txt"))
    assert "of the text. One of the special magic numbers for" in sample.prompt


class Perfect:
    """Stands in for the model: answers by reading the prompt."""

    def __init__(self, fails: bool = False):
        self.fails = fails

    def __call__(self, opened, prompts, settings):
        if self.fails:
            raise MemoryError("no room")
        return [oracle(opened.tokenizer.decode(ids)) for ids in prompts]


def run(monkeypatch, **changes):
    config = load_config("ruler", "quick")
    config.update({"tasks": TASKS, "lengths": (2048,), "depths": (0.0, 1.0), "published": True})
    settings = freeze(ruler.Settings, config)
    monkeypatch.setattr(ruler, "answer", Perfect(**changes))
    reporter = Reporter("ruler", settings, (0,), out=None, command="python -m eval.ruler")
    ruler.evaluate(settings, reporter)
    return reporter.results()


def test_the_whole_harness_scores_an_oracle_one(monkeypatch, tmp_path):
    results = run(monkeypatch)
    measured = results.select("score", source="measured")
    assert len(measured) == 3 * 2 + 4
    assert all(v.value == 1.0 for v in measured)
    assert {v.n for v in measured} == {2, 4}
    results.write(tmp_path)
    assert "not measured here" in ruler_view.table(results)
    assert set(ruler_view.figures(results, "dark")) == {"ruler"}
    other = dataclasses.replace(
        results,
        settings={**results.settings, "checkpoint": "runs/b"},
        values=tuple(dataclasses.replace(v, where={**v.where, "model": "b, step 2"}) for v in measured),
    )
    joined = merge([results, other])
    assert "b, step 2: share of expected strings" in ruler_view.table(joined)
    labels = [axis.get_ylabel() for axis in ruler_view.figures(joined, "light")["ruler"].axes]
    assert labels[4] == "b, step 2\ndepth"


def test_out_of_memory_is_not_zero(monkeypatch):
    results = run(monkeypatch, fails=True)
    assert {v.status for v in results.select("score", source="measured")} == {"oom"}
    assert "OOM" in ruler_view.table(results)


def test_views_take_partial_credit():
    config = load_config("ruler", "quick")
    config.tasks = ("multivalue",)
    settings = freeze(ruler.Settings, config)
    reporter = Reporter("ruler", settings, (0,), out=None, command="x")
    where = {"model": "m", "task": "multivalue", "length": 640, "depth": None}
    reporter.add(mean("score", [0.25, 0.75], **where))
    assert "0.50" in ruler_view.table(reporter.results())
    assert absent("score", "oom", detail="", **where).value is None
