"""Where a run starts: from the newest good checkpoint, from nothing, or not at all."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from train.checkpoint import CheckpointStore, Restored
from train.decisions import DECISIONS_FILE, Rollback, before
from train.errors import CheckpointError, ResumeError, UsageError
from train.metrics import METRICS_FILE, iterate_rows
from train.run_config import CONFIG_FILE, RunConfig, differences, read_object

CHECKPOINT_DIRECTORY = "checkpoints"
DATA_FILE = "data.json"


def check_identity(
    workdir: Path, config: RunConfig, data: dict[str, str], accepted: Collection[str] = ()
) -> list[str]:
    """Compares a run directory's configuration and data with those asked for.

    Args:
      workdir: may not exist yet.
      config: asked for.
      data: fingerprints of the data asked for, see ``Inputs.identity``.
      accepted: dotted names of fields, or of whole sections, that may differ.

    Returns:
      The accepted differences, one line each.

    Raises:
      ResumeError: with every other difference, field by field.
      UsageError: for an accepted name that is no field, or an unreadable record.
    """
    wanted = config.to_dict()
    for name in (CONFIG_FILE, DATA_FILE):
        if not (workdir / name).exists() and (workdir / CHECKPOINT_DIRECTORY).exists():
            raise UsageError(
                f"{workdir} has checkpoints but no {name}; put it back (every checkpoint's meta holds a copy)"
            )
    for name in accepted:
        if not _is_field(wanted, name) and name not in data and name != "data":
            raise UsageError(f"{name} cannot be accepted as changed: it is no field of the configuration")
    found: dict[str, tuple[Any, Any]] = {}
    if (workdir / CONFIG_FILE).exists():
        found |= differences(RunConfig.read(workdir).to_dict(), wanted)
    if (workdir / DATA_FILE).exists():
        found |= differences(read_object(workdir / DATA_FILE), data)
    lines = {name: f"{name}: {_short(old)} -> {_short(new)}" for name, (old, new) in found.items()}
    refused = [
        line for name, line in lines.items() if not any(f"{name}.".startswith(f"{a}.") for a in accepted)
    ]
    if refused:
        names = ",".join(name for name, line in lines.items() if line in refused)
        raise ResumeError(
            f"{workdir} holds a run of another configuration: {'; '.join(refused)}. Use another --workdir, "
            f"or go on with the change by --accept={names}"
        )
    return list(lines.values())


def write_identity(workdir: Path, config: RunConfig, data: dict[str, str]) -> None:
    """Records configuration and data in the run directory, each file in one piece."""
    config.write(workdir)
    part = (workdir / DATA_FILE).with_suffix(".part")
    part.write_text(json.dumps(data, indent=2) + "\n")
    part.replace(workdir / DATA_FILE)


def restore_newest(
    workdir: Path, store: CheckpointStore, rollbacks: list[Rollback], shapes: Any, shardings: Any
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
    refuse_fresh_start(workdir, store)
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
