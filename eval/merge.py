"""Joins results of one evaluation whose models were run apart: ``python -m eval.merge RUN... --out=DIR``.

The runs must have the same evaluation, device, versions and settings, but for which models were selected
(also in a section of the settings), models that only one run knew, which checkpoint was read, and the host
where nothing is timed; no number may appear twice with different values. The joined file names every command
and commit.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval import models, plots
from eval.common import check_out, refuse, with_notes
from eval.registry import view_of
from eval.results import Results, write_atomically

_FREE = ("select", "sections", "parts", "checkpoint")  # settings that may differ
_TIMED = ("speed", "scaling", "inference")  # evaluations whose values depend on the host as well


def _joined(ours: Mapping, theirs: Mapping, within: str = "") -> dict:
    """Settings that are equal but for free ones, of which all entries are kept, and for models one run lacks.

    Raises:
      ValueError: naming a setting that differs.
    """
    joined = {}
    for name in dict.fromkeys([*ours, *theirs]):
        one, other, path = ours.get(name), theirs.get(name), within + name
        if name in _FREE and None not in (one, other):
            if isinstance(one, str):
                joined[name] = ", ".join(dict.fromkeys([*one.split(", "), other]))
            else:
                joined[name] = tuple(dict.fromkeys([*one, *other]))
        elif isinstance(one, Mapping) and isinstance(other, Mapping):
            joined[name] = _joined(one, other, f"{path}.")
        elif one == other or (None in (one, other) and within.endswith("models.")):
            joined[name] = other if one is None else one
        else:
            raise ValueError(f"the runs differ in the setting {path}; they are not comparable")
    return joined


def _joined_device(ours: Mapping, theirs: Mapping, evaluation: str) -> dict:
    """The device; hosts may differ where nothing is timed, and are all named.

    Raises:
      ValueError: for devices of different kinds or numbers.
    """
    free = () if evaluation in _TIMED else ("host",)
    for name in ours.keys() | theirs.keys():
        if name not in free and ours.get(name) != theirs.get(name):
            raise ValueError(f"the runs differ in device: {dict(ours)} and {dict(theirs)}")
    if ours.get("host") == theirs.get("host"):
        return dict(ours)
    return {**ours, "host": "; ".join(dict.fromkeys([*ours["host"].split("; "), theirs["host"]]))}


def merge(runs: Sequence[Results]) -> Results:
    """One result with the values of all runs.

    Raises:
      ValueError: for no runs, runs that are not comparable, or contradicting values.
    """
    if not runs:
        raise ValueError("no runs were given")
    first = runs[0]
    settings, device = dict(first.settings), dict(first.device)
    for run in runs[1:]:
        for name in ("evaluation", "versions"):
            if getattr(run, name) != getattr(first, name):
                raise ValueError(
                    f"the runs differ in {name}: {getattr(first, name)} and {getattr(run, name)}"
                )
        device = _joined_device(device, run.device, first.evaluation)
        settings = _joined(settings, run.settings)
    values = {}
    for run in runs:
        for value in run.values:
            key = (value.metric, value.source, tuple(sorted(value.where.items())))
            if key in values and values[key] != value:
                raise ValueError(f"two values for {value.metric} at {dict(value.where)}: run it once")
            values[key] = value
    notes = list(dict.fromkeys(note for run in runs for note in run.notes))
    chosen = settings if "select" in settings else settings.get("presets", {})
    if models.MISSING_CONTROL in notes and models.has_control(chosen["models"], chosen["select"]):
        notes.remove(models.MISSING_CONTROL)
    return Results(
        evaluation=first.evaluation,
        settings=settings,
        seeds=first.seeds,
        values=tuple(values.values()),
        notes=tuple(notes),
        command=" && ".join(dict.fromkeys(run.command for run in runs)),
        device=device,
        versions=first.versions,
        commit=", ".join(dict.fromkeys(run.commit for run in runs)),
        started=min(run.started for run in runs),
        seconds=round(sum(run.seconds for run in runs), 1),
    )


def draw(results: Results, out: Path) -> None:
    """Writes results, plots and table to a directory, as the evaluation itself would."""
    view = view_of(results.evaluation)
    results.write(out)
    for stem, figure in view.figures(results, "light").items():
        plots.save(figure, out / f"{stem}.png")
    write_atomically(out / "table.md", with_notes(view.table(results), results.notes) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs from the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & {*arguments}:
        print(__doc__)
        return 0
    outs = [a.removeprefix("--out=") for a in arguments if a.startswith("--out=")]
    runs = [a for a in arguments if not a.startswith("--")]
    unknown = [a for a in arguments if a.startswith("--") and not a.startswith("--out=")]
    if unknown or len(outs) != 1 or not runs:
        return refuse("eval.merge", f"give RUN... and one --out=DIR; unknown: {unknown}")
    try:
        check_out(Path(outs[0]))
        results = merge([Results.read(Path(run)) for run in runs])
    except (OSError, ValueError, TypeError) as error:
        return refuse("eval.merge", error)
    draw(results, Path(outs[0]))
    print(f"{outs[0]}: {len(results.values)} values of {len(runs)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
