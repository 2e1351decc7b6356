"""How far a long job over bytes is: a live bar on a terminal, plain lines elsewhere; on stderr."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_SECONDS = 10.0


class ByteProgress:
    """Shows the share of ``total`` bytes done, a rate and the time left.

    The rate is of ``counted`` bytes, which may differ from the bytes of progress (text against its
    compressed file).
    """

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total = label, max(total, 1)
        self._start = self._said = time.monotonic()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:.0f}% {task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(label, total=self._total, rate="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, counted: int, note: str = "") -> None:
        """Tells the state: ``done`` of ``total``, ``counted`` bytes for the rate, a note for the line."""
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        rate = f"{counted / seconds / 1e6:.2f} MB/s{note}"
        if self._bar is not None:
            self._bar.update(self._task, completed=min(done, self._total), rate=rate)
        elif now - self._said >= _PLAIN_SECONDS:
            self._said = now
            left = seconds * (self._total - done) / done if done else float("inf")
            share = 100 * min(done / self._total, 1)
            print(f"{self._label}: {share:.0f}%, {rate}, {_duration(left)} left", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown time"
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
