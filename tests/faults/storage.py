"""Full and read-only disks (a small tmpfs): a clear error, the old checkpoint intact, exact resume."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.faults.kills import save_was_cut
from tests.train import child
from tests.train.common import micro_config, read_curve
from train.checkpoint import CheckpointStore
from train.errors import EXIT_FAILED


def run(directory: Path) -> list[str]:
    """Fills the disk under a run: at once, and so that a save begins and fails; then a read-only disk."""
    if child.run(directory / "whole"):
        return [f"the uninterrupted run failed: {child.output(directory / 'whole')}"]
    expected, problems = read_curve(directory / "whole"), []
    for number, (room, when) in enumerate(((0, "row"), (60, "row"), (20, "save"), (0, "manifest"))):
        with small_disk(directory / f"disk-{number}") as disk:
            if disk is None:
                print("storage: not run: a tmpfs can be mounted by root only")
                return []
            problems += _fill(disk, room, when, expected)
    with small_disk(directory / "readonly") as disk:
        assert disk is not None
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        code = child.run(disk / "run", log=directory / "readonly.log")
        text = (directory / "readonly.log").read_text()
        if code != EXIT_FAILED or "Read-only file system" not in text or text.count("\n") != 1:
            problems.append(f"a read-only disk ended with {code}: {text[-300:]}")
        print(f"storage: read-only disk: {text.strip()}")
    return problems


def _fill(disk: Path, room: int, when: str, expected: object) -> list[str]:
    """A run whose disk has ``room`` KiB left before, or some way into, the save of step 8."""
    workdir, log = disk / "run", disk.with_suffix(".log")
    code = child.run(workdir, fill_disk=(room, when), slow=0.1, log=log)
    text = log.read_text()
    problems = []
    if code != EXIT_FAILED or "could not be written" not in text.splitlines()[-1]:
        problems.append(f"a disk with {room} KiB left at the {when} ended with {code}: {text[-500:]}")
    if save_was_cut(workdir):
        problems.append(f"a disk with {room} KiB left: files of an unfinished save were left")
    store = CheckpointStore(workdir / "checkpoints", micro_config().checkpoint)
    good = list(store.candidates())
    store.close()
    if good[:1] != [4] or store.quarantined():
        problems.append(f"a disk with {room} KiB left: good checkpoints are {good}, not 4")
    (workdir / "filler").unlink()
    code = child.run(workdir, log=log)
    if code or read_curve(workdir) != expected:
        problems.append(f"after freeing the disk the run ended with {code}, or its curve differs")
    print(f"storage: {room} KiB left at the {when}: {text.strip().splitlines()[-1]}", flush=True)
    return problems


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path | None]:
    """A tmpfs of 4 MiB; None where mounting is not allowed."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True)
    try:
        yield path if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", path], check=True)
