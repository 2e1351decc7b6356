"""What a training corpus offers: fixed-length records for training, whole documents for evaluation."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from train.corpus.errors import DataError

Record = dict[str, np.ndarray]


class Document(NamedTuple):
    """One whole document.

    Attributes:
      tokens: int32 [t], with the tokenizer's begin and end marks where the corpus has them.
      name: where it comes from, unique in its corpus.
      subset: the corpus's own name for its source ("RedPajamaBook"), "" when it has none.
      text_bytes: UTF-8 length of its text: the denominator of bits per byte.
      raw: the text itself as bytes when the corpus keeps it, else None.
    """

    tokens: np.ndarray
    name: str
    subset: str
    text_bytes: int
    raw: bytes | None = None


@runtime_checkable
class Dataset(Protocol):
    """Random access to packed records of one split.

    ``dataset[i]`` is ``dict(tokens=int32 [t], segment_ids=int32 [t], positions=int32 [t])`` with
    ``t = context_length``. Segments (pieces of documents) are numbered 1, 2, ... in a record; 0 is
    padding. Positions restart at 0 with each segment. ``fingerprint`` is a SHA-256 over everything
    that decides the records' content. ``documents`` gives the whole documents of a split ("train",
    "heldout", or another of the corpus's own), of the data set's own split by default.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def documents(self, split: str | None = None, *, min_tokens: int = 1) -> Iterator[Document]: ...


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Datasets drawn from in proportion to ``weights`` (records per drawn record, any positive scale).

    Raises:
      DataError: for no dataset, weights that do not match or are not positive, or datasets that
        differ in vocabulary, context length or tokenizer (``tokenizer_sha256``, where they have one).
    """

    datasets: Sequence[Dataset]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        if not self.datasets:
            raise DataError("a mixture needs at least one dataset")
        if len(self.datasets) != len(self.weights):
            raise DataError(
                f"{len(self.datasets)} datasets but {len(self.weights)} weights; give one weight each"
            )
        for weight in self.weights:
            if not 0 < weight < float("inf"):
                raise DataError(f"mixture weight {weight!r} must be a positive finite number")
        for field in ("vocab_size", "context_length"):
            values = sorted({getattr(dataset, field) for dataset in self.datasets})
            if len(values) > 1:
                raise DataError(f"datasets of a mixture differ in {field}: {values}")
        if len({getattr(dataset, "tokenizer_sha256", None) for dataset in self.datasets}) > 1:
            raise DataError("datasets of a mixture were made with different tokenizers")

    @property
    def vocab_size(self) -> int:
        return self.datasets[0].vocab_size

    @property
    def context_length(self) -> int:
        return self.datasets[0].context_length

    @property
    def fingerprint(self) -> str:
        parts = [
            [dataset.fingerprint, float(weight)]
            for dataset, weight in zip(self.datasets, self.weights, strict=True)
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def segments_to_record(tokens: np.ndarray, starts: np.ndarray, length: int) -> Record:
    """A record from its tokens and the offsets at which segments start.

    Args:
      tokens: int32 [t], padded after ``length``.
      starts: int [s], increasing, first 0.
      length: number of real tokens.
    """
    size = tokens.shape[0]
    ends = np.append(starts[1:], length)
    lengths = ends - starts
    segment_ids = np.zeros(size, np.int32)
    segment_ids[:length] = np.repeat(np.arange(1, len(starts) + 1, dtype=np.int32), lengths)
    positions = np.zeros(size, np.int32)
    positions[:length] = np.arange(length, dtype=np.int32) - np.repeat(starts.astype(np.int32), lengths)
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}
