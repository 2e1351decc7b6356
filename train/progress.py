"""What a person watching sees: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_SMOOTHING = 0.1


class ProgressDisplay:
    """Shows step, loss, tokens per second and time left; prints messages without tearing the bar.

    ``quiet`` shows nothing: of several processes one speaks.
    """

    def __init__(
        self,
        num_steps: int,
        tokens_per_step: int,
        every_steps: int,
        stream: TextIO | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        self._num_steps, self._tokens, self._every = num_steps, tokens_per_step, every_steps
        self._console = Console(
            file=stream or sys.stdout, highlight=False, markup=False, soft_wrap=True, quiet=quiet
        )
        self._bar: Progress | None = None
        self._task: Any = None
        self._seconds: float | None = None
        self._last: float | None = None
        if self._console.is_terminal and not quiet:
            columns = (TextColumn("step {task.completed:>6}/{task.total}"), BarColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=self._console)
            self._task = self._bar.add_task("train", total=num_steps, text="compiling")

    def start(self, step: int) -> None:
        """Begins, or begins again after going back, with ``step`` steps done."""
        self._last = None
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text="compiling")
            self._bar.start()

    def update(self, row: Mapping[str, Any]) -> None:
        """Takes in the record of a step."""
        now = time.monotonic()
        if self._last is not None:
            seconds = now - self._last
            old = seconds if self._seconds is None else self._seconds
            self._seconds = old + _SMOOTHING * (seconds - old)
        self._last = now
        step = row["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._text(row))
        elif step % self._every == 0 or step == self._num_steps:
            self.message(f"step {step}/{self._num_steps}  {self._text(row)}")

    def message(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()

    def _text(self, row: Mapping[str, Any]) -> str:
        parts = [f"loss {row['loss']:.4f}"]
        if row["skipped"]:
            parts.append("skipped")
        if "heldout_loss" in row:
            parts.append(f"held-out {row['heldout_loss']:.4f}")
        if self._seconds is not None:
            parts.append(f"{self._tokens / self._seconds:,.0f} tok/s")
            parts.append(f"{_duration((self._num_steps - row['step']) * self._seconds)} left")
        return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
