"""The measurement of inference on micro sizes: every part reports, table and plot draw, controls hold."""

import json
import re
from pathlib import Path

import pytest

from eval import inference
from eval.inference_parts.reading import measure
from eval.inference_view import figures, table
from eval.results import Results

MICRO = dict(
    layers=1,
    width=64,
    vocab=64,
    piece=32,
    latency_contexts="(32,64)",
    contexts="(32,)",
    batches="(2,)",
    steps=2,
    samples=2,
    decoders="('holo:int8','attention')",
    single_steps=False,
    storage_bytes=1024,
    storage_pairs="(4,200)",
    storage_alternatives=64,
    storage_trials=1,
    logit_tokens=128,  # read in two parts of one length: one program each
    drift_steps="(1000,20000)",
)


@pytest.mark.slow
def test_every_part_reports(tmp_path: Path) -> None:
    arguments = [f"--config.{name}={value}" for name, value in MICRO.items()]
    config = f"--config={Path(inference.__file__).parents[1]}/configs/eval/inference.py:quick"
    parts = "--config.parts=('latency','decoding','storage','logits','drift')"
    code = inference.main([config, f"--out={tmp_path}", parts, *arguments])
    results = Results.read(tmp_path / "results.json")
    assert code == (1 if any("FAILED" in note for note in results.notes) else 0)
    rates = results.select("tokens_per_second", part="decoding")
    assert {(v.where["model"], v.where["batch"]) for v in rates} == {(m, 2) for m in ("holo", "attention")}
    assert all(v.status == "ok" and v.value > 0 for v in rates)
    assert results.one("accuracy", state_dtype="int8", mode="once", pairs=4).value == 1
    assert results.one("accuracy", state_dtype="compensated", pairs=200).value < 0.5
    drift = {
        m: results.one("relative_error", inputs="coherent", method=m, steps=20_000).value
        for m in ("plain", "compensated")
    }
    assert drift["compensated"] < 1e-12 < 1e-5 < drift["plain"]
    assert 0 < results.one("logit_error", state_dtype="int8", mode="once").value < 0.1
    assert (tmp_path / "inference.png").stat().st_size > 10_000
    text = table(results)
    for words in (
        "ms a token",
        "share of bound",
        "int4, rounded every",
        "nats a token more",
        "relative error",
    ):
        assert words in text
    assert set(figures(results, "dark")) == {"inference"}


@pytest.mark.parametrize(
    "change,message",
    [
        ("parts=('nothing',)", "parts names 'nothing'; it must be one of reading"),
        ("decoders=('holo:int2',)", "decoders names 'holo:int2'"),
        ("batches=()", "batches is empty"),
        ("steps=0", "steps is 0; it must be at least 1"),
        ("large=(3,)", r"large is \(3,\); it must be \(layers, width\)"),
        ("logit_tokens=64", "logit_tokens is 64; it must be at least 65"),
    ],
)
def test_settings_are_checked(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert inference.main([f"--out={tmp_path}", f"--config.{change}"]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("model", ["holo", "attention"])
def test_reading_is_measured(model: str) -> None:
    sizes = dict(layers=1, width=64, vocab=64, activations="float32", length=64, piece=32, seed=0)
    measured = measure(model=model, **sizes)
    assert set(measured) == {"peak_bytes", "tokens_per_second", "state_bytes"}
    assert json.loads(json.dumps(measured)) and measured["peak_bytes"] > measured["state_bytes"] > 0
