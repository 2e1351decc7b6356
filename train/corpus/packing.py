"""The record format, and packing documents end to end into records.

A record is, little endian::

    uint32 length, uint32 segments      real tokens; pieces of documents
    segments x _SEGMENT (24 bytes)      where each piece starts and which document it is part of
    tokens uint16|uint32 [t]            padded with 0 after ``length``

Documents follow each other without gaps, so only the last record of a shard is padded. A document
cut by a record border goes on in the next record; ``offset > 0`` is the continuation flag, and
``offset`` with ``size`` lets a reader put whole documents together again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SEGMENT = np.dtype(
    [
        ("start", "<u4"),  # first token of the piece in the record
        ("document", "<u4"),  # number of the document in its shard
        ("offset", "<u4"),  # tokens of the document in earlier records
        ("size", "<u4"),  # tokens of the whole document, marks included
        ("text_bytes", "<u4"),  # UTF-8 bytes of the whole document
        ("subset", "<u4"),  # index into the shard's subset names
    ]
)
_HEADER = np.dtype([("length", "<u4"), ("segments", "<u4")])


class PackedRecord(NamedTuple):
    """A decoded record: ``tokens`` [t] in the stored dtype, ``segments`` rows of ``SEGMENT``."""

    tokens: np.ndarray
    length: int
    segments: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest stored dtype that holds every token id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def decode_record(data: bytes, context_length: int, dtype: np.dtype) -> PackedRecord:
    """Reads one record.

    Raises:
      ValueError: if the size does not fit the header and context length.
    """
    if len(data) < _HEADER.itemsize:
        raise ValueError(f"a record of {len(data)} bytes is shorter than its header")
    header = np.frombuffer(data, _HEADER, count=1)[0]
    length, count = int(header["length"]), int(header["segments"])
    tokens_at = _HEADER.itemsize + count * SEGMENT.itemsize
    if len(data) != tokens_at + context_length * dtype.itemsize or not 0 < count <= length <= context_length:
        raise ValueError(
            f"a record of {len(data)} bytes does not hold {count} segments and {context_length} tokens"
        )
    segments = np.frombuffer(data, SEGMENT, count=count, offset=_HEADER.itemsize)
    return PackedRecord(np.frombuffer(data, dtype, offset=tokens_at), length, segments)


class Packer:
    """Cuts a stream of documents into records of ``context_length`` tokens; holds one record at a time."""

    def __init__(self, context_length: int, dtype: np.dtype) -> None:
        self._tokens = np.zeros(context_length, dtype)
        self._filled = 0
        self._segments: list[tuple[int, ...]] = []
        self._documents = 0
        self.records = 0

    def add(self, tokens: np.ndarray, text_bytes: int, subset: int) -> Iterator[bytes]:
        """Adds a document (at least one token); yields the records it completes."""
        done = 0
        while done < len(tokens):
            self._segments.append((self._filled, self._documents, done, len(tokens), text_bytes, subset))
            piece = tokens[done : done + len(self._tokens) - self._filled]
            self._tokens[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            done += len(piece)
            if self._filled == len(self._tokens):
                yield self._take()
        self._documents += 1

    def finish(self) -> Iterator[bytes]:
        """Yields the last, padded record if there is one."""
        if self._filled:
            self._tokens[self._filled :] = 0
            yield self._take()

    def _take(self) -> bytes:
        header = np.array([(self._filled, len(self._segments))], _HEADER)
        table = np.array(self._segments, SEGMENT)
        data = header.tobytes() + table.tobytes() + self._tokens.tobytes()
        self._segments = []
        self._filled = 0
        self.records += 1
        return data
