"""Reads a prepared directory: records by index for training, whole documents for evaluation."""

import bisect
import collections
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from train.corpus.dataset import Document, Record, segments_to_record
from train.corpus.errors import DataError, ShardError
from train.corpus.files import sha256_bytes, to_json
from train.corpus.manifest import MANIFEST_FILE, TOKENIZER_DIRECTORY, Json, read_manifest
from train.corpus.packing import PackedRecord, decode_record
from train.corpus.shards import READER_OPTIONS
from train.corpus.tokenizers import Tokenizer, load_tokenizer
from train.corpus.verify import verify_once

_OPEN_SHARDS = 128
_READ_AHEAD_RECORDS = 64


class PreparedDataset:
    """One split of a prepared directory as a ``Dataset``.

    Args:
      directory: as written by ``python -m train.prepare``.
      split: which part; "heldout" is the corpus's "validation".
      context_length: tokens of a record. A divisor of the prepared length cuts stored records into equal
        windows, in which cut segments start anew; a multiple joins them, and what was cut is whole
        again. Both give what preparing with that length would. None keeps the prepared length.
      subset_ids: adds ``subset_ids`` int32 [t] to each record: 1 + index into ``subsets``, 0 on padding.
      verify: check the SHA-256 of every shard first (at once when nothing changed since the last time).

    Raises:
      ManifestError: if the directory is not prepared; the message says which command makes it.
      ShardError: naming a shard that is missing, damaged or swapped.
      DataError: for an unknown split, or a context length that neither divides nor is a multiple of the
        prepared one.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str = "train",
        *,
        context_length: int | None = None,
        subset_ids: bool = False,
        verify: bool = True,
    ) -> None:
        self.directory = Path(directory)
        self.manifest: Json = read_manifest(self.directory)
        self.split = self._split(split)
        self._shards = self._shards_of(self.split)
        stored = int(self.manifest["options"]["context_length"])
        self._context_length = stored if context_length is None else context_length
        short, long = sorted((stored, self._context_length))
        if short < 2 or long % short:
            raise DataError(
                f"context_length is {context_length}; {directory} was prepared for {stored}, so it must "
                f"divide or be a multiple of that; or prepare again with --context-length={context_length}"
            )
        self._stored = stored
        self._dtype = np.dtype(self.manifest["token_dtype"]).newbyteorder("<")
        if verify:
            verify_once(self.directory, [self.split])
        sizes = [-(-shard["packed_tokens"] // self._context_length) for shard in self._shards]
        self._ends = np.cumsum(sizes).tolist()
        self.subsets: list[str] = sorted({name for shard in self._shards for name in shard["subset_names"]})
        self._with_subsets = subset_ids
        self.manifest_sha256 = sha256_bytes((self.directory / MANIFEST_FILE).read_bytes())
        self._readers: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def _split(self, name: str) -> str:
        split = "validation" if name == "heldout" else name
        if split not in self.manifest["splits"]:
            known = ", ".join(sorted(self.manifest["splits"]))
            raise DataError(f"{self.directory} has no split {split!r} but {known}")
        return split

    def _shards_of(self, split: str) -> list[Json]:
        return self.manifest["splits"][split]["shards"]

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def fingerprint(self) -> str:
        return sha256_bytes(f"{self.manifest_sha256}/{self.split}/{self._context_length}".encode())

    @property
    def description(self) -> Json:
        """What the split holds and from what, in plain values: counts to read, hashes to compare.

        Long lists of files are a count and one hash over their names and hashes.
        """
        split = self.manifest["splits"][self.split]
        counts = ("documents", "tokens", "text_bytes")
        sources = [shard["source"] for shard in self._shards]
        return {
            "split": self.split,
            **{name: split[name] for name in counts},
            "subsets": {name: entry["tokens"] for name, entry in split["subsets"].items()},
            "options": self.manifest["options"],
            "source": self.manifest["source"],
            "source_files": _summary({source["name"]: source["sha256"] for source in sources}),
            "shards": _summary({shard["file"]: shard["sha256"] for shard in self._shards}),
            "tokenizer_sha256": self.tokenizer_sha256,
            "manifest_sha256": self.manifest_sha256,
        }

    @property
    def tokenizer_sha256(self) -> str:
        """Identity of the tokenizer: the hash over its files."""
        return self.manifest["tokenizer"]["sha256"]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer stored beside the data."""
        return load_tokenizer(self.directory / TOKENIZER_DIRECTORY)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        place = index - (self._ends[number - 1] if number else 0)
        return self._slice(self._shards[number], place * self._context_length)

    def _slice(self, shard: Json, begin: int) -> Record:
        """``context_length`` tokens of a shard's stream, from its token ``begin`` on."""
        size = self._context_length
        first = begin // self._stored
        packed = self._read(shard, first, min(-(-(begin + size) // self._stored), shard["records"]))
        tokens = np.concatenate([record.tokens for record in packed])
        segments = np.concatenate([record.segments for record in packed])
        number = np.repeat(np.arange(len(packed)), [len(record.segments) for record in packed])
        # A piece that opens a later record only goes on with the segment before it.
        fresh = (segments["offset"] == 0) | (segments["start"] > 0) | (number == 0)
        starts = (segments["start"] + number * self._stored)[fresh].astype(np.int64)
        subsets = segments["subset"][fresh]
        local = begin - first * self._stored
        end = min(local + size, (len(packed) - 1) * self._stored + packed[-1].length)
        low = np.searchsorted(starts, local, side="right") - 1
        high = np.searchsorted(starts, end)
        inside = np.zeros(size, np.int32)
        inside[: end - local] = tokens[local:end]
        record = segments_to_record(inside, np.maximum(starts[low:high] - local, 0), end - local)
        if self._with_subsets:
            names = np.array([self.subsets.index(name) + 1 for name in shard["subset_names"]])
            by_segment = np.concatenate([[0], names[subsets[low:high]]]).astype(np.int32)
            record["subset_ids"] = by_segment[record["segment_ids"]]
        return record

    def documents(self, split: str | None = None, *, min_tokens: int = 1) -> Iterator[Document]:
        """Whole documents of a split (default: this one) in stored order, put together from their records.

        Args:
          min_tokens: leave out shorter ones, marks included.

        Raises:
          DataError: for an unknown split.
          ShardError: naming a shard whose records do not fit together.
        """
        name = self.split if split is None else self._split(split)
        shards = self._shards_of(name)
        if name != self.split:
            verify_once(self.directory, [name])
        return (document for shard in shards for document in self._documents_of(shard, min_tokens))

    def _documents_of(self, shard: Json, min_tokens: int) -> Iterator[Document]:
        parts: list[np.ndarray] = []
        known = 0
        for packed in self._records_of(shard):
            ends = np.append(packed.segments["start"][1:], packed.length)
            for row, end in zip(packed.segments, ends, strict=True):
                if int(row["offset"]) != known:
                    raise ShardError(
                        f"{self.directory / shard['file']}: document {row['document']} has a gap"
                    )
                parts.append(packed.tokens[row["start"] : end])
                known += len(parts[-1])
                if known == int(row["size"]):
                    if known >= min_tokens:
                        tokens = np.concatenate(parts).astype(np.int32)
                        name = f"{shard['source']['name']}#{row['document']}"
                        subset = shard["subset_names"][row["subset"]]
                        yield Document(tokens, name, subset, int(row["text_bytes"]))
                    parts, known = [], 0
        if known:
            raise ShardError(f"{self.directory / shard['file']} ends inside a document")

    def _records_of(self, shard: Json) -> Iterator[PackedRecord]:
        for begin in range(0, shard["records"], _READ_AHEAD_RECORDS):
            yield from self._read(shard, begin, min(begin + _READ_AHEAD_RECORDS, shard["records"]))

    def _read(self, shard: Json, begin: int, end: int) -> list[PackedRecord]:
        path = self.directory / shard["file"]
        try:
            records = self._reader(str(path)).read(begin, end)
            return [decode_record(record, self._stored, self._dtype) for record in records]
        except (RuntimeError, ValueError, IndexError) as error:
            raise ShardError(f"{path}: records {begin} to {end - 1} cannot be read: {error}") from error

    def _reader(self, path: str) -> Any:
        """An open reader, from the last used ones: a corpus can have more shards than a process may open."""
        with self._lock:
            reader = self._readers.pop(path, None)
            if reader is None:
                reader = array_record_module.ArrayRecordReader(path, READER_OPTIONS)
            self._readers[path] = reader
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
        return reader

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_readers"], state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._readers, self._lock = collections.OrderedDict(), threading.Lock()


def _summary(hashes: dict[str, str]) -> Json:
    return {"count": len(hashes), "sha256": sha256_bytes(to_json(hashes))}
