"""Every evaluation at its quick size: ``python -m eval.quick [NAME...] [--out=runs/quick] [--jobs=2]``.

Each runs by its own command, as a user would run it, and must end within three minutes with its controls
holding; ``results.json`` must pass the loader of ``eval.report``, be whole, without a failed cell, and show
the answers that are known (``eval.quick_claims``); table and plots must be there. At the end one page reports
them all. Prints a line an evaluation.

Exit code 0: all did; 1: one did not, and its output follows its line; 2: refused, nothing was run.
"""

import argparse
import concurrent.futures
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from eval.common import FAILED_CONTROL, UNFINISHED, UsageError, check_out, refuse
from eval.provenance import ROOT
from eval.quick_claims import CLAIMS
from eval.results import FILENAME, Results

# Longest first, so that none is left alone at the end; what it needs beside the extra `train`.
NAMES = (
    "capacity",
    "inference",
    "speed",
    "needle",
    "recall",
    "scaling",
    "ruler",
    "orthogonality",
    "perplexity",
    "harness",
)
_PACKAGES = {"harness": "lm_eval"}
# On a CPU most of the time goes into compiling. Those that train do so for seconds and want the first level
# of optimisation (`holo` in `recall`: 16 s of a processor in place of 72, a step 73 ms in place of 65); the
# others want none (`speed`: 69 s of processors in place of 112).
_TRAINS = ("capacity", "needle", "recall")
_COMPILING = (
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)
_FLAGS = {"scaling": ("--xla_force_host_platform_device_count=4",)}
_DISTURBED = "a token after "  # the latency of decoding, by context
SECONDS, PROCESSOR_SECONDS = 180.0, 360.0  # three minutes, of two cores
_HUNG = 1800.0


def only_disturbed(results: Results) -> bool:
    """Whether the controls that failed are those that a shared CPU disturbs at this size."""
    failed = [note for note in results.notes if note.startswith(FAILED_CONTROL)]
    return bool(failed) and all(n.removeprefix(FAILED_CONTROL).startswith(_DISTURBED) for n in failed)


def problem(results: Results, name: str, out: Path) -> str:
    """What is wrong with the files of a run that ended with code 0; empty if nothing is."""
    if results.evaluation != name:
        return f"{FILENAME} is one of {results.evaluation!r}"
    if UNFINISHED in results.notes:
        return f"{FILENAME} is unfinished"
    bad = [v for v in results.values if v.status not in ("ok", "unavailable")]
    if bad:
        return f"{bad[0].metric} at {dict(bad[0].where)}: {bad[0].status}: {bad[0].detail}"
    if not (out / "table.md").is_file() or not any(out.glob("*.png")):
        return "table.md or the plots are missing"
    return "; ".join(CLAIMS[name](results)) if name in CLAIMS else ""


def flags(name: str) -> str:
    """``XLA_FLAGS`` of an evaluation: those of this process, and ours that it does not name."""
    given = os.environ.get("XLA_FLAGS", "")
    level = f"--xla_backend_optimization_level={int(name in _TRAINS)}"
    ours = (level, *_COMPILING, *_FLAGS.get(name, ()))
    return " ".join([given, *(flag for flag in ours if flag.split("=")[0] not in given)]).strip()


def run_one(name: str, out: Path) -> tuple[str, str]:
    """Runs one evaluation into ``out``; returns its line and, if it did not do what it should, why."""
    (out / FILENAME).unlink(missing_ok=True)
    command = [sys.executable, "-m", f"eval.{name}"]
    command += [f"--config=configs/eval/{name}.py:quick", f"--out={out}"]
    with tempfile.TemporaryFile() as log:
        start = time.monotonic()
        # Where an operation was traced costs a twentieth of compiling, and nobody reads it here.
        untraced = {"JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0"}
        environment = untraced | os.environ | {"XLA_FLAGS": flags(name)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        timer = threading.Timer(_HUNG, process.kill)
        timer.start()
        _, status, used = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = code = os.waitstatus_to_exitcode(status)
        clock, cpu = time.monotonic() - start, used.ru_utime + used.ru_stime
        log.seek(0)
        said = log.read().decode(errors="replace")
    line = f"{name:14} {clock:4.0f} s, {cpu:4.0f} s of processors"
    try:
        results = Results.read(out)
        line += f", {len(results.values):4} values"
        if code and not (code == 1 and only_disturbed(results)):
            return line, f"exit code {code}\n{said}"
        wrong = problem(results, name, out)
    except (LookupError, OSError, TypeError, ValueError) as error:
        return line, f"exit code {code}, {error}\n{said}"
    # The clock counts what else runs here; processors' seconds do not, but are up to twice as many beside it.
    if clock > SECONDS and cpu > PROCESSOR_SECONDS:
        wrong = wrong or f"a quick variant ends within {SECONDS:.0f} s"
    return line, wrong


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs from the command line; returns the exit code."""
    options = _Parser(
        prog="eval.quick", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("names", nargs="*", metavar="NAME", help="evaluations; all by default")
    options.add_argument("--out", type=Path, default=Path("runs/quick"), help="directory of all results")
    options.add_argument("--jobs", type=int, default=2, help="evaluations at one time")
    try:
        given = options.parse_args(argv)
        unknown = [name for name in given.names if name not in NAMES]
        if unknown:
            raise UsageError(f"no evaluation is called {unknown[0]!r}; known are {', '.join(NAMES)}")
        if given.jobs < 1:
            raise UsageError(f"--jobs is {given.jobs}; it must be at least 1")
        check_out(given.out)
    except (UsageError, ValueError) as error:
        return refuse("eval.quick", error)
    out, failed = given.out.absolute(), []
    lacking = {n: p for n, p in _PACKAGES.items() if importlib.util.find_spec(p) is None}
    names = given.names or [name for name in NAMES if name not in lacking]
    for name in NAMES:
        if name not in names and not given.names:
            print(f"{name:14} left out: {lacking[name]} is not installed")
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        running = {pool.submit(run_one, name, out / name): name for name in names}
        for done in concurrent.futures.as_completed(running):
            line, wrong = done.result()
            print(f"{line}: FAILED: {wrong}" if wrong else line, flush=True)
            if wrong:
                failed.append(running[done])
    if failed:
        print(f"eval.quick: failed: {', '.join(failed)}")
        return 1
    report = [sys.executable, "-m", "eval.report", str(out), f"--out={out / 'report.html'}"]
    return subprocess.run(report, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
