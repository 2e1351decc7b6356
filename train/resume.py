"""Where a run starts: from the newest good checkpoint, from nothing, or not at all."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from train.checkpoint import CheckpointStore, Restored
from train.decisions import DECISIONS_FILE, Rollback, before
from train.errors import CheckpointError, ResumeError, UsageError
from train.metrics import METRICS_FILE, iterate_rows
from train.processes import Processes
from train.run_config import CONFIG_FILE, IDENTITY, RunConfig, differences

CHECKPOINT_DIRECTORY = "checkpoints"
_DATA = f"data.{IDENTITY}"


def check_identity(
    workdir: Path, config: RunConfig, identity: Mapping[str, Any], accepted: Collection[str] = ()
) -> list[str]:
    """Compares a run directory's configuration and data with those asked for.

    Args:
      workdir: may not exist yet.
      config: asked for.
      identity: of the data asked for, see ``Inputs.identity``.
      accepted: dotted names of fields, or of whole sections, that may differ from the run's;
        ``data.identity`` is the section of what the data is.

    Returns:
      The accepted differences, one line each.

    Raises:
      ResumeError: with every other difference, field by field.
      UsageError: for an accepted name that is no field, or an unreadable record.
    """
    wanted = _with_identity(config, identity)
    begun = (workdir / CHECKPOINT_DIRECTORY).exists()
    recorded = None
    found: dict[str, tuple[Any, Any]] = {}
    if (workdir / CONFIG_FILE).exists():
        old, recorded = RunConfig.read_with_identity(workdir)
        # A configuration written by hand says nothing of the data yet; a run that has begun does.
        known = identity if recorded is None and not begun else recorded
        found = differences(_with_identity(old, known), wanted)
    if begun and recorded is None:
        raise UsageError(
            f"{workdir} has checkpoints but no {CONFIG_FILE} with data.{IDENTITY}; "
            "put it back (every checkpoint's meta holds a copy)"
        )
    for name in accepted:
        if not _is_field(wanted, name) and name not in found:
            raise UsageError(f"{name} cannot be accepted as changed: it is no field of the configuration")
    lines = {name: f"{name}: {_short(old)} -> {_short(new)}" for name, (old, new) in found.items()}
    refused = [name for name in lines if not any(f"{name}.".startswith(f"{a}.") for a in accepted)]
    if refused:
        names = dict.fromkeys(_DATA if f"{name}.".startswith(f"{_DATA}.") else name for name in refused)
        raise ResumeError(
            f"{workdir} holds a run of another configuration: {'; '.join(lines[name] for name in refused)}. "
            f"Use another --workdir, or go on with the change by --accept={','.join(names)}"
        )
    return list(lines.values())


def _with_identity(config: RunConfig, identity: Any) -> dict[str, Any]:
    values = config.to_dict()
    values["data"][IDENTITY] = identity
    return values


def check_same_request(processes: Processes, request: Mapping[str, Any]) -> None:
    """Checks that all processes were asked for the same run.

    Args:
      processes: of the run.
      request: plain values.

    Raises:
      UsageError: naming the first process that was asked for another one than process 0, field by field.
    """

    def check() -> None:
        for index, other in enumerate(requests):
            if found := differences(requests[0], other):
                lines = "; ".join(f"{name}: {_short(a)}, {_short(b)}" for name, (a, b) in found.items())
                raise UsageError(f"processes 0 and {index} were asked for different runs: {lines}")

    requests = processes.exchange("comparing the requests", json.loads(json.dumps(request)))
    processes.decide("comparing the requests", check)


def restore_newest(
    workdir: Path,
    store: CheckpointStore,
    rollbacks: list[Rollback],
    shapes: Any,
    shardings: Any,
    processes: Processes,
) -> Restored | None:
    """The newest good checkpoint of the run as its rollbacks left it; None for a run that never began.

    Steps that do not verify, and steps of a course that a rollback has left, are quarantined.

    Raises:
      CheckpointError: if steps were trained but no checkpoint is good: never a fresh start instead.
      ResumeError: if the arrays saved are others than those wanted.
    """
    for step in store.candidates():
        passed = store.read_meta(step)["rollbacks"]
        if passed and not (workdir / DECISIONS_FILE).exists():
            raise CheckpointError(
                f"{workdir / DECISIONS_FILE} is missing, but checkpoint {step} went through "
                f"{len(passed)} rollbacks recorded in it; put the file back"
            )
        if passed != before(step, rollbacks):
            store.quarantine(step, "abandoned", "a rollback has gone back before it")
            continue
        return store.restore(step, shapes, shardings)
    processes.decide("looking for traces of a run", lambda: refuse_fresh_start(workdir, store))
    return None


def refuse_fresh_start(workdir: Path, store: CheckpointStore) -> None:
    """Checks that nothing was ever trained in a run directory that has no good checkpoint.

    A run saves and commits step 0 before it trains, so only a kill before that leaves nothing.

    Raises:
      CheckpointError: if there is any sign of training.
    """
    reached = max((row["step"] for row in iterate_rows(workdir / METRICS_FILE)), default=0)
    aside = [path for path in store.quarantined() if not path.name.startswith("0.")]
    if not reached and not aside:
        return
    bad = ", ".join(path.name for path in store.quarantined()) or "none"
    raise CheckpointError(
        f"{workdir} was trained up to step {reached} but has no good checkpoint (put aside: {bad}). "
        "Restore a checkpoint from a copy, or use another --workdir"
    )


def _is_field(values: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"
