"""Two real processes train as one, by the real command: equal to one process, killed, stopped, refused."""

import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train import child
from tests.train.common import micro_config, read_curve
from train.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE
from train.manifest import verify

pytestmark = pytest.mark.slow

DEVICES = 2
SECONDS = 300
CONFIG = dict(
    mesh__fsdp=2,
    accumulation_steps=2,
    num_steps=8,
    checkpoint__every_steps=3,
    eval__every_steps=0,
    log__every_steps=1,
    watchdog__step_seconds=60.0,  # should the survivor of a death not notice it
)


def new_run(path: Path, **changes: Any) -> Path:
    path.mkdir()
    micro_config(**CONFIG | changes).write(path)
    return path


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def logs(workdir: Path) -> list[str]:
    return [workdir.with_suffix(f".{index}.log").read_text() for index in range(2)]


def run_two(
    workdir: Path, *faults: dict[str, Any], slurm: bool = False, second: Path | None = None
) -> list[int]:
    """Runs the command in two processes, the second with another directory or faults; their exit codes."""
    port = free_port()
    running = []
    for index in range(2):
        arguments = [f"--resume={second if index and second else workdir}"]
        environment: dict[str, str] = {}
        if slurm:
            environment = {
                "SLURM_JOB_ID": "1",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
                "JAX_COORDINATOR_PORT": str(port),
            }
        else:
            arguments += [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={index}"]
        running.append(
            child.start_command(
                arguments,
                workdir.with_suffix(f".{index}.log"),
                devices=DEVICES // 2,
                environment=environment,
                **(faults[index] if faults else {}),
            )
        )
    try:
        for process in running:
            process.join(SECONDS)
            assert process.exitcode is not None, "\n".join(logs(workdir))
    finally:
        for process in running:
            process.kill()
    return [process.exitcode for process in running]


def test_two_processes_equal_one_through_a_death_and_a_signal(tmp_path) -> None:
    alone = new_run(tmp_path / "one")
    process = child.start_command([f"--resume={alone}"], alone.with_suffix(".log"), devices=DEVICES)

    # One dies: the other ends too.
    workdir = new_run(tmp_path / "two")
    code, died = run_two(workdir, {}, dict(signal_before_step=(6, signal.SIGKILL)))
    assert died == -signal.SIGKILL and code not in (0, EXIT_PREEMPTED), logs(workdir)
    assert f"{DEVICES} device(s) of 2 processes" in logs(workdir)[0]
    undisturbed = read_curve(workdir)
    assert len(undisturbed) >= 4

    # One is asked to stop: both save after the same step.
    codes = run_two(workdir, {}, dict(signal_before_step=(1, signal.SIGTERM)))
    assert codes == [EXIT_PREEMPTED] * 2, logs(workdir)
    done = len(read_curve(workdir))
    assert 0 < done < 8 and f"stopped by SIGTERM after step {done}" in logs(workdir)[0]

    assert run_two(workdir, slurm=True) == [0, 0], logs(workdir)
    assert f"going on from checkpoint {done} in" in logs(workdir)[0]
    found = read_curve(workdir)
    assert found[: len(undisturbed)] == undisturbed

    process.join(SECONDS)
    assert process.exitcode == 0, child.output(alone)
    expected = read_curve(alone)
    assert [row[:2] for row in found] == [row[:2] for row in expected] == [(i + 1, i) for i in range(8)]
    np.testing.assert_allclose(
        np.array(found, float), np.array(expected, float), rtol=0, atol=1e-5, equal_nan=True
    )

    # Process 0 alone has spoken and written, but for the arrays. (Threads of Gloo cut each other's lines.)
    first, second = logs(workdir)
    said = ("run in ", "step ", "checkpoint", "stopped by", "next:")
    assert [word for word in said if word not in first] == [] and [w for w in said if w in second] == []
    assert {path.name for path in workdir.iterdir()} == {path.name for path in alone.iterdir()}
    newest = workdir / "checkpoints" / "8"
    verify(newest)
    assert all(any((newest / "state" / f"ocdbt.process_{i}" / "d").iterdir()) for i in range(2))


def test_a_wrong_request_in_one_process_ends_both(tmp_path) -> None:
    workdir, other = new_run(tmp_path / "run"), new_run(tmp_path / "other", seed=1)
    assert run_two(workdir, second=other) == [EXIT_USAGE] * 2, logs(workdir)
    message = "processes 0 and 1 were asked for different runs: config.seed: 0, 1"
    assert all(message in text and text.count("train.main: ") == 1 for text in logs(workdir))
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_a_mesh_without_devices_of_one_process_is_refused(tmp_path) -> None:
    workdir = new_run(tmp_path / "run", mesh__devices=1, mesh__fsdp=1)
    assert run_two(workdir) == [EXIT_USAGE] * 2, logs(workdir)
    assert "the mesh has 1 device(s), 0 to 1 of each of 2 processes" in logs(workdir)[1]


def test_a_process_that_waits_in_vain_says_so(tmp_path) -> None:
    workdir = new_run(tmp_path / "run", watchdog__startup_seconds=2.0)
    where = f"localhost:{free_port()}"
    arguments = [f"--resume={workdir}", f"--coordinator={where}", "--num_processes=2", "--process_id=1"]
    process = child.start_command(arguments, tmp_path / "log", devices=1)
    process.join(60)
    assert process.exitcode == EXIT_FAILED
    text = (tmp_path / "log").read_text()
    assert f"process 1 of 2: not all processes met at {where} within 2 s" in text


def test_an_agreed_stop_and_a_failure_reach_everyone(tmp_path) -> None:
    port = free_port()
    running = [child.start_meeting(port, index, tmp_path / f"log.{index}.log") for index in range(2)]
    for process in running:
        process.join(60)
    first, second = (text.splitlines() for text in logs(tmp_path / "log"))
    assert [process.exitcode for process in running] == [EXIT_FAILED] * 2, (first, second)
    # Process 0 was ahead and could not be called back.
    assert first[0] == second[0] and first[0].startswith("stopped by SIGTERM after step ")
    assert first[1:] == ["the meeting: process 1 of 2 did not come within 1 s"]
    told = "train.main: process 0 of 2: the meeting: process 1 of 2 did not come within 1 s"
    assert second[1:] == [told, "given back"]
