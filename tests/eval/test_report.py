"""The HTML report: what it finds, what it compares, and how a browser shows it."""

import dataclasses
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib import image

from eval import merge, report
from eval.registry import VIEWS, view_of
from eval.report_page import markdown
from eval.results import Results, absent, exact, mean, proportion


def write_run(directory, rate: float):
    directory.mkdir(parents=True)
    config = {"model": {"preset": "holo", "hidden_size": 8}, "optimizer": {"learning_rate": rate}}
    (directory / "config.json").write_text(json.dumps(config))
    rows = [{"step": s, "loss": 5.0 / s, "heldout_loss": 4.0 if s == 4 else None} for s in range(1, 5)]
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "summary.json").write_text(json.dumps({"params": 1234567, "loss": 1.25}))


def results(evaluation: str, settings: dict, values, **changes) -> Results:
    fields = dict(
        evaluation=evaluation,
        settings=settings,
        seeds=(0,),
        values=tuple(values),
        notes=("FAILED CONTROL: attention <b>0.3</b>",),
        command=f"python -m eval.{evaluation} --out=x",
        device={"platform": "cpu", "kind": "test device"},
        versions={"python": "3", "jax": "1.2.3", "holo_jax": "0"},
        commit="0123456789abcdef",
        started="2026-01-01T00:00:00+00:00",
        seconds=2.0,
    )
    return Results(**{**fields, **changes})


def needle(model: str) -> Results:
    values = [
        proportion("accuracy", 190, 200, model=model, length=n, depth=d)
        for n in (256, 1024)
        for d in (0.0, 1.0)
    ]
    values.append(
        absent("accuracy", "oom", detail="RESOURCE_EXHAUSTED", model=model, length=65536, depth=0.0)
    )
    values.append(exact("state_bytes", 2**20, model=model, length=256))
    return results("needle", {"lengths": [256, 1024, 65536], "depths": [0.0, 1.0], "width": 256}, values)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    write_run(root / "one", 1e-3)
    write_run(root / "two", 3e-3)
    needle("holo").write(root / "one" / "needle")
    needle("ssm").write(root / "two" / "needle")
    other = results("homemade", {}, [exact("number", 2.5, what="x<y"), mean("many", [1.0, 2.0])])
    dataclasses.replace(other, command="a && b && c").write(root / "two" / "homemade")
    out = root / "report.html"
    assert report.main([str(root / "one"), str(root / "two"), f"--out={out}"]) == 0
    return out


