"""The measurement of inference: settings, and reading. Every part runs in ``eval.quick``."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from eval import inference
from eval.inference_parts import reading
from eval.inference_parts.reading import measure


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
    assert set(measured) - {"added_bytes"} == {"peak_bytes", "tokens_per_second", "state_bytes"}
    assert json.loads(json.dumps(measured)) and measured["peak_bytes"] > measured["state_bytes"] > 0


def test_every_reading_compiles_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiling takes of a device's memory is in the peak of each, or of none."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
    asked = {}

    def run(command: list[str], **options: dict) -> subprocess.CompletedProcess:
        asked.update(options["env"])
        return subprocess.CompletedProcess(command, 0, stdout='{"peak_bytes": 1.0}\n')

    monkeypatch.setattr(reading.subprocess, "run", run)
    assert reading._in_a_process({}) == {"peak_bytes": 1.0}
    assert asked["JAX_ENABLE_COMPILATION_CACHE"] == asked["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
