"""Kills and repeated runs on an accelerator: which batches, losses and states are equal, bit by bit.

    python -m tests.faults.device --data=data/slimpajama [--only=default,fixed] [--at-once=6]

Each group trains the same run three times on prepared records: twice whole, and once killed (``kill -9``)
twice on the way. Batches must be equal everywhere. Bits of losses and of the final state are compared
and reported; they must be equal where the group promises it.

default   as anyone runs it: every process compiles for itself
cached    one persistent compilation cache, so that all processes run the same program
fixed     XLA_FLAGS of ``FIXED``: no operation of varying order, and no choice by timing
exclude   XLA_FLAGS of ``EXCLUDE``: no operation of varying order; a cache for the choices by timing
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import base
from tests.faults.kills import digest
from tests.faults.recorded import BATCHES
from tests.train.common import read_curve
from train.checkpoint import CheckpointStore
from train.loop import build
from train.run_config import RunConfig
from train.sharding import make_mesh

FIXED = "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false"
EXCLUDE = "--xla_gpu_exclude_nondeterministic_ops=true"
GROUPS = {
    "default": dict(flags="", cache=False, promised=False),
    "cached": dict(flags="", cache=True, promised=False),
    "fixed": dict(flags=FIXED, cache=False, promised=True),
    "exclude": dict(flags=EXCLUDE, cache=True, promised=True),
}


def make_config(given: argparse.Namespace) -> RunConfig:
    """Four layers of width 256 with a vocabulary of 32,000, unless told otherwise."""
    config = base.get_config()
    config.update_from_flattened_dict(
        {
            "name": "device",
            "num_steps": given.steps,
            "global_batch_size": given.batch,
            "context_length": given.context_length,
            "model.vocab_size": 32_000,
            "model.hidden_size": given.width,
            "model.hd_dim": 2 * given.width,
            "model.num_hidden_layers": given.layers,
            "data.source": "prepared",
            "data.paths": (str(given.data.resolve()),),
            "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": given.steps // 10,
            "mesh.devices": 1,
            "eval.every_steps": given.steps // 2,
            "eval.num_batches": 2,
            "eval.global_batch_size": given.batch,
            "checkpoint.every_steps": max(1, given.steps // 8),
            "log.tensorboard": False,
        }
    )
    return RunConfig.from_dict(config.to_dict())


class Runs:
    """Starts runs, no more than some at once, and keeps their directories."""

    def __init__(self, directory: Path, config: RunConfig, at_once: int) -> None:
        self._directory, self._config = directory, config
        self._turn = threading.BoundedSemaphore(at_once)

    def run(self, group: str, name: str, kills: tuple[int, ...] = ()) -> Path:
        """Runs to the end, killed on the way when the record has each of ``kills`` rows."""
        workdir = self._directory / f"{group}-{name}"
        workdir.mkdir()
        self._config.write(workdir)
        for rows in (*kills, None):
            with self._turn:
                self._one(group, workdir, rows)
        return workdir

    def _one(self, group: str, workdir: Path, rows: int | None) -> None:
        settings = GROUPS[group]
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {settings['flags']}".strip()
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        if settings["cache"]:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(self._directory / f"cache-{group}")
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
            environment["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        began = time.monotonic()
        with workdir.with_suffix(".log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.recorded", workdir],
                stdout=log,
                stderr=log,
                env=environment,
            )
        metrics = workdir / "metrics.jsonl"
        killed = False
        first = 0.0
        before = _lines(metrics)
        while process.poll() is None:
            now = _lines(metrics)
            before = min(before, now)  # a start drops the rows after its checkpoint
            first = first or (time.monotonic() - began if now > before else 0.0)
            if rows is not None and not killed and now >= rows:
                process.send_signal(signal.SIGKILL)
                killed = True
            time.sleep(0.05)
        seconds = time.monotonic() - began
        print(
            f"  {workdir.name}: {'killed at row ' + str(_lines(metrics)) if killed else 'ended'} after "
            f"{seconds:.0f} s, first new row after {first:.0f} s",
            flush=True,
        )
        if process.returncode != (-signal.SIGKILL if rows is not None else 0):
            tail = workdir.with_suffix(".log").read_text()[-1500:]
            raise RuntimeError(f"{workdir.name} ended with {process.returncode}:\n{tail}")


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def batches(workdir: Path) -> dict[int, set[str]]:
    """Every hash that was seen of each batch: one each, however often it was read."""
    found: dict[int, set[str]] = {}
    for line in (workdir / BATCHES).read_text().splitlines():
        number, digest = line.split()
        found.setdefault(int(number), set()).add(digest)
    return found


def final_state(workdir: Path) -> dict[str, str]:
    """SHA-256 of each part of the last checkpoint, read on the host."""
    config = RunConfig.read(workdir)
    _, steps = build(
        config.model, config.optimizer, config.num_steps, make_mesh(config.mesh, jax.devices()[:1])
    )
    store = CheckpointStore(workdir / "checkpoints", config.checkpoint)
    restored = store.restore(next(store.candidates()), steps.shapes, steps.shardings)
    store.close()
    parts = {name: digest(part) for name, part in restored.state._asdict().items()}
    return parts | {"next batch": str(restored.meta["next_batch"]), "at": str(restored.step)}


def compare(whole: Path, other: Path, steps: int) -> tuple[list[str], bool, str]:
    """(problems, whether every bit is equal, what was seen) of two runs that should be one."""
    problems = []
    seen, again = batches(whole), batches(other)
    if any(len(digests) != 1 for digests in (*seen.values(), *again.values())):
        problems.append(f"{other.name}: a batch was not the same when it was read again")
    if any(seen.get(number) != again.get(number) for number in range(steps)):
        problems.append(f"{other.name}: batches differ from those of {whole.name}")
    curves = [read_curve(path) for path in (whole, other)]
    if any([row[0] for row in curve] != list(range(1, steps + 1)) for curve in curves):
        problems.append(f"{other.name}: not every step is recorded once")
    losses = np.array([[row[2] for row in curve] for curve in curves], float)
    differing = np.flatnonzero(losses[0] != losses[1])
    parts = [final_state(path) for path in (whole, other)]
    unequal = [name for name in parts[0] if parts[0][name] != parts[1][name]]
    equal = curves[0] == curves[1] and not unequal
    text = f"{len(losses[0]) - len(differing)} of {steps} losses bit-equal"
    if len(differing):
        furthest = np.max(np.abs(losses[0] - losses[1]))
        text += f", first differing step {differing[0] + 1}, largest difference {furthest:.1e}"
    text += f"; state {'bit-equal' if not unequal else 'differs in ' + ', '.join(unequal)}"
    if {"next batch", "at"} & set(unequal):
        problems.append(f"{other.name}: ended elsewhere")
    return problems, equal, text


def run_group(runs: Runs, group: str, steps: int) -> list[str]:
    """Two whole runs and a killed one; prints what is equal and returns what should be and is not."""
    kills = (steps // 3, 2 * steps // 3)
    try:
        with ThreadPoolExecutor() as pool:
            if GROUPS[group]["cache"]:
                whole = runs.run(group, "whole")  # fills the cache
            else:
                whole = pool.submit(runs.run, group, "whole")
            others = [pool.submit(runs.run, group, "again"), pool.submit(runs.run, group, "killed", kills)]
            whole = whole if isinstance(whole, Path) else whole.result()
            found = [compare(whole, other.result(), steps) for other in others]
    except RuntimeError as error:
        print(f"{group}: {error}", flush=True)
        return [f"{group}: a run failed"]
    problems = [problem for entry in found for problem in entry[0]]
    for name, (_, equal, text) in zip(("again", "killed"), found, strict=True):
        print(f"{group}: whole and {name}: {text}", flush=True)
        if GROUPS[group]["promised"] and not equal:
            problems.append(f"{group}: {name} is not bit-equal")
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    seconds = float(np.median([row["seconds"] for row in rows]))
    print(
        f"{group}: loss {rows[0]['loss']:.4f} -> {rows[-1]['loss']:.4f}, median step {1e3 * seconds:.1f} ms, "
        "with other runs on the device at the same time",
        flush=True,
    )
    return problems


def main() -> int:
    """Parses the sizes and runs the groups."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.device", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a prepared directory")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, comma separated")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context-length", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=6, help="processes on the device at the same time")
    given = parser.parse_args()
    groups = given.only.split(",")
    if unknown := set(groups) - GROUPS.keys():
        parser.error(f"--only={given.only}: {', '.join(unknown)} is none of {', '.join(GROUPS)}")
    jax.config.update("jax_platforms", "cpu")  # this process only compares: the device is left to the runs
    config = make_config(given)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="holo-device-") as directory:
        runs = Runs(Path(directory), config, given.at_once)
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(lambda group: run_group(runs, group, given.steps), groups))
    problems: list[Any] = [problem for result in results for problem in result]
    for problem in problems:
        print(f"FAILED: {problem}")
    print(f"device: {'failed' if problems else 'held'} in {time.monotonic() - began:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
