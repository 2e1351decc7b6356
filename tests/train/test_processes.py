"""Two real processes that share one mesh take the steps of one process, each reading only its own rows."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def curves(count: int) -> list[np.ndarray]:
    """What each of ``count`` processes saw: loss and gradient norm of each step."""
    port = str(free_port())
    command = [sys.executable, "-m", "tests.train.steps_child", port, str(count)]
    running = [
        subprocess.Popen([*command, str(i)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(count)
    ]
    found = []
    for process in running:
        try:
            out, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            for other in running:
                other.kill()
            raise
        assert process.returncode == 0, err.decode()[-2000:]
        last = json.loads(out.decode().strip().splitlines()[-1])
        assert last["devices"] == 8
        found.append(np.array(last["curve"]))
    return found


@pytest.mark.slow
def test_two_processes_equal_one() -> None:
    (one,) = curves(1)
    first, second = curves(2)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, one, rtol=0, atol=1e-5)
