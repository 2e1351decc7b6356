"""What the record of each step says aloud: spikes and skipped steps with their batches; rollbacks in time."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.train.common import Quiet, micro_config
from train.recorder import Recorder, RollbackNeeded
from train.step import StepMetrics


def record(losses: list[float], **guard: float) -> tuple[list[dict], list[str]]:
    """Rows and messages of a run with these losses; batch numbers are 100 ahead of the steps."""
    rows: list[dict] = []
    display = Quiet()
    log = SimpleNamespace(recent=[], write=rows.append)
    config = micro_config(**{f"guard__{name}": value for name, value in guard.items()}).guard
    recorder = Recorder(config, log, display)
    skipped = 0
    try:
        for step, loss in enumerate(losses, start=1):
            bad = not np.isfinite(loss)
            skipped = skipped + 1 if bad else 0
            metrics = dict.fromkeys(StepMetrics._fields, np.float32(1.0))
            metrics |= {
                "loss": np.float32(loss),
                "skipped": np.int32(bad),
                "nonfinite_run": np.int32(skipped),
            }
            recorder.pending = (step, step + 99, StepMetrics(**metrics))
            recorder.flush()
    except RollbackNeeded as needed:
        display.messages.append(f"rollback at {needed.step}")
    return rows, display.messages


def test_a_spike_is_told_with_steps_and_batches() -> None:
    normal = [3.0 + 0.01 * (step % 5) for step in range(20)]
    rows, messages = record([*normal, 9.0, 8.0, *normal[:3]])
    assert [row["step"] for row in rows] == list(range(1, 26)) and rows[20]["batch"] == 120
    assert len(messages) == 2
    assert messages[0].startswith("warning: loss spike begins at step 21 (batch 120): 9.0000")
    assert messages[1].startswith("warning: loss spike over steps 21 to 22 (batches 120 to 121) is over")


@pytest.mark.parametrize("most", [1, 3])
def test_a_rollback_is_asked_for_at_the_last_of_the_skipped_steps(most: int) -> None:
    _, messages = record([3.0, *[float("nan")] * 5], max_nonfinite_steps=most)
    assert messages[-1] == f"rollback at {1 + most}"
    assert messages[0] == "warning: step 2 (batch 101) was not finite; it was skipped"
    assert len(messages) == most + 1
