"""Mutated files of every format a run reads: only typed errors, never anything else."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.train.common import micro_config
from train.decisions import DECISIONS_FILE, Rollback, append_rollback, read_rollbacks
from train.errors import TrainError
from train.inputs import open_inputs
from train.lock import LOCK_FILE, RunLock
from train.manifest import MANIFEST_FILE, DamageError, verify, write_manifest
from train.metrics import METRICS_FILE, MetricsLog
from train.resume import check_identity
from train.run_config import CONFIG_FILE


def run(directory: Path, mutations: int, seed: int) -> list[str]:
    """Mutates config, data identity, decisions, metrics, lock and manifest in turn and reads them."""
    chooser = random.Random(seed)
    config = micro_config()
    identity = open_inputs(config).identity
    config.write(directory, identity)
    append_rollback(directory, Rollback(4, 7, 7, "test"))
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 5)]
    (directory / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / LOCK_FILE).write_text(json.dumps({"pid": 1, "host": "x", "since": 0.0}))
    (directory / "state").write_bytes(b"state")
    checkpoint = directory / "1"
    checkpoint.mkdir()
    (checkpoint / "data").write_bytes(b"data")
    write_manifest(checkpoint, {"step": 1, "metric": None})
    readers: dict[Path, Callable[[], Any]] = {
        directory / CONFIG_FILE: lambda: check_identity(directory, config, identity),
        directory / DECISIONS_FILE: lambda: read_rollbacks(directory),
        directory / METRICS_FILE: lambda: MetricsLog(directory, 3, tensorboard=False).close(),
        directory / LOCK_FILE: lambda: RunLock(directory).close(),
        checkpoint / MANIFEST_FILE: lambda: verify(checkpoint),
    }
    originals = {path: path.read_bytes() for path in readers}
    problems, refused = [], 0
    paths = list(readers)
    for number in range(mutations):
        path = paths[number % len(paths)]
        mutated = mutate(originals[path], chooser)
        path.write_bytes(mutated)
        try:
            readers[path]()
            if path.name == MANIFEST_FILE and mutated != originals[path]:
                problems.append(f"a changed {path.name} was taken for good")
        except (TrainError, DamageError):
            refused += 1
        except Exception as error:  # any other kind is the failure looked for
            problems.append(f"{path.name}: {type(error).__name__}: {error} on {mutated[:200]!r}")
        path.write_bytes(originals[path])
    print(f"fuzz: {mutations} mutations of {len(paths)} formats, {refused} refused, {len(problems)} problems")
    return problems[:10]


def mutate(data: bytes, chooser: random.Random) -> bytes:
    """One to three random edits: flips, cuts, repeats, and values of the wrong kind."""
    values = [
        b"null",
        b"-1",
        b"1e999",
        b"NaN",
        b'"x"',
        b"[]",
        b"{}",
        b"true",
        b"9" * 400,
        b"[" * 2000,
        b"\xff\x00",
    ]
    result = bytearray(data)
    for _ in range(chooser.randrange(1, 4)):
        if not result:
            break
        begin = chooser.randrange(len(result))
        end = min(len(result), begin + chooser.randrange(1, 40))
        kind = chooser.randrange(5)
        if kind == 0:
            result[begin] ^= 1 << chooser.randrange(8)
        elif kind == 1:
            del result[begin:end]
        elif kind == 2:
            result[begin:begin] = result[begin:end]
        elif kind == 3:
            result[begin:end] = chooser.choice(values)
        else:
            del result[begin:]
    return bytes(result)
