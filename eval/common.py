"""What every evaluation script shares: command line, settings, a reporter that writes as it goes, tables.

A script is ``python -m eval.NAME --config=configs/eval/NAME.py[:VARIANT] --out=DIR [--config.FIELD=VALUE]``.
Exit code 0: measured; 1: measured, but a control failed (the notes say which); 2: refused, nothing was run.
"""

import dataclasses
import importlib.util
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from eval import plots, provenance
from eval.progress import Steps
from eval.results import Results, Value, write_atomically
from holo_jax.pretrained import PretrainedError
from holo_jax.tokenizers import TokenizerError
from train.corpus.errors import DataError

_WRITE_EVERY = 20.0  # seconds between writes of partial results
FAILED_CONTROL = "FAILED CONTROL: "
UNFINISHED = "unfinished: the run was still going, or was stopped, when this file was written"


class UsageError(ValueError):
    """What was asked for cannot be evaluated; the message is complete in one line."""


# Refusals that tell the user what to change: one line, no traceback, exit code 2.
_REFUSALS = (UsageError, PretrainedError, TokenizerError, DataError)


class Reporter:
    """Collects values and notes; writes ``results.json`` every now and then, so a killed run leaves its part.

    Attributes:
      values, notes: what was reported so far.
      failed_controls: notes of controls that failed (also in ``notes``); they make the exit code 1.
      steps: the progress display.
      out: directory of the run, or None to keep everything in memory.
    """

    def __init__(self, name: str, settings: object, seeds: Sequence[int], *, out: Path | None, command: str):
        self.values: list[Value] = []
        self.notes: list[str] = []
        self.failed_controls: list[str] = []
        self.steps = Steps(name)
        self.out = out
        self._header = {
            "evaluation": name,
            "settings": dataclasses.asdict(settings),
            "seeds": [int(s) for s in seeds],
            "command": command,
            "device": provenance.device(),
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            "started": provenance.now(),
        }
        self._start = self._written = time.monotonic()

    def add(self, *values: Value) -> None:
        """Adds values, and writes them when the last write is long ago."""
        self.values.extend(values)
        if time.monotonic() - self._written > _WRITE_EVERY:
            self.save()

    def save(self) -> None:
        """Writes what there is so far, so that a run that is stopped leaves it."""
        if self.out is not None and self.values:
            self.results(notes=[*self.notes, UNFINISHED]).write(self.out)
            self._written = time.monotonic()

    def note(self, text: str) -> None:
        """Adds a sentence that a reader of the numbers must know."""
        if text not in self.notes:
            self.notes.append(text)

    def fail_control(self, text: str) -> None:
        """Records that a control of the harness failed: the numbers are written, the exit code is 1."""
        self.failed_controls.append(text)
        self.note(f"{FAILED_CONTROL}{text}")

    def results(self, notes: Sequence[str] | None = None) -> Results:
        """Everything reported so far, with its provenance."""
        return Results(
            values=tuple(self.values),
            notes=tuple(self.notes if notes is None else notes),
            seconds=round(time.monotonic() - self._start, 1),
            **self._header,
        )


def freeze(kind: type, config: ConfigDict | dict, path: str = "config"):
    """Turns plain settings into the frozen dataclass ``kind``, field by field.

    Lists become tuples, integers become floats where the field is a float; nothing else is converted.

    Raises:
      TypeError, ValueError: naming the field, its value and the constraint.
    """
    data = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    if set(data) != names:
        raise ValueError(
            f"{path} lacks {sorted(names - set(data))} and has the unknown {sorted(set(data) - names)}"
        )
    return kind(**{name: _convert(hints[name], data[name], f"{path}.{name}") for name in data})


def _convert(hint: object, value: object, path: str):
    if dataclasses.is_dataclass(hint):
        return freeze(hint, value, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _convert(option, value, path)
            except TypeError:
                continue
        raise TypeError(f"{path} is {value!r}; it must be {hint}")
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise TypeError(f"{path} is {value!r}; it must be a tuple, for example ({value!r},)")
        items = tuple(value)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(items))
        if len(items) != len(arguments):
            raise TypeError(f"{path} is {value!r}; it must have {len(arguments)} entries")
        return tuple(
            _convert(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(arguments, items, strict=True))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None) and value is None:
        return None
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise TypeError(f"{path} is {value!r}; it must be {getattr(hint, '__name__', hint)}")


def require_positive(settings: object, *names: str) -> None:
    """Checks that fields are at least one.

    Raises:
      ValueError: naming the first that is not.
    """
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be positive")


