"""Loss spikes: a warning with the steps and batches concerned. Nothing is changed by it."""

import math
import statistics
from collections import deque

from train.run_config import GuardConfig

_LEAST_HISTORY = 8


class SpikeDetector:
    """Compares each loss with the median of the last normal ones.

    A loss above ``median + threshold * 1.4826 * MAD`` (MAD: the median absolute deviation, at least
    0.1% of the median) is a spike. Losses of a spike and non-finite ones do not enter the history;
    a spike as long as the window is taken for the new normal.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._window, self._threshold = config.spike_window, config.spike_threshold
        self._history: deque[float] = deque(maxlen=max(1, self._window))
        self._spike: list[tuple[int, int, float]] = []

    def observe(self, step: int, batch: int, loss: float) -> str | None:
        """Takes in the loss of a step; returns a warning when a spike begins or is over."""
        if not self._window or not math.isfinite(loss):
            return None
        if len(self._history) >= min(_LEAST_HISTORY, self._window) and loss > self._limit():
            self._spike.append((step, batch, loss))
            if len(self._spike) == 1:
                return (
                    f"loss spike begins at step {step} (batch {batch}): {loss:.4f}, "
                    f"median of the last {len(self._history)} is {statistics.median(self._history):.4f}"
                )
            if len(self._spike) < self._window:
                return None
            self._history.clear()
        warning = self._end() if self._spike else None
        self._history.append(loss)
        return warning

    def _limit(self) -> float:
        median = statistics.median(self._history)
        deviation = statistics.median(abs(loss - median) for loss in self._history)
        return median + self._threshold * 1.4826 * max(deviation, 1e-3 * abs(median))

    def _end(self) -> str:
        steps, batches, losses = zip(*self._spike, strict=True)
        self._spike = []
        return (
            f"loss spike over steps {steps[0]} to {steps[-1]} (batches {batches[0]} to {batches[-1]}) "
            f"is over; peak {max(losses):.4f}"
        )
