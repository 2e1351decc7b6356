"""Batches whose content depends on (datasets, seed, step, global batch size) and on nothing else.

The record at place p of the endless shuffled stream is row ``p % global_batch_size`` of the batch of step
``p // global_batch_size``. A process reads only the rows of each batch that its devices hold, so the number
of processes, of threads and of restarts cannot change what is trained on, and the whole position is one
integer: the step.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from train.corpus.dataset import Dataset, Document, Mixture, Record
from train.corpus.errors import DataError
from train.corpus.prepared import PreparedDataset
from train.corpus.python_source import PythonSource, python_source

__all__ = [
    "DataError",
    "Dataset",
    "Document",
    "Loader",
    "Mixture",
    "PreparedDataset",
    "PythonSource",
    "Record",
    "make_loader",
    "open_prepared",
    "python_source",
]

_PREFETCH_BATCHES = 4


def open_prepared(
    paths: Sequence[str | Path],
    split: str = "train",
    *,
    weights: Sequence[float] = (),
    context_length: int | None = None,
    verify: bool = True,
) -> PreparedDataset | Mixture:
    """One prepared directory as a data set, several as a mixture by ``weights`` (equal by default).

    Raises:
      DataError: for no path, or as ``PreparedDataset`` and ``Mixture``.
    """
    if not paths:
        raise DataError("no prepared directory is given")
    parts = [PreparedDataset(path, split, context_length=context_length, verify=verify) for path in paths]
    if len(parts) == 1 and not weights:
        return parts[0]
    return Mixture(tuple(parts), tuple(weights) or (1.0,) * len(parts))


def _places(size: int, seed: int, shuffle: bool) -> grain.MapDataset:
    """Endless stream of record indices: every index once an epoch, each epoch in its own order."""
    indices = grain.MapDataset.range(size)
    if shuffle:
        indices = indices.seed(seed).shuffle()
    return indices.repeat(None)


def _stream_seed(seed: int, number: int) -> int:
    """An independent shuffle seed for each dataset of a mixture."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _tagged(dataset: int):
    return lambda index: (dataset, index)


@dataclasses.dataclass(frozen=True)
class _ProcessSteps:
    """Random access by step to the rows of one process. A ``grain`` random-access source."""

    places: grain.MapDataset
    datasets: tuple[Dataset, ...]
    global_batch_size: int
    rows: tuple[int, ...]
    start_step: int

    def __len__(self) -> int:
        return sys.maxsize // self.global_batch_size - self.start_step

    def __getitem__(self, index: int) -> Record:
        begin = (self.start_step + int(index)) * self.global_batch_size
        chosen = (self.places[begin + row] for row in self.rows)
        records = [self.datasets[which][record] for which, record in chosen]
        return {name: np.stack([record[name] for record in records]) for name in records[0]}


class Loader(Iterator[Record]):
    """Iterator over the batches of one process; ``step`` is the number of the next batch."""

    def __init__(self, source: _ProcessSteps, num_threads: int) -> None:
        options = grain.ReadOptions(
            num_threads=num_threads,
            prefetch_buffer_size=max(_PREFETCH_BATCHES, num_threads) if num_threads else 0,
        )
        self._batches = iter(grain.MapDataset.source(source).to_iter_dataset(options))
        self.step = source.start_step

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Record:
        batch = next(self._batches)
        self.step += 1
        return batch

    def close(self) -> None:
        """Stops the prefetch threads."""
        self._batches.close()


def make_loader(
    data: Dataset | Mixture,
    *,
    seed: int,
    global_batch_size: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    num_threads: int = 2,
    shuffle: bool = True,
) -> Loader:
    """Endless batches of ``dict(tokens, segment_ids, positions)``, int32 [r, t], from ``start_step`` on.

    Batch s depends on (data, seed, s, global_batch_size) only, and row i of it is the same whichever
    ``rows`` are read, with any ``num_threads`` and any ``start_step``. Starting at a step costs O(1).
    An epoch holds every record exactly once, and each epoch of each seed is shuffled anew. A mixture
    draws from its datasets in proportion to the weights, each dataset running through its own epochs.

    Args:
      data: one dataset or a mixture.
      seed: of the shuffle, 0 to 2^32 - 1.
      global_batch_size: records in a step over all processes.
      start_step: number of the first batch.
      rows: which rows of each batch to read, in this order; all by default.
      num_threads: prefetch threads; 0 reads in the caller's thread.
      shuffle: False keeps record order (evaluation).

    Raises:
      ValueError: naming the argument that is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it must be in [0, 2^32)")
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size is {global_batch_size}; it must be positive")
    wanted = tuple(range(global_batch_size) if rows is None else rows)
    if not wanted or not 0 <= min(wanted) <= max(wanted) < global_batch_size:
        raise ValueError(
            f"rows are {wanted}; they must be some in [0, global_batch_size={global_batch_size})"
        )
    if start_step < 0:
        raise ValueError(f"start_step is {start_step}; it must not be negative")
    if num_threads < 0:
        raise ValueError(f"num_threads is {num_threads}; it must not be negative")
    mixture = data if isinstance(data, Mixture) else Mixture((data,), (1.0,))
    for dataset in mixture.datasets:
        if len(dataset) == 0:
            raise DataError(f"dataset {dataset.fingerprint[:12]} has no record")
    streams = [
        _places(len(dataset), _stream_seed(seed, number), shuffle).map(_tagged(number))
        for number, dataset in enumerate(mixture.datasets)
    ]
    places = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights=list(mixture.weights))
    source = _ProcessSteps(places, tuple(mixture.datasets), global_batch_size, wanted, start_step)
    return Loader(source, num_threads)