def test_everything_is_in_one_file(page):
    text = page.read_text()
    assert text.count("<h2>") == 1 + 1 + 3
    assert "optimizer.learning_rate" in text
    assert "model.hidden_size" not in text.split("Settings that differ")[1].split("</table>")[0]
    assert "0.95" in text
    assert "OOM" in text
    assert "1,234,567" in text
    assert "Needle side by side" in text
    assert "1,048,576" in text
    links = re.findall(r'(?:src|href|srcset)="([^"]*)"', text)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "<script" not in text
    assert "3 commands" in text
    # A tag left open hides what follows.
    for tag in ("details", "p", "section", "table", "figure"):
        assert len(re.findall(f"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag
    assert text.count("prefers-color-scheme: dark)") == 1 + text.count("<picture>")
    assert text.count("<picture>") == 3


def test_text_from_runs_is_escaped(page):
    text = page.read_text()
    assert "<b>0.3</b>" not in text
    assert "x&lt;y" in text
    assert markdown("a < b") == "<p>a &lt; b</p>"
    assert markdown("| a | b |\n|:---|---:|\n| x\\|y | <i> |").count("<td>") == 2


def test_evaluations_are_found_once_and_compared(page):
    runs, evaluations = report.collect([page.parent, page.parent / "one"])
    assert [run.name for run in runs] == ["one"]
    assert len(evaluations) == 3
    shared = report.shared_numbers(evaluations)
    assert set(shared) == {"needle"}
    assert shared["needle"][0][0] == "accuracy (length 256, depth 0.0)"
    assert len(shared["needle"]) == 6


@pytest.mark.parametrize("arguments", [[], ["missing"], ["--what=1", "."]])
def test_wrong_arguments_are_refused(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report.main(arguments) == 2
    assert "eval.report" in capsys.readouterr().err


def test_empty_and_damaged_directories_are_named(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{}")
    assert report.main([str(tmp_path)]) == 2
    assert "results.json" in capsys.readouterr().err


def test_merge_joins_runs_from_the_command_line(page, tmp_path, capsys):
    parts = [str(page.parent / name / "needle") for name in ("one", "two")]
    assert merge.main([*parts, f"--out={tmp_path}"]) == 0
    joined = Results.read(tmp_path)
    assert {v.where["model"] for v in joined.values} == {"holo", "ssm"}
    assert (tmp_path / "needle.png").is_file()
    assert "ssm" in (tmp_path / "table.md").read_text()
    assert merge.main(parts) == 2
    assert merge.main([str(page.parent / "two" / "homemade"), parts[0], f"--out={tmp_path}"]) == 2
    assert "differ in evaluation" in capsys.readouterr().err


@pytest.fixture(scope="module")
def chromium():
    """The browser, or a skip that says what is missing."""
    found = next(
        (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None
    )
    if found is None:
        pytest.skip("no Chromium on this machine (Debian's package is called chromium)")

    def run(*options: str) -> str:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        done = subprocess.run([found, *flags, *options], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


def test_a_browser_shows_it_in_both_themes(page, tmp_path, chromium):
    paper = {}
    for theme, scheme in (("light", 1), ("dark", 0)):
        shot = tmp_path / f"{theme}.png"
        options = ["--window-size=1200,1600", f"--blink-settings=preferredColorScheme={scheme}"]
        chromium(*options, f"--screenshot={shot}", page.as_uri())
        pixels = image.imread(shot)[..., :3]
        paper[theme] = pixels[5, 5].mean()
        assert pixels.std() > 0.02
        # Somewhere on the page is the first colour of the plots: the images are drawn.
        assert (np.abs(pixels - np.array([0x00, 0x72, 0xB2]) / 255).max(-1) < 0.02).sum() > 50
    assert paper["light"] > 0.95
    assert paper["dark"] < 0.15


def test_nothing_is_wider_than_a_phone(page, tmp_path, chromium):
    measure = (
        "<script>document.title = document.documentElement.scrollWidth + '/' + innerWidth</script></body>"
    )
    frame = tmp_path / "frame.html"
    inner = tmp_path / "page.html"
    inner.write_text(page.read_text().replace("</body>", measure))
    # A frame of a phone's width: the browser's own windows have a least width.
    script = "<script>f.onload = () => { document.title = f.contentDocument.title }</script>"
    frame.write_text(f"<body><iframe id=f src='{inner.name}' width=390 height=800></iframe>{script}</body>")
    dom = chromium(
        "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()
    )
    width, window = re.search(r"<title>(\d+)/(\d+)</title>", dom).groups()
    assert int(window) == 390
    assert int(width) <= 390


def test_a_screenshot_can_be_kept(page, tmp_path, chromium):
    """``HOLO_REPORT_SCREENSHOT=FILE`` keeps what the browser drew, to look at."""
    target = os.environ.get("HOLO_REPORT_SCREENSHOT", str(tmp_path / "report.png"))
    chromium("--window-size=1200,2400", f"--screenshot={target}", page.as_uri())
    assert os.path.getsize(target) > 20_000


def test_every_evaluation_has_a_view():
    for name in VIEWS:
        view = view_of(name)
        assert callable(view.figures)
        assert callable(view.table)
    with pytest.raises(ValueError, match="no evaluation is called 'none'"):
        view_of("none")
