"""The command line every evaluation shares, on the smallest of them."""

import dataclasses
from pathlib import Path

import pytest

from eval import common, orthogonality, plots
from eval.common import Reporter, freeze, load_config, markdown_table
from eval.results import Results, absent, exact, proportion

MICRO = (
    "--config.components=(16, 64)",
    "--config.windows=(1, 5, 64)",
    "--config.draws=8",
    "--config.positions=(1, 100000)",
    "--config.frequencies=4096",
)


def test_a_run_writes_results_plot_and_table(tmp_path, capsys):
    assert orthogonality.main([f"--out={tmp_path}", *MICRO]) == 0
    results = Results.read(tmp_path)
    assert results.evaluation == "orthogonality"
    assert results.command.startswith("python -m eval.orthogonality --out=")
    assert results.settings["draws"] == 8
    assert (tmp_path / "orthogonality.png").stat().st_size > 10_000
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    rounded = [round(results.one("ratio", code="rope", components=64, window=w).value, 2) for w in (1, 5, 64)]
    assert rounded == [1.03, 1.20, 1.72]
    random = results.one("ratio", code="uniform", components=64, window=64)
    assert 13 < random.value < 16
    assert 0.05 < results.one("phase_error", method="float32", position=100_000).value < 0.5
    assert results.one("phase_error", method="turns", position=100_000).value < 4e-7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.drawz=3"], 'Did you mean "draws"'),
        (["--config=configs/eval/orthogonality.py:quik"], "did you mean 'quick'"),
        (["--config=configs/eval/none.py"], "none.py"),
        (["--config.draws=many"], "draws"),
        (["--config.components=(0,)"], "components is (0,)"),
        (["--config.shown=17"], "shown is 17"),
        (["--ouput=x"], "ouput"),
        (["stray"], "stray"),
    ],
)
def test_a_wrong_command_line_is_refused_with_code_2(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert orthogonality.main([f"--out={tmp_path / 'out'}", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_out_is_required(capsys):
    assert orthogonality.main([]) == 2
    assert "--out" in capsys.readouterr().err


def test_help_describes_the_evaluation(capsys):
    assert orthogonality.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "Similarity of position codes" in out
    assert "--out" in out


@dataclasses.dataclass(frozen=True)
class Inner:
    steps: int


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    rate: float
    sizes: tuple[int, ...]
    pair: tuple[int, str]
    limit: int | None
    inner: Inner


GOOD = dict(name="a", rate=1, sizes=[1, 2], pair=(1, "x"), limit=None, inner=dict(steps=3))


def test_freeze_converts_only_what_it_says():
    settings = freeze(Outer, GOOD)
    assert settings == Outer("a", 1.0, (1, 2), (1, "x"), None, Inner(3))
    assert isinstance(settings.rate, float)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(name=1), TypeError, r"config.name is 1"),
        (dict(rate=True), TypeError, r"config.rate is True"),
        (dict(sizes="12"), TypeError, r"config.sizes is '12'"),
        (dict(sizes=[1, 2.5]), TypeError, r"config.sizes\[1\] is 2.5"),
        (dict(pair=(1,)), TypeError, r"must have 2 entries"),
        (dict(limit="x"), TypeError, r"config.limit"),
        (dict(inner=dict(stps=1)), ValueError, r"config.inner lacks \['steps'\].*stps"),
        (dict(more=1), ValueError, r"unknown \['more'\]"),
    ],
)
def test_freeze_refuses(change, error, message):
    with pytest.raises(error, match=message):
        freeze(Outer, {**GOOD, **change})


def test_partial_results_survive_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "_WRITE_EVERY", 0.0)
    settings = freeze(orthogonality.Settings, load_config("orthogonality", "quick"))
    reporter = Reporter("orthogonality", settings, (0,), out=tmp_path, command="python -m eval.x")
    reporter.add(exact("ratio", 1.0, code="rope"))
    partial = Results.read(tmp_path)
    assert len(partial.values) == 1
    assert "unfinished" in partial.notes[-1]
    assert reporter.results().notes == ()


def test_a_failed_control_is_a_note():
    settings = freeze(orthogonality.Settings, load_config("orthogonality", "quick"))
    reporter = Reporter("orthogonality", settings, (0,), out=None, command="x")
    reporter.fail_control("attention scored 0.4")
    assert reporter.notes == ["FAILED CONTROL: attention scored 0.4"]


def test_tables_and_cells():
    text = markdown_table(["model", "a/b"], [["x", "1|2"]])
    assert text.splitlines() == ["| model | a/b |", "|:---|---:|", "| x | 1\\|2 |"]
    with pytest.raises(ValueError, match="1 cells under 2"):
        markdown_table(["a", "b"], [["x"]])
    assert common.cell(proportion("a", 1, 2), 2) == "0.50 [0.09, 0.91]"
    assert common.cell(absent("a", "oom", detail="")) == "OOM"
    assert common.cell(None) == ""


def test_heatmaps_and_lines_draw_what_is_missing():
    oom = absent("accuracy", "oom", detail="", length=8, depth=0)
    good = [proportion("accuracy", 5, 10, length=n, depth=0) for n in (2, 4)]
    for theme in plots.themes():
        with plots.style(theme):
            figure, axes = plots.grid(1, 2)
            plots.heatmap(axes[0, 0], [[good[0], oom, None]], ["0"], ["2", "4", "8"], theme=theme)
            plots.line(axes[0, 1], [*good, oom], "length", label="x", colour="k")
        texts = [t.get_text() for t in axes[0, 0].texts]
        assert texts == ["50", "OOM", "-"]
        assert len(axes[0, 1].lines) == 2
        assert "<dc:date>" not in plots.svg(figure)
    with pytest.raises(ValueError, match="theme is 'blue'"), plots.style("blue"):
        pass


def test_numbers_of_axes_are_short():
    assert [plots.short(n) for n in (512, 1024, 65536, 2**20, 1000, 1e6, 1536)] == [
        "512", "1k", "64k", "1M", "1k", "1M", "1536",
    ]  # fmt: skip
