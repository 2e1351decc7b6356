"""One self-contained HTML page about runs and evaluations: ``python -m eval.report RUN... [--out=FILE]``.

A RUN is a training run (``config.json``, ``metrics.jsonl``) or a directory with ``results.json``; evaluations
below a directory are found. The page holds differences of configuration, loss curves, a comparison of numbers
that several results share, and every evaluation with its plots and tables, provenance and notes. It needs no
script and no network, follows the reader's light or dark theme, and is readable on a phone.

Exit code 0: written; 2: refused (a path that is not there, a directory with nothing to report).
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import provenance
from eval.common import check_out, refuse
from eval.report_page import counted, page
from eval.results import FILENAME, Results, write_atomically
from train.metrics import METRICS_FILE, iterate_rows

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What a report reads of a training run: name, flat configuration, metric rows, summary."""

    name: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A result file and how the page calls it."""

    name: str
    results: Results


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_training_run(directory: Path) -> TrainingRun | None:
    """The training run in a directory, or None if there is none.

    Raises:
      ValueError: for a configuration that is not JSON.
    """
    config_path, metrics = directory / CONFIG_FILE, directory / METRICS_FILE
    if not config_path.is_file() and not metrics.is_file():
        return None
    summary_path = directory / SUMMARY_FILE
    return TrainingRun(
        directory.name,
        flatten(_read_json(config_path)) if config_path.is_file() else {},
        list(iterate_rows(metrics)),
        _read_json(summary_path) if summary_path.is_file() else {},
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}; it must be an object")
    return found


def collect(paths: Sequence[Path]) -> tuple[list[TrainingRun], list[Evaluation]]:
    """Training runs and evaluations in and below the given directories, in order, each once.

    Raises:
      FileNotFoundError: for a path that is not a directory.
      ValueError: for a directory with nothing to report, or a damaged file, naming it.
    """
    runs: list[TrainingRun] = []
    evaluations: list[Evaluation] = []
    seen: set[Path] = set()
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a directory")
        run = None if path.resolve() in seen else read_training_run(path)
        if run is not None:
            runs.append(run)
        files = sorted(path.rglob(FILENAME))
        if run is None and not files and path.resolve() not in seen:
            raise ValueError(
                f"{path} has neither {CONFIG_FILE}, {METRICS_FILE} nor a {FILENAME} in or below it"
            )
        seen.add(path.resolve())
        for file in files:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            inside = file.parent.relative_to(path)
            name = path.resolve().name if str(inside) == "." else f"{path.resolve().name}/{inside.as_posix()}"
            evaluations.append(Evaluation(name, Results.read(file)))
    return runs, evaluations


def differences(runs: Sequence[TrainingRun]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs: (name, value in each run)."""
    names = sorted({name for run in runs for name in run.config})
    rows = []
    for name in names:
        values = [json.dumps(run.config[name]) if name in run.config else "not set" for run in runs]
        if len(set(values)) > 1:
            rows.append((name, values))
    return rows


def shared_numbers(evaluations: Sequence[Evaluation]) -> dict[str, list[tuple[str, list]]]:
    """By kind of evaluation: the numbers that at least two of its results have, beside each other.

    A number is identified by metric and setting; the model's name is left out where every result has a
    single model, so that two checkpoints compare.
    """
    tables: dict[str, list[tuple[str, list]]] = {}
    for kind in dict.fromkeys(e.results.evaluation for e in evaluations):
        members = [e for e in evaluations if e.results.evaluation == kind]
        if len(members) < 2:
            continue
        names = [{v.where.get("model") for v in _measured(e)} - {None} for e in members]
        hidden = {"model"} if all(len(found) == 1 for found in names) else set()
        keyed = []
        for member in members:
            entries = {}
            for value in _measured(member):
                where = ", ".join(f"{k} {v}" for k, v in value.where.items() if k not in hidden)
                entries[f"{value.metric} ({where})" if where else value.metric] = value
            keyed.append(entries)
        rows = []
        for key in dict.fromkeys(key for entries in keyed for key in entries):
            found = [entries.get(key) for entries in keyed]
            if sum(value is not None for value in found) > 1:
                rows.append((key, found))
        if rows:
            tables[kind] = rows
    return tables


def _measured(evaluation: Evaluation) -> list:
    return [v for v in evaluation.results.values if v.source == "measured"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs from the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & {*arguments}:
        print(__doc__)
        return 0
    outs = [a.removeprefix("--out=") for a in arguments if a.startswith("--out=")]
    unknown = [a for a in arguments if a.startswith("-") and not a.startswith("--out=")]
    paths = [Path(a) for a in arguments if not a.startswith("-")]
    if unknown or len(outs) > 1 or not paths:
        return refuse("eval.report", f"give RUN... and at most one --out=FILE; unknown: {unknown}")
    out = Path(outs[0] if outs else "report.html")
    try:
        check_out(out, file=True)
        runs, evaluations = collect(paths)
    except (OSError, ValueError, TypeError) as error:
        return refuse("eval.report", error)
    text = page(
        runs,
        evaluations,
        differences=differences(runs),
        shared=shared_numbers(evaluations),
        made=provenance.now(),
        command=provenance.command("eval.report", arguments),
    )
    write_atomically(out, text)
    found = f"{counted(runs, 'training run')}, {counted(evaluations, 'evaluation')}"
    print(f"{out}: {found}, {len(text) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
