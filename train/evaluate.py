"""Held-out loss: on a fixed sample of records while training, on every byte at the end."""

import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from train.corpus.dataset import Dataset, Document, Mixture, Record, segments_to_record
from train.data import make_loader
from train.errors import ConfigError
from train.sharding import local_rows, put_batch

Evaluate = Callable[[Any, Any], tuple[Any, Any]]


def check_heldout(heldout: Dataset | Mixture, num_batches: int, batch_size: int) -> None:
    """Checks that the held-out records suffice for an evaluation without repetition.

    Raises:
      ConfigError: with the sizes.
    """
    records = sum(len(part) for part in heldout.datasets) if isinstance(heldout, Mixture) else len(heldout)
    if num_batches * batch_size > records:
        raise ConfigError(
            f"eval.num_batches x eval.global_batch_size = {num_batches * batch_size}; "
            f"it must be at most the {records} held-out records"
        )


def heldout_batches(
    heldout: Dataset | Mixture, num_batches: int, batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[Record]:
    """Some rows (all by default) of the evaluated batches: the same ones, in the same order, every time."""
    loader = make_loader(heldout, seed=0, global_batch_size=batch_size, rows=rows)
    try:
        for _ in range(num_batches):
            yield next(loader)
    finally:
        loader.close()


def mean_loss(evaluate: Evaluate, params: Any, batches: Iterable[Record], sharding: Any) -> float:
    """Mean nats over all targets of the batches, summed in float64."""
    total, targets = 0.0, 0
    for batch in batches:
        loss_sum, count = jax.device_get(evaluate(params, put_batch(batch, 1, sharding)))
        total, targets = total + float(loss_sum), targets + int(count)
    return total / max(targets, 1)


def windows(documents: Iterable[Document], length: int) -> Iterator[Record]:
    """Records in which every token of every document is a target exactly once, but for its first.

    A document is cut into windows of ``length`` tokens that overlap by one: the last token of a
    window is the first of the next, where it is input only. Short windows share a record as
    segments.
    """
    pieces: list[np.ndarray] = []
    room = length
    for document in documents:
        for begin in range(0, max(1, len(document.tokens) - 1), length - 1):
            piece = document.tokens[begin : begin + length]
            if len(piece) > room:
                yield _record(pieces, length)
                pieces, room = [], length
            pieces.append(piece)
            room -= len(piece)
    if pieces:
        yield _record(pieces, length)


def _record(pieces: list[np.ndarray], length: int) -> Record:
    tokens = np.zeros(length, np.int32)
    joined = np.concatenate(pieces)
    tokens[: len(joined)] = joined
    starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])])
    return segments_to_record(tokens, starts, len(joined))


def batched(records: Iterable[Record], batch_size: int) -> Iterator[Record]:
    """Batches of records; the last one is filled up with padding."""
    rows: list[Record] = []
    for record in records:
        rows.append(record)
        if len(rows) == batch_size:
            yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            rows = []
    if rows:
        padding = {name: np.zeros_like(values) for name, values in rows[0].items()}
        rows += [padding] * (batch_size - len(rows))
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def bits_per_byte(
    evaluate: Evaluate,
    params: Any,
    documents: Iterable[Document],
    length: int,
    batch_size: int,
    sharding: Any,
) -> float:
    """Code length of whole documents in bits per byte of their text, marks of their ends included.

    Each token is predicted from at most ``length - 1`` tokens before it in its document. Of several processes
    each reads all documents, and computes the rows that its devices hold.
    """
    rows = None if jax.process_count() == 1 else local_rows(sharding, batch_size)
    total, text_bytes = 0.0, 0

    def counted() -> Iterator[Document]:
        nonlocal text_bytes
        for document in documents:
            text_bytes += document.text_bytes
            yield document

    for batch in batched(windows(counted(), length), batch_size):
        if rows is not None:
            batch = {name: values[rows] for name, values in batch.items()}
        loss_sum, _ = jax.device_get(evaluate(params, put_batch(batch, 1, sharding)))
        total += float(loss_sum)
    return total / math.log(2) / text_bytes


def compressor_bits_per_byte(documents: Iterable[Document]) -> dict[str, float]:
    """Bits per byte of ``gzip -9`` and ``xz -9`` on the documents' bytes, all in one file."""
    raw = b"".join(document.raw or b"" for document in documents)
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(raw, compresslevel=9, mtime=0)) / len(raw),
        "xz_bits_per_byte": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
    }
