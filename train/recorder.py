"""The record of each step, fetched from the device one step late."""

import time
from typing import Any

import jax

from train.metrics import MetricsLog
from train.progress import ProgressDisplay
from train.run_config import GuardConfig
from train.spikes import SpikeDetector
from train.step import StepMetrics


class RollbackNeeded(Exception):
    """Too many steps in a row were skipped; ``step`` is the last of them."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class Recorder:
    """Records the pending step when the next one is already on the device, so that it never waits.

    Attributes:
      pending: (steps done, number of the batch, metrics on the device) of the step to record.
    """

    def __init__(self, guard: GuardConfig, log: MetricsLog, display: ProgressDisplay) -> None:
        self._guard, self._log, self._display = guard, log, display
        self._spikes = SpikeDetector(guard)
        for row in log.recent:
            self._observe(row)
        self._since = time.monotonic()
        self.pending: tuple[int, int, StepMetrics] | None = None

    def flush(self, extra: dict[str, float] | None = None) -> int:
        """Records the pending step, if any, with ``extra`` numbers; returns the skipped steps in a row.

        Raises:
          RollbackNeeded: if they are ``guard.max_nonfinite_steps``.
          StorageError: if the record cannot be written.
        """
        if self.pending is None:
            return 0
        done, number, on_device = self.pending
        self.pending = None
        metrics = jax.device_get(on_device)
        now = time.monotonic()
        row = {
            "step": done,
            "batch": number,
            "loss": float(metrics.loss),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(metrics.learning_rate),
            "num_targets": int(metrics.num_targets),
            "skipped": int(metrics.skipped),
            "seconds": round(now - self._since, 6),
        }
        self._since = now
        row |= extra or {}
        self._log.write(row)
        self._display.update(row)
        if warning := self._observe(row):
            self._display.message(f"warning: {warning}")
        if row["skipped"]:
            self._display.message(f"warning: step {done} (batch {number}) was not finite; it was skipped")
        if metrics.nonfinite_run >= self._guard.max_nonfinite_steps:
            raise RollbackNeeded(done)
        return int(metrics.nonfinite_run)

    def _observe(self, row: dict[str, Any]) -> str | None:
        loss = row["loss"]
        return self._spikes.observe(row["step"], row["batch"], float("nan") if loss is None else loss)
