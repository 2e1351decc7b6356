"""The results schema, its intervals, and what it refuses."""

import json

import numpy as np
import pytest

from eval.intervals import bootstrap, wilson
from eval.results import (
    FILENAME,
    Results,
    Value,
    absent,
    exact,
    mean,
    proportion,
    published,
    theory,
    validate,
    write_atomically,
)


def make_results(values) -> Results:
    return Results(
        evaluation="capacity",
        settings={"sizes": (1, 2)},
        seeds=(0,),
        values=tuple(values),
        notes=("a note",),
        command="python -m eval.capacity --out=x",
        device={"platform": "cpu", "kind": "cpu"},
        versions={"python": "3", "jax": "0", "holo_jax": "0"},
        commit="abc",
        started="2026-01-01T00:00:00+00:00",
        seconds=1.5,
    )


VALUES = (
    proportion("accuracy", 9, 10, model="holo", pairs=4),
    mean("mse", [1.0, 2.0, 3.0], model="holo"),
    exact("ratio", 1.5, model="rope"),
    theory("accuracy", 0.9, model="holo", pairs=4),
    published("accuracy", 0.79, citation="somebody, 2024", model="delta"),
    absent("accuracy", "oom", detail="RESOURCE_EXHAUSTED", model="attention", pairs=4),
)


def test_results_survive_the_file(tmp_path):
    path = make_results(VALUES).write(tmp_path)
    assert path == tmp_path / FILENAME
    read = Results.read(tmp_path)
    assert list(read.values) == list(VALUES)
    assert read.settings == {"sizes": [1, 2]}
    assert read.one("accuracy", model="holo", pairs=4, source="measured").n == 10


def test_out_of_memory_has_no_number():
    value = absent("accuracy", "oom", detail="x", model="attention")
    assert value.value is None
    with pytest.raises(ValueError, match="no number"):
        Value("accuracy", {}, 0.0, 0.0, 0.0, 1, "exact", status="oom")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(value=float("nan"), low=0.0, high=1.0, n=1, interval="wilson"), "finite"),
        (dict(value=0.5, low=0.6, high=1.0, n=1, interval="wilson"), "low <= value <= high"),
        (dict(value=0.5, low=0.4, high=0.6, n=0, interval="wilson"), "at least 1"),
        (dict(value=0.5, low=0.4, high=0.6, n=1, interval="exact"), "equal the value"),
        (dict(value=0.5), "needs an interval"),
        (dict(value=0.5, interval="student"), "one of wilson"),
        (dict(value=0.5, low=0.5, high=0.5, n=1, interval="exact", source="guess"), "one of measured"),
    ],
)
def test_a_value_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Value("accuracy", {}, **arguments)


def test_a_setting_must_be_plain():
    with pytest.raises(TypeError, match="lengths"):
        Value("accuracy", {"lengths": [1]}, 0.5, 0.5, 0.5, 1, "exact")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: d.pop("commit"), ValueError, "commit"),
        (lambda d: d.update(extra=1), ValueError, "extra"),
        (lambda d: d.update(seeds=["a"]), TypeError, "seeds"),
        (lambda d: d.update(schema=99), ValueError, "schema is 99"),
        (lambda d: d.update(values=[]), ValueError, "empty"),
        (lambda d: d.update(command=""), ValueError, "command"),
        (lambda d: d["device"].pop("kind"), ValueError, "kind"),
        (lambda d: d["values"].append(d["values"][0]), ValueError, "two values"),
        (lambda d: d.update(values={}), TypeError, "values"),
    ],
)
def test_a_file_off_the_schema_is_refused(change, error, message):
    data = make_results(VALUES).to_dict()
    validate(data)
    change(data)
    with pytest.raises(error, match=message):
        validate(data)


def test_writing_is_atomic(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    with pytest.raises(TypeError):
        write_atomically(path, 3)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_nan_never_reaches_a_file(tmp_path):
    results = make_results([exact("ratio", 1.0)])
    object.__setattr__(results, "seconds", float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_wilson_against_published_values():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    p, low, high = wilson(81, 263)
    assert (round(p, 4), round(low, 4), round(high, 4)) == (0.3080, 0.2553, 0.3662)
    assert tuple(round(x, 4) for x in wilson(0, 20)) == (0.0, 0.0, 0.1611)
    assert wilson(20, 20)[2] == 1.0
    with pytest.raises(ValueError, match=r"within 0\.\.3"):
        wilson(4, 3)
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)


def test_bootstrap_is_seeded_and_covers():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(60):
        sample = rng.normal(2.0, 1.0, 40)
        value, low, high = bootstrap(sample, seed=seed, resamples=400)
        assert low <= value <= high
        covered += low <= 2.0 <= high
    assert covered >= 50
    assert bootstrap(sample, seed=1) == bootstrap(sample, seed=1)
    with pytest.raises(ValueError, match="finite"):
        bootstrap([1.0, np.nan])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


def test_the_file_is_plain_json(tmp_path):
    data = json.loads(make_results(VALUES).write(tmp_path).read_text())
    assert data["schema"] == 1
    assert data["values"][0]["where"] == {"model": "holo", "pairs": 4}
