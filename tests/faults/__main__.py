"""Runs every kind of fault and prints what was counted; exit code 1 if any promise was broken."""

import tests.conftest  # noqa: F401, I001 (the same devices and compiler as the suite, before jax is imported)

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import damage, elastic, fuzz, kills, stalls, storage


def main() -> int:
    """Parses the counts and runs the drivers in turn."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="kill -9s, half of them aimed at saves")
    parser.add_argument("--flips", type=int, default=500, help="single-bit flips of a checkpoint")
    parser.add_argument("--mutations", type=int, default=10_000, help="mutated files of every format")
    parser.add_argument("--seed", type=int, default=0, help="of moments, bits and mutations")
    parser.add_argument("--only", choices=("kills", "damage", "elastic", "fuzz", "stalls", "storage"))
    arguments = parser.parse_args()
    drivers = {
        "kills": lambda at: kills.run(at, arguments.kills, arguments.seed),
        "damage": lambda at: damage.run(at, arguments.flips, arguments.seed),
        "elastic": elastic.run,
        "fuzz": lambda at: fuzz.run(at, arguments.mutations, arguments.seed),
        "stalls": stalls.run,
        "storage": storage.run,
    }
    failed = []
    for name, driver in drivers.items():
        if arguments.only not in (None, name):
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"holo-{name}-") as directory:
            problems = driver(Path(directory))
        for problem in problems:
            print(f"{name}: FAILED: {problem}")
        failed += problems
        print(f"{name}: {'failed' if problems else 'held'} in {time.monotonic() - began:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
