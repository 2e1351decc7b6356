"""The command line: bad input ends in one clear line, exit code 2, and nothing written; good input runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.common import micro_config

ROOT = Path(__file__).parents[2]
QUICKSTART = f"--config={ROOT}/configs/quickstart.py"
TOGETHER = ["--coordinator=localhost:1", "--num_processes=2"]

BAD = [
    ([], "give either --config=configs/NAME.py [--workdir=RUN], or --resume=RUN alone"),
    ([f"--config={ROOT}/configs/nothing.py"], "nothing.py"),
    ([QUICKSTART, "--config.optimzer.learning_rate=1"], 'Did you mean "optimizer"'),
    ([QUICKSTART, "--config.optimizer.learning_rat=1"], 'Did you mean "learning_rate"'),
    ([QUICKSTART, "--config.num_steps=many"], "many"),
    ([QUICKSTART, "--config.num_steps=-1"], "num_steps is -1; it must be positive"),
    ([QUICKSTART, "--config.model.hidden_size=0"], "model.hidden_size is 0; it must be positive"),
    ([QUICKSTART, "--config.model.preset=mamba"], "preset is 'mamba'"),
    ([QUICKSTART, "--wrkdir=x"], "wrkdir"),
    ([QUICKSTART, "extra"], "extra is not expected"),
    ([QUICKSTART, "--resume=x"], "give either"),
    (["--resume=half", "--workdir=x"], "or --resume=RUN alone"),
    (["--resume=nowhere"], "nowhere is no run directory"),
    (["--resume=broken"], "config.json cannot be read"),
    (["--resume=half"], "name is missing"),
    ([QUICKSTART, "--config.mesh.fsdp=3"], "must divide the 1 device(s) used"),
    ([QUICKSTART, "--num_processes=2"], "--coordinator (or JAX_COORDINATOR_ADDRESS) and --process_id (or"),
    (
        [QUICKSTART, *TOGETHER, "--process_id=2"],
        "process_id is 2; it must be from 0 to num_processes - 1 = 1",
    ),
    ([QUICKSTART, *TOGETHER, "--process_id=0", "--num_processes=0"], "num_processes is 0; it must be pos"),
    (
        [QUICKSTART, *TOGETHER, "--process_id=0", "--coordinator=here"],
        "coordinator is 'here'; it must be HOST",
    ),
    ([QUICKSTART, "--process_id=first"], "first"),
    ([QUICKSTART, "--config.data.source=prepared", "--config.data.paths=('nowhere',)"], "nowhere"),
]

# Importing costs more than parsing: one process imports, and a fork of it answers each case.
DRIVER = """
import json, os, runpy, sys, tempfile
import train.loop

results = []
for arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as error:
        child = os.fork()
        if not child:
            os.dup2(error.fileno(), 2)
            os.dup2(error.fileno(), 1)
            sys.argv = ["train.main", *arguments]
            try:
                runpy.run_module("train.main", run_name="__main__")
            except SystemExit as leaving:
                os._exit(leaving.code or 0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        error.seek(0)
        results.append([code, error.read()])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bad")
    (directory / "broken").mkdir()
    (directory / "broken" / "config.json").write_text("{")
    (directory / "half").mkdir()
    (directory / "half" / "config.json").write_text("{}")
    before = sorted(directory.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([arguments for arguments, _ in BAD]),
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(directory.rglob("*")) == before, "something was written"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(BAD)), ids=lambda n: " ".join(BAD[n][0]).replace(str(ROOT), ""))
def test_bad_input_is_one_line_and_code_2(answers, number: int) -> None:
    code, text = answers[number]
    assert code == 2, text
    assert text.startswith("train.main: ") and text.count("\n") == 1, text
    assert BAD[number][1] in text


@pytest.mark.slow
def test_the_command_trains_and_resumes_without_a_python_file(tmp_path) -> None:
    micro_config(num_steps=6, mesh__data=1).write(tmp_path)
    flags = os.environ.get("XLA_FLAGS", "").replace("device_count=8", "device_count=1")
    done = subprocess.run(
        [sys.executable, "-m", "train.main", f"--resume={tmp_path}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "new run in" in done.stdout and "step 6/6  loss" in done.stdout
    assert (tmp_path / "summary.json").exists()
