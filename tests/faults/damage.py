"""Single-bit flips over all files of a checkpoint: none is ever loaded."""

import random
from pathlib import Path

from tests.train import child
from tests.train.common import micro_config
from train.checkpoint import CheckpointStore


def run(directory: Path, flips: int, seed: int) -> list[str]:
    """Flips one bit at a time, chosen evenly over the bytes of all files, and asks for good checkpoints."""
    overrides = dict(num_steps=2, checkpoint__keep_latest=1, checkpoint__keep_best=0)
    if code := child.run(directory / "run", overrides):
        return [f"the run ended with {code}: {child.output(directory / 'run')}"]
    checkpoints = directory / "run" / "checkpoints"
    files = sorted(path for path in (checkpoints / "2").rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    chooser = random.Random(seed)
    loaded, touched = [], set()
    # Every file once, then evenly over all bits.
    chosen = [path for path, size in zip(files, sizes, strict=True) if size]
    chosen += chooser.choices(files, weights=sizes, k=max(0, flips - len(chosen)))
    for path in chosen[:flips]:
        data = bytearray(path.read_bytes())
        bit = chooser.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        touched.add(path)
        aside: list[Path] = []
        store = CheckpointStore(
            checkpoints,
            micro_config(**overrides).checkpoint,
            lambda entry, aside=aside: aside.append(entry.path),
        )
        if list(store.candidates()) or len(aside) != 1:
            loaded.append(f"bit {bit} of {path.name} was not noticed")
        store.close()
        aside[0].rename(checkpoints / "2")
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
    print(f"damage: {len(chosen[:flips])} flips over {len(touched)} files, {len(loaded)} loaded silently")
    return loaded
