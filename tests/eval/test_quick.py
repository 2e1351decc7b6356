"""All quick variants in one go: which there are, and what of a finished run is refused."""

import dataclasses
from pathlib import Path

import pytest

from eval import quick
from eval.common import FAILED_CONTROL, UNFINISHED, load_config
from eval.quick_claims import CLAIMS
from eval.registry import VIEWS
from eval.results import Results, absent, exact

GOOD = Results(
    evaluation="needle",
    settings={},
    seeds=(0,),
    values=(exact("accuracy", 1.0), absent("peer", "unavailable", detail="not installed")),
    command="python -m eval.needle",
    device={"platform": "cpu", "kind": "cpu"},
    versions={"python": "3", "jax": "1", "holo_jax": "0"},
    commit="0",
    started="2026-01-01T00:00:00+00:00",
)


def test_every_evaluation_has_a_quick_variant_that_is_run() -> None:
    assert set(quick.NAMES) == set(VIEWS) >= set(CLAIMS)
    for name in quick.NAMES:
        load_config(name, "quick")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(evaluation="recall"), "one of 'recall'"),
        (dict(notes=(UNFINISHED,)), "unfinished"),
        (dict(values=(absent("accuracy", "oom", detail="no room", length=8),)), "'length': 8}: oom: no room"),
    ],
)
def test_what_is_wrong_is_named(changes: dict, message: str, tmp_path: Path) -> None:
    assert quick.problem(GOOD, "needle", tmp_path) == "table.md or the plots are missing"
    (tmp_path / "table.md").touch()
    assert quick.problem(GOOD, "needle", tmp_path) == "table.md or the plots are missing"
    (tmp_path / "needle.png").touch()
    assert quick.problem(GOOD, "needle", tmp_path) == ""
    assert message in quick.problem(dataclasses.replace(GOOD, **changes), "needle", tmp_path)


def test_only_controls_that_other_processes_disturb_may_fail() -> None:
    slow, wrong = f"{FAILED_CONTROL}a token after 8 takes 1.2", f"{FAILED_CONTROL}attention scored 0.4"
    for notes, allowed in (((), False), ((slow, "other"), True), ((wrong,), False), ((slow, wrong), False)):
        assert quick.only_disturbed(dataclasses.replace(GOOD, notes=notes)) is allowed


def perplexity(value: float) -> Results:
    values = [exact("perplexity", value, bucket="all")]
    values += [exact("bits_per_byte", 8.01, protocol=name) for name in "abc"]
    return dataclasses.replace(GOOD, evaluation="perplexity", values=tuple(values))


def test_known_answers_are_asked_for() -> None:
    assert list(CLAIMS["perplexity"](perplexity(257.0))) == []
    assert list(CLAIMS["perplexity"](perplexity(200.0))) == ["perplexity 200.0; it must be near 258"]
    few = dataclasses.replace(GOOD, settings={"train": ["holo@64"], "train_long": []})
    assert list(CLAIMS["speed"](few)) == ["0 rates of 1 train steps"]
    where = dict(part="mixer", direction="forward")
    timed = dataclasses.replace(few, values=(exact("milliseconds", 1.0, **where),))
    assert any("no floor for the time" in one for one in CLAIMS["speed"](timed))


def test_flags_that_are_given_come_first(monkeypatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert "--xla_backend_optimization_level=1" in quick.flags("recall").split()
    assert "--xla_backend_optimization_level=0" in quick.flags("scaling").split()
    assert "--xla_force_host_platform_device_count=4" in quick.flags("scaling").split()
    given = "--xla_backend_optimization_level=3 --xla_force_host_platform_device_count=2"
    monkeypatch.setenv("XLA_FLAGS", given)
    found = quick.flags("scaling")
    assert found.startswith(given) and "level=0" not in found and "count=4" not in found


def test_a_run_that_fails_is_said_loudly(monkeypatch, tmp_path: Path, capsys) -> None:
    """A process of another kind stands for the evaluation: it ends, and leaves nothing."""
    monkeypatch.setattr(quick.sys, "executable", "/bin/false")
    assert quick.main(["needle", f"--out={tmp_path}"]) == 1
    said = capsys.readouterr().out
    assert "FAILED: exit code 1" in said and said.endswith("eval.quick: failed: needle\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["neddle"], "no evaluation is called 'neddle'"),
        (["--jobs=0"], "--jobs is 0; it must be at least 1"),
        (["--job"], "expected one argument"),
        ([f"--out={__file__}/x"], "is no directory that can be written"),
    ],
)
def test_requests_are_checked(arguments: list[str], message: str, capsys) -> None:
    assert quick.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
