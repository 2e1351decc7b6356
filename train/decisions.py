"""Rollbacks: which data a step reads once the run has gone back and left a window of data out.

Without rollbacks step s (counted from 0) reads batch s. A rollback goes back to checkpoint c and
goes on reading at batch p. The rollbacks of a run are a short list on disk, and the batch of any
step is a pure function of it, so a run killed at any moment replays them identically.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.errors import StorageError

DECISIONS_FILE = "decisions.jsonl"
_MAX_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class Rollback:
    """Step ``to_step`` reads batch ``batch`` next; ``at_step`` is where it was decided, ``reason`` why."""

    to_step: int
    batch: int
    at_step: int
    reason: str


def effective(rollbacks: Iterable[Rollback]) -> list[Rollback]:
    """The rollbacks that the present run went through: a later one undoes those at or after its target."""
    stack: list[Rollback] = []
    for rollback in rollbacks:
        while stack and stack[-1].to_step >= rollback.to_step:
            stack.pop()
        stack.append(rollback)
    return stack


def batch_of_step(step: int, rollbacks: Iterable[Rollback]) -> int:
    """Number of the batch that the step after ``step`` done ones reads."""
    for rollback in reversed(effective(rollbacks)):
        if rollback.to_step <= step:
            return rollback.batch + step - rollback.to_step
    return step


def before(step: int, rollbacks: Iterable[Rollback]) -> list[dict[str, Any]]:
    """What a checkpoint at ``step`` has behind it, as plain values: equal lists, equal histories."""
    return [dataclasses.asdict(r) for r in effective(rollbacks) if r.to_step < step]


def read_rollbacks(workdir: Path) -> list[Rollback]:
    """The rollbacks of a run, oldest first. A last line cut short by a kill was not decided yet.

    Raises:
      StorageError: for a damaged line.
    """
    path = workdir / DECISIONS_FILE
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return []
    if len(data) > _MAX_BYTES:
        raise StorageError(f"{path} is damaged: it is larger than {_MAX_BYTES} bytes")
    rollbacks = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            values = json.loads(line)
            rollback = Rollback(**values)
            if not all(isinstance(v, int) for v in (rollback.to_step, rollback.batch, rollback.at_step)):
                raise TypeError("steps and batches are integers")
        except (TypeError, ValueError, RecursionError) as error:
            raise StorageError(f"{path} line {number} is damaged: {error}") from None
        rollbacks.append(rollback)
    return rollbacks


def append_rollback(workdir: Path, rollback: Rollback) -> None:
    """Adds a rollback, on disk before it takes effect.

    Raises:
      StorageError: if it cannot be written.
    """
    path = workdir / DECISIONS_FILE
    try:
        kept = path.read_bytes() if path.exists() else b""
        complete = kept[: kept.rfind(b"\n") + 1]
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            file.write(complete + json.dumps(dataclasses.asdict(rollback)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from None
