"""Progress of an evaluation: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_EVERY = 10.0  # seconds between plain lines


class Steps:
    """Counts the steps of a run, whose total may grow, inside a ``with`` block."""

    def __init__(self, name: str, total: int = 0):
        self.name, self.total, self.count = name, total, 0
        self._started = self._last = time.monotonic()
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(name, total=total or None)

    def __enter__(self) -> "Steps":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def expect(self, more: int) -> None:
        """Adds to the total."""
        self.total += more
        if self._bar:
            self._bar.update(self._task, total=self.total)

    def done(self, label: str, steps: int = 1) -> None:
        """Counts finished steps and says what was finished."""
        self.count += steps
        if self._bar:
            self._bar.update(self._task, completed=self.count, description=f"{self.name}: {label}")
            return
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY or self.count == self.total:
            self._last = now
            print(
                f"{self.name}: {self.count}/{self.total} after {now - self._started:.0f} s: {label}",
                file=sys.stderr,
                flush=True,
            )
