"""kill -9 at random moments, half of them during saves: the stitched run equals an uninterrupted one."""

import contextlib
import hashlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.train import child
from tests.train.common import micro_config, read_curve
from tests.train.test_metrics import tensorboard_view
from train.checkpoint import CheckpointStore
from train.loop import build
from train.manifest import MANIFEST_FILE
from train.sharding import make_mesh

STEPS, SAVE_EVERY = 40, 4
OVERRIDES = dict(
    num_steps=STEPS, checkpoint__every_steps=SAVE_EVERY, eval__every_steps=10, log__tensorboard=True
)
_KILLS_PER_RUN = 10


def run(directory: Path, kills: int, seed: int) -> list[str]:
    """Kills runs ``kills`` times in all and compares each stitched run with an uninterrupted one."""
    chooser = random.Random(seed)
    code = child.run(directory / "whole", OVERRIDES)
    if code:
        return [f"the uninterrupted run ended with {code}: {child.output(directory / 'whole')}"]
    expected = fingerprint(directory / "whole")
    problems: list[str] = []
    done = in_save = runs = 0
    while done < kills:
        workdir = directory / f"run-{runs}"
        count, saves, code = _one_run(workdir, min(_KILLS_PER_RUN, kills - done), chooser)
        done, in_save, runs = done + count, in_save + saves, runs + 1
        if code:
            problems.append(f"{workdir.name} ended with {code}: {child.output(workdir)[-500:]}")
            break
        actual = fingerprint(workdir)
        problems += [f"{workdir.name}: {name} differs" for name in expected if expected[name] != actual[name]]
        print(f"kills: {done} of {kills}, {in_save} during a save, {runs} run(s) stitched", flush=True)
    if 0.3 * done > in_save:
        problems.append(f"only {in_save} of {done} kills hit a save; at least 30% should")
    return problems


def _one_run(workdir: Path, kills: int, chooser: random.Random) -> tuple[int, int, int]:
    """Kills one run up to ``kills`` times and lets it end: (kills, of them in a save, exit code)."""
    killed = in_save = 0
    while killed < kills:
        process = child.start(workdir, OVERRIDES, slow=0.05, **_fault(workdir, chooser))
        # A descriptor names this process only, where a number could be another's by the time of the kill.
        descriptor = os.pidfd_open(process.pid)
        if chooser.random() < 0.5:
            _kill_at_random(descriptor, process, workdir, chooser)
        process.join(300)
        os.close(descriptor)
        if process.exitcode != -signal.SIGKILL:
            return killed, in_save, process.exitcode
        killed += 1
        in_save += save_was_cut(workdir)
    return killed, in_save, child.run(workdir, OVERRIDES)


def _fault(workdir: Path, chooser: random.Random) -> dict[str, Any]:
    """A death in the next save or two, some time after it began or just before its manifest."""
    saved = [int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*") if p.name.isdecimal()]
    following = (max(saved, default=0) // SAVE_EVERY + chooser.choice((1, 2))) * SAVE_EVERY
    if chooser.random() < 0.3:
        return {"die_before_manifest": following}
    return {"die_in_save": (following, chooser.uniform(0, 0.06))}


def _kill_at_random(descriptor: int, process: Any, workdir: Path, chooser: random.Random) -> None:
    """Kills at any moment between the start and some steps on, unless the run dies before by itself."""
    path = workdir / "metrics.jsonl"

    def rows() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    wanted = rows() + chooser.randrange(0, 8)
    while process.is_alive() and rows() < wanted:
        time.sleep(0.002)
    time.sleep(chooser.uniform(0, 0.05))
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def save_was_cut(workdir: Path) -> bool:
    """Whether a death left a save unfinished: orbax's temporary files, or a step without a manifest."""
    for path in (workdir / "checkpoints").glob("*"):
        if ".orbax-checkpoint-tmp" in path.name:
            return True
        if path.name.isdecimal() and not (path / MANIFEST_FILE).exists():
            return True
    return False


def fingerprint(workdir: Path) -> dict[str, Any]:
    """The loss curve, TensorBoard's scalars, and SHA-256 of every part of the final state."""
    config = micro_config(**OVERRIDES)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    _, steps = build(config.model, config.optimizer, config.num_steps, mesh)
    store = CheckpointStore(workdir / "checkpoints", config.checkpoint)
    step = next(store.candidates())
    restored = store.restore(step, steps.shapes, steps.shardings)
    store.close()
    parts = {name: digest(part) for name, part in restored.state._asdict().items()}
    losses = {at: values[1] for at, values in tensorboard_view(workdir / "tensorboard").items()}
    return parts | {
        "final step": step,
        "next batch": restored.meta["next_batch"],
        "curve": read_curve(workdir),
        "tensorboard": losses,
    }


def digest(tree: Any) -> str:
    """SHA-256 over the bytes of all arrays of a tree."""
    hasher = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        hasher.update(np.ascontiguousarray(leaf).tobytes())
    return hasher.hexdigest()
