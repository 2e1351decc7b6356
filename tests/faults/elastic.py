"""One run over 8, 4, 2, 1 and again 8 devices: arrays bit-equal at each move, losses as if it stayed."""

from pathlib import Path

import jax
import numpy as np

from tests.faults.kills import digest
from tests.train.common import Quiet, micro_config, read_curve
from train.checkpoint import CheckpointStore
from train.loop import build, train
from train.preemption import StopRequest
from train.sharding import make_mesh

_STEPS, _EVERY = 60, 10


def run(directory: Path) -> list[str]:
    """Moves the run every ten steps, and compares with one that stays on eight devices."""
    config = micro_config(num_steps=_STEPS, checkpoint__every_steps=_EVERY, eval__every_steps=0)
    train(config, directory / "stays", display=Quiet())
    problems = []
    for number, devices in enumerate((8, 4, 2, 1, 8)):
        stop, display = StopRequest(), Quiet()
        last = _EVERY * (number + 1)
        display.update = lambda row, stop=stop, last=last: (
            stop.set("SIGTERM") if row["step"] == last else None
        )
        train(config, directory / "moves", devices=jax.devices()[:devices], stop=stop, display=display)
        digests = {_digest_on(directory / "moves", config, count) for count in (8, 4, 2, 1)}
        if len(digests) != 1:
            problems.append(f"the state at step {last} differs between meshes")
    train(config, directory / "moves", display=Quiet())
    stays, moves = read_curve(directory / "stays"), read_curve(directory / "moves")
    if [row[:2] for row in stays] != [row[:2] for row in moves]:
        problems.append("steps or batches differ")
    furthest = float(np.max(np.abs(np.array([a[2] - b[2] for a, b in zip(stays, moves, strict=True)]))))
    if not furthest <= 1e-5:
        problems.append(f"losses differ by {furthest:.1e}")
    print(f"elastic: {_STEPS} steps over 8, 4, 2, 1, 8 devices, losses within {furthest:.1e}", flush=True)
    return problems


def _digest_on(workdir: Path, config, devices: int) -> str:
    """SHA-256 of the newest checkpoint as restored onto a mesh that shards its parameters."""
    mesh = make_mesh(micro_config(mesh__data=1, mesh__fsdp=devices).mesh, jax.devices()[:devices])
    _, steps = build(config.model, config.optimizer, config.num_steps, mesh)
    store = CheckpointStore(workdir / "checkpoints", config.checkpoint)
    state = store.restore(next(store.candidates()), steps.shapes, steps.shardings).state
    store.close()
    return digest(state)
