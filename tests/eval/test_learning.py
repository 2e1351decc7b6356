"""What the memory learns to recall on a CPU in a minute or two: 64 tokens, 8 pairs, 512 words."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from eval.results import Results
from tests.compiling import flags

ROOT = Path(__file__).parents[2]


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """Trains in a process of its own, with the compiler's cheaper optimisations and one device."""
    out = tmp_path_factory.mktemp("denoiser")
    environment = dict(os.environ, XLA_FLAGS=flags(1, level=1), JAX_PLATFORMS="cpu")
    command = [sys.executable, "-m", "eval.recall", "--config=configs/eval/recall.py:denoiser"]
    command += [f"--out={out}", "--config.select=('holo','seed')", "--config.control_from=0.0"]
    command += ["--config.train=((64,8,16),)", "--config.grid.seeds=(0,)", "--config.grid.rates=(1e-2,)"]
    command += ["--config.grid.steps=100", "--config.grid.log_every=50"]
    before = cpu_seconds()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=580)
    assert cpu_seconds() - before < 180  # the clock reads no more where nothing else runs
    return Results.read(out)


def accuracy(results: Results, model: str) -> float:
    return results.one("accuracy", model=model, length=64, pairs=8).value


@pytest.mark.slow
def test_holo_recalls_what_seed_cannot(results: Results) -> None:
    """Content addressing recalls; fixed positional phasors cannot tell which value belongs to a key."""
    assert accuracy(results, "holo") >= 0.95
    assert accuracy(results, "seed") < 0.10
