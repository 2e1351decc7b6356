"""Mutated files of every format a run reads: only typed errors, never anything else."""

import os
import random
import resource
import sys
from pathlib import Path

from tests.faults import formats

_MOST_MEMORY = 512 << 20  # beyond what was in use before


def run(directory: Path, mutations: int, seed: int, *, oversized: bool = True) -> list[str]:
    """Mutates a file of each format in turn and reads it, within a bounded memory."""
    chooser = random.Random(seed)
    targets = list(formats.write(directory))
    for target in targets:
        target.read()
    originals = [target.path.read_bytes() for target in targets]
    before = _peak_bytes()
    problems, refused = [], 0
    for number in range(mutations):
        target, original = targets[number % len(targets)], originals[number % len(targets)]
        mutated = mutate(original, chooser)
        target.path.write_bytes(mutated)
        where = f"{target.path.relative_to(directory)} (mutation {number})"
        try:
            target.read()
            if target.exact and mutated != original:
                problems.append(f"{where}: a change was taken for good")
        except formats.REFUSALS as error:
            refused += 1
            if not str(error) or "\n" in str(error).strip():
                problems.append(f"{where}: not one line: {error!r}")
        except Exception as error:  # any other kind is the failure looked for
            problems.append(f"{where}: {type(error).__name__}: {error} on {mutated[:200]!r}")
        target.path.write_bytes(original)
    if oversized:
        problems += _oversized(targets)
    grown = _peak_bytes() - before
    if grown > _MOST_MEMORY:
        problems.append(f"memory grew by {grown / 1e6:.0f} MB")
    print(
        f"fuzz: {mutations} mutations of {len(targets)} files, {refused} refused, {len(problems)} problems, "
        f"peak memory up by {grown / 1e6:.0f} MB"
    )
    return problems[:10]


def _oversized(targets: list[formats.Format]) -> list[str]:
    """Every file grown to 2 GiB of nothing: refused, or read in pieces, but never taken into memory."""
    problems = []
    for target in targets:
        original = target.path.read_bytes()
        if target.exact and target.path.suffix == ".arrayrecord":
            continue  # its size is compared first, as the size of a checkpoint's files is
        os.truncate(target.path, 1 << 31)
        try:
            target.read()
        except formats.REFUSALS:
            pass
        except Exception as error:
            problems.append(f"{target.path.name} of 2 GiB: {type(error).__name__}: {error}")
        target.path.write_bytes(original)
    return problems


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def mutate(data: bytes, chooser: random.Random) -> bytes:
    """One to three random edits: flips, cuts, repeats, and values of the wrong kind."""
    values = [
        b"null",
        b"-1",
        b"1e999",
        b"NaN",
        b'"x"',
        b"[]",
        b"{}",
        b"true",
        b"9" * 400,
        b"[" * 2000,
        b"\xff\x00",
    ]
    result = bytearray(data)
    for _ in range(chooser.randrange(1, 4)):
        if not result:
            break
        begin = chooser.randrange(len(result))
        end = min(len(result), begin + chooser.randrange(1, 40))
        kind = chooser.randrange(5)
        if kind == 0:
            result[begin] ^= 1 << chooser.randrange(8)
        elif kind == 1:
            del result[begin:end]
        elif kind == 2:
            result[begin:begin] = result[begin:end]
        elif kind == 3:
            result[begin:end] = chooser.choice(values)
        else:
            del result[begin:]
    return bytes(result)
