"""Runs that are killed, stopped or stall: the stitched run equals an uninterrupted one, bit for bit."""

import functools
import os
import signal
import time

import jax
import pytest

from tests.faults import kills
from tests.train import child
from tests.train.common import Quiet, micro_config, read_curve
from train.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PREEMPTED
from train.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("expected") / "run"
    train(micro_config(), workdir, devices=jax.devices()[:1], display=Quiet())
    return read_curve(workdir)


def wait_for(condition, process, workdir, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline, child.output(workdir)
        time.sleep(0.02)


def rows(workdir) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def reached(workdir, step: int) -> bool:
    return rows(workdir) >= step


def test_kill_9_loses_nothing_that_was_committed(expected, tmp_path) -> None:
    workdir = tmp_path / "run"
    for fault in (dict(die_after_row=6), dict(die_before_manifest=8), dict(die_in_save=(12, 0.01))):
        assert child.run(workdir, **fault) == -signal.SIGKILL, child.output(workdir)
        assert 1 <= rows(workdir) <= 12
    assert child.run(workdir) == 0, child.output(workdir)
    assert read_curve(workdir) == expected
    text = child.output(workdir)
    assert "going on from checkpoint 4" in text
    assert "checkpoint 8 put aside as" in text and "the save did not finish" in text


def test_signals_save_and_the_next_start_goes_on(expected, tmp_path) -> None:
    workdir = tmp_path / "run"
    done = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = child.start(workdir, slow=0.1)
        wait_for(functools.partial(reached, workdir, done + 2), process, workdir)
        os.kill(process.pid, number)
        if number == signal.SIGTERM:
            os.kill(process.pid, number)  # schedulers repeat it; it must not cut the save
        process.join(60)
        assert process.exitcode == EXIT_PREEMPTED, child.output(workdir)
        assert f"stopped by {signal.Signals(number).name} after step" in child.output(workdir)
        done = rows(workdir)
        assert done < 12 and (workdir / "checkpoints" / str(done)).exists()

    # A second Ctrl-C while a save hangs ends the process at once.
    process = child.start(workdir, stall="save")
    wait_for(functools.partial(reached, workdir, 12), process, workdir)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == EXIT_INTERRUPTED, child.output(workdir)

    assert child.run(workdir) == 0, child.output(workdir)
    assert read_curve(workdir) == expected


def test_a_stall_ends_with_all_stacks(tmp_path) -> None:
    workdir = tmp_path / "run"
    code = child.run(workdir, dict(watchdog__step_seconds=3.0), stall="data")
    text = child.output(workdir)
    assert code == EXIT_FAILED, text
    assert "Timeout (0:00:03)!" in text and "in wrapped" in text and "in _train_steps" in text


def test_ten_kills_at_random_moments_change_no_bit(tmp_path) -> None:
    assert kills.run(tmp_path, kills=10, seed=1) == []
