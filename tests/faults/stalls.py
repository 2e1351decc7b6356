"""A stall in start-up, data, step or save ends the process with all stacks within its limit."""

import time
from pathlib import Path

from tests.train import child
from train.errors import EXIT_FAILED

_LIMIT = 4.0


def run(directory: Path) -> list[str]:
    """Stalls each phase once."""
    problems = []
    for phase, limit in [
        ("startup", "startup_seconds"),
        ("data", "step_seconds"),
        ("step", "step_seconds"),
        ("save", "save_seconds"),
    ]:
        workdir = directory / phase
        began = time.monotonic()
        code = child.run(workdir, {f"watchdog__{limit}": _LIMIT}, stall=phase)
        seconds, text = time.monotonic() - began, child.output(workdir)
        if code != EXIT_FAILED or "Timeout" not in text or "in wrapped" not in text:
            problems.append(f"a stall in {phase} ended with {code} after {seconds:.0f} s: {text[-300:]}")
        print(f"stalls: {phase} ended with code {code} and {text.count('Thread 0x')} stacks", flush=True)
    return problems