def load_config(name: str, variant: str = "full") -> ConfigDict:
    """Settings of ``configs/eval/NAME.py`` by variant, unlocked for changes in code (tests)."""
    path = provenance.ROOT / "configs" / "eval" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"configs.eval.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant).unlock()


def refuse(program: str, reason: object) -> int:
    """Says in one line why nothing was done; returns the exit code."""
    print(f"{program}: {' '.join(str(reason).split())}", file=sys.stderr)
    return 2


def check_out(out: Path, *, file: bool = False) -> None:
    """Checks that ``out`` can become a directory (or a file) before anything is computed for it.

    Raises:
      ValueError: naming the path that is in the way.
    """
    if file and out.is_dir():
        raise ValueError(f"--out={out} is a directory; it must be a file")
    place = (out.parent if file else out).absolute()
    nearest = next(path for path in (place, *place.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--out={out} cannot be written: {nearest} is no directory that can be written")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column left-aligned, the others right-aligned."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join([":---"] + ["---:"] * (len(head) - 1)) + "|"]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a table row has {len(row)} cells under {len(head)} headings")
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines)


def cell(value: Value | None, digits: int = 3) -> str:
    """A value with its interval for a table; an absent one by its status."""
    if value is None:
        return ""
    if value.status != "ok":
        return value.status.upper() if value.status == "oom" else value.status
    text = f"{value.value:.{digits}f}"
    if value.interval in ("none", "exact") or (value.interval == "bootstrap" and value.n == 1):
        return text  # one sample has no spread to show
    return f"{text} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def with_notes(table: str, notes: Sequence[str]) -> str:
    """A table, and under it what a reader of its numbers must know."""
    return "\n\n".join((table, *(f"Note: {note}" for note in notes)))


def run(
    name: str,
    settings_type: type,
    evaluate: Callable,
    *,
    figures: Callable[[Results, str], dict],
    table: Callable[[Results], str],
    seeds: Callable[[object], Sequence[int]] = lambda settings: (settings.seed,),
    argv: Sequence[str] | None = None,
) -> int:
    """The command line of one evaluation; returns the exit code.

    Args:
      name: module name under ``eval``.
      settings_type: frozen dataclass of the settings.
      evaluate: ``(settings, reporter) -> None``; adds its values to the reporter.
      figures: ``(results, theme) -> {file stem: Figure}``.
      table: ``results -> Markdown``.
      seeds: settings to the seeds they use; by default their one ``seed``.
      argv: arguments without the program name (default: those of the process).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        settings, out = _parse(name, settings_type, argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    except (flags.Error, AttributeError, KeyError, SyntaxError, TypeError, ValueError, OSError) as error:
        text = str(error.args[0] if isinstance(error, KeyError | AttributeError) and error.args else error)
        if text.startswith("Error whilst parsing config file"):  # with a traceback, whose last line says it
            text = text.strip().rpartition("\n")[2]
        return refuse(f"eval.{name}", text)
    reporter = Reporter(
        name, settings, seeds(settings), out=out, command=provenance.command(f"eval.{name}", argv)
    )
    try:
        with reporter.steps:
            evaluate(settings, reporter)
    except _REFUSALS as error:
        return refuse(f"eval.{name}", error)
    results = reporter.results()
    path = results.write(out)
    for stem, figure in figures(results, "light").items():
        plots.save(figure, out / f"{stem}.png")
    text = with_notes(table(results), results.notes)
    write_atomically(out / "table.md", text + "\n")
    print(text)
    print(f"\n{path}: {len(results.values)} values in {results.seconds:.0f} s")
    return 1 if reporter.failed_controls else 0


def _parse(name: str, settings_type: type, argv: Sequence[str]) -> tuple[object, Path]:
    # A private flag registry: no other module's flags, and the function can be called twice.
    registry = flags.FlagValues()
    default = str(provenance.ROOT / "configs" / "eval" / f"{name}.py")
    arguments = [f"eval.{name}", *argv]
    config = config_flags.DEFINE_config_file(
        "config", default, "settings file, with :variant", flag_values=registry, sys_argv=arguments
    )
    # The default file is loaded by now; a file without get_config would be loaded over it and keep its own.
    sys.modules.pop("config_config", None)
    out = flags.DEFINE_string(
        "out", None, "directory for results.json, plots, table.md", flag_values=registry
    )
    if any(a in ("--help", "-h", "--helpfull", "--helpshort") for a in argv):
        print(f"{sys.modules[settings_type.__module__].__doc__}\n{registry.get_help()}")
        raise SystemExit(0)
    rest = registry(arguments)[1:]
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; options start with --")
    if not out.value:
        raise ValueError("--out=DIR is required")
    check_out(Path(out.value))
    return freeze(settings_type, config.value), Path(out.value)
