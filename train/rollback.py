"""What happens after too many non-finite steps in a row: back to a good checkpoint, or a stop."""

from collections.abc import Callable
from pathlib import Path

from train.checkpoint import CheckpointStore
from train.decisions import Rollback, append_rollback, batch_of_step
from train.errors import DivergedError
from train.processes import Processes
from train.run_config import GuardConfig


def decide_rollback(
    workdir: Path,
    store: CheckpointStore,
    rollbacks: list[Rollback],
    guard: GuardConfig,
    at_step: int,
    say: Callable[[str], None],
    processes: Processes,
) -> None:
    """Decides to go back to the last checkpoint before the run of skipped steps, leaving out the data since.

    The decision is on disk before it takes effect. Skipped steps change nothing, so going back to a
    state from within the run would change nothing either: such checkpoints are passed over, and put
    aside when the run is restored.

    Args:
      workdir: run directory.
      store: its checkpoints.
      rollbacks: those so far; the new one is added.
      guard: the bounds.
      at_step: the last of the skipped steps.
      say: tells a person.
      processes: of the run; all come to the same decision, and process 0 records it.

    Raises:
      DivergedError: if the rollbacks are used up, or no checkpoint from before is left.
      StorageError: if the decision cannot be written.
    """
    reason = f"{guard.max_nonfinite_steps} non-finite steps in a row up to step {at_step}"
    if len(rollbacks) >= guard.max_rollbacks:
        raise DivergedError(
            f"{reason}, and {len(rollbacks)} rollback(s) did not help; lower optimizer.learning_rate "
            "or look at the data of these batches"
        )
    store.wait()
    for step in store.candidates():
        if step <= at_step - guard.max_nonfinite_steps and not store.read_meta(step)["nonfinite_run"]:
            break
    else:
        raise DivergedError(f"{reason}, and no checkpoint from before them is left to go back to")
    rollback = Rollback(step, batch_of_step(at_step, rollbacks), at_step, reason)
    processes.decide("the record of a rollback", lambda: append_rollback(workdir, rollback))
    rollbacks.append(rollback)
    say(
        f"rollback: {reason}; back to checkpoint {step}, going on with batch {rollback.batch} "
        f"({len(rollbacks)} of {guard.max_rollbacks})"
    )
