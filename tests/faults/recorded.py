"""Goes on with the run in a directory and notes the SHA-256 of every training batch: ``batches.txt``.

python -m tests.faults.recorded RUN
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import train.loop
from train.run_config import RunConfig

BATCHES = "batches.txt"


class _Noted:
    """A loader that appends number and hash of each batch to a file before it hands it out."""

    def __init__(self, loader: Any, path: Path) -> None:
        self._loader, self._path = loader, path

    @property
    def step(self) -> int:
        return self._loader.step

    def __next__(self) -> Any:
        number, batch = self._loader.step, next(self._loader)
        hasher = hashlib.sha256()
        for name in sorted(batch):
            hasher.update(name.encode() + batch[name].tobytes())
        with self._path.open("a") as file:
            file.write(f"{number} {hasher.hexdigest()}\n")
        return batch

    def close(self) -> None:
        self._loader.close()


def main(workdir: Path) -> None:
    """Trains to the end of the configuration in ``workdir``."""
    make = train.loop.make_loader
    train.loop.make_loader = lambda *args, **options: _Noted(make(*args, **options), workdir / BATCHES)
    train.loop.train(RunConfig.read(workdir), workdir)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
