"""The record of a run: ``metrics.jsonl`` with every step exactly once, and TensorBoard events."""

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from train.errors import StorageError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"

Row = dict[str, Any]

_RECENT = 1024
_MAX_LINE_BYTES = 1 << 20  # a longer line is damage, and is read in pieces


def iterate_rows(path: Path) -> Iterator[Row]:
    """Rows of a metrics file, steps strictly increasing. Damaged lines and repeated steps are left out."""
    last = 0
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(_MAX_LINE_BYTES):
            try:
                row = json.loads(line)
                step = row["step"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if isinstance(step, int) and step > last:
                last = step
                yield row


class MetricsLog:
    """``metrics.jsonl`` and TensorBoard, continued after ``last_step``.

    Whatever was recorded of later steps is dropped, in one atomic replacement: those steps are
    computed again. Non-finite numbers are written as null. ``recent`` holds the last rows from before.
    """

    def __init__(self, workdir: Path, last_step: int, *, tensorboard: bool) -> None:
        """Opens the record.

        Raises:
          StorageError: if it cannot be written.
        """
        self.path = workdir / METRICS_FILE
        try:
            self.recent: deque[Row] = deque(maxlen=_RECENT)
            self._count = 0
            part = self.path.with_suffix(".part")
            with part.open("wb") as file:
                for row in iterate_rows(self.path):
                    if row["step"] <= last_step:
                        file.write(json.dumps(row).encode() + b"\n")
                        self.recent.append(row)
                        self._count += 1
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
            # Unbuffered: a full disk shows at the write that hits it, and nothing is left to fail in close().
            self._file = self.path.open("ab", buffering=0)
            self._events = _Events(workdir / TENSORBOARD_DIRECTORY, last_step) if tensorboard else None
        except OSError as error:
            raise self._failed(error) from None

    def missing_steps(self, last_step: int) -> int:
        """How many steps up to ``last_step`` had no row when the record was opened (the file was changed)."""
        return last_step - self._count

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends the row of one step.

        Raises:
          StorageError: if the disk refuses.
        """
        plain = {name: _json_value(value) for name, value in row.items()}
        data = memoryview(json.dumps(plain, allow_nan=False).encode() + b"\n")
        try:
            while data:
                data = data[self._file.write(data) :]
            if self._events is not None:
                self._events.write(plain)
        except OSError as error:
            raise self._failed(error) from None

    def sync(self) -> None:
        """Brings everything written to disk; to be called before a checkpoint covers these steps.

        Raises:
          StorageError: if the disk refuses.
        """
        try:
            os.fsync(self._file.fileno())
            if self._events is not None:
                self._events.flush()
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Closes the files. After ``sync`` nothing is left to write; without it a full disk is no news."""
        self._file.close()
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(f"{self.path.parent}: the record cannot be written: {error.strerror or error}")


class Unrecorded(MetricsLog):
    """The record as seen by a process that does not write it: process 0 does."""

    def __init__(self) -> None:
        self.recent = deque()

    def missing_steps(self, last_step: int) -> int:
        """Process 0 says."""
        return 0

    def write(self, row: Mapping[str, Any]) -> None:
        """Process 0 writes the same row."""

    def sync(self) -> None:
        """There is nothing to bring to disk."""

    def close(self) -> None:
        """There is nothing to close."""


class _Events:
    """TensorBoard scalars, written in the caller's thread so that errors reach the caller."""

    def __init__(self, directory: Path, last_step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # Two starts within a second must not share a file.
        self._writer = EventsWriter(str(directory / "events"), filename_suffix=f".{time.time_ns()}")
        if last_step:
            # TensorBoard drops what earlier files say of steps from here on.
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=last_step + 1, session_log=start))

    def write(self, row: Row) -> None:
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float)
        ]
        event = Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))
        self._writer.write_event(event)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
