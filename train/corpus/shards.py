"""One input file to one shard."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from train.corpus.errors import ShardError, SourceError
from train.corpus.files import is_temporary, publish, sha256_file, temporary_path, to_json, write_atomically
from train.corpus.packing import Packer, token_dtype
from train.corpus.plan import Options, ShardJob
from train.corpus.readers import Text, read_documents
from train.corpus.tokenizers import TokenIds, Tokenizer

# One record a group: a random read touches one record. Tokens hardly compress, reading speed counts.
WRITER_OPTIONS = "group_size:1,uncompressed"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BATCH_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Progress:
    """What was done since the last report."""

    source_bytes: int = 0
    text_bytes: int = 0
    documents: int = 0
    defects: int = 0


@dataclasses.dataclass
class _Tally:
    """Counts of one shard."""

    documents: int = 0
    tokens: int = 0
    packed_tokens: int = 0
    text_bytes: int = 0
    left_out: int = 0
    subsets: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    defects: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    def subset_index(self, name: str) -> int:
        self.subsets.setdefault(name, {"documents": 0, "tokens": 0, "text_bytes": 0})
        return list(self.subsets).index(name)

    def add(self, text: Text, tokens: int, packed: int) -> None:
        entry = self.subsets[text.subset]
        for counts in (entry, self.__dict__):
            counts["documents"] += 1
            counts["tokens"] += tokens
            counts["text_bytes"] += text.text_bytes
        self.packed_tokens += packed

    def add_defect(self, kind: str, place: int) -> None:
        self.defects.setdefault(kind, {"count": 0, "first": place})["count"] += 1


def make_shard(
    directory: Path,
    job: ShardJob,
    options: Options,
    tokenizer: Tokenizer,
    *,
    threads: int = 1,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Reads, tokenizes, packs and writes one shard; returns its receipt, which is also left on disk.

    The shard gets its name only when it is complete and durable; its receipt comes after it. Memory is
    bounded by the longest document and by about 1 MiB of text.
    """
    target = directory / job.file
    for left in directory.iterdir():
        if is_temporary(left, target.name):
            left.unlink()
    before = _identity(job.source.path)
    source_sha256 = sha256_file(job.source.path)
    temporary = temporary_path(target)
    packer = Packer(options.context_length, token_dtype(tokenizer.vocab_size))
    tally = _Tally()
    try:
        _write(temporary, _records(job, options, tokenizer, tally, packer, threads, report))
        if _identity(job.source.path) != before:
            raise SourceError(f"{job.source.path} changed while it was read; start again")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    receipt = {
        "split": job.source.split,
        "file": job.file,
        "bytes": temporary.stat().st_size,
        "sha256": sha256_file(temporary),
        "records": packer.records,
        "source": {"name": job.source.name, "bytes": job.source.size, "sha256": source_sha256},
        "subset_names": list(tally.subsets),
        **dataclasses.asdict(tally),
    }
    publish(temporary, target)
    write_atomically(directory / job.receipt, to_json(receipt))
    return receipt


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _write(path: Path, records: Iterator[bytes]) -> None:
    """Writes an ArrayRecord file.

    Raises:
      ShardError: if it cannot be written whole (a full disk).
    """
    writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
    written = 0
    try:
        for record in records:
            _say_where(path, writer.write, record)
            written += 1
    except BaseException:
        if writer.ok():
            with contextlib.suppress(RuntimeError):
                writer.close()
        raise
    if writer.ok():
        _say_where(path, writer.close)
    reader = array_record_module.ArrayRecordReader(str(path), READER_OPTIONS)
    found = reader.num_records() if reader.ok() else 0
    reader.close()
    if found != written:
        raise ShardError(f"{path} holds {found} of {written} records written")


def _say_where(path: Path, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a writer's function; its untyped errors (a full disk) become ``ShardError``."""
    try:
        function(*arguments)
    except RuntimeError as error:
        raise ShardError(f"{path.parent} cannot be written; finished shards are kept: {error}") from error


def _records(
    job: ShardJob,
    options: Options,
    tokenizer: Tokenizer,
    tally: _Tally,
    packer: Packer,
    threads: int,
    report: Callable[[Progress], None],
) -> Iterator[bytes]:
    """The records of a shard; counts go to ``tally``."""
    for text, ids in _tokenized(job, options, tokenizer, tally, threads, report):
        tokens = _marked(ids, tokenizer)
        if len(tokens) == 0:
            tally.add_defect("no_tokens", tally.documents + 1)
            continue
        subset = tally.subset_index(text.subset)
        tally.add(text, len(ids), len(tokens))
        yield from packer.add(tokens, text.text_bytes, subset)
    yield from packer.finish()


def _tokenized(
    job: ShardJob,
    options: Options,
    tokenizer: Tokenizer,
    tally: _Tally,
    threads: int,
    report: Callable[[Progress], None],
) -> Iterator[tuple[Text, TokenIds]]:
    """Good documents with their token ids, tokenized about a mebibyte at a time."""
    batch: list[Text] = []
    size = consumed = defects = 0

    def on_bytes(count: int) -> None:
        nonlocal consumed
        consumed += count

    def encoded() -> Iterator[tuple[Text, TokenIds]]:
        nonlocal batch, size, consumed, defects
        ids = tokenizer.encode_batch([text.text for text in batch], threads)
        report(Progress(consumed, size, len(batch), defects))
        pairs = zip(batch, ids, strict=True)
        batch, size, consumed, defects = [], 0, 0, 0
        return pairs

    for result in read_documents(job.source, options.fields, on_bytes):
        if not isinstance(result, Text):
            tally.add_defect(result.kind, result.place)
            defects += 1
        elif options.subsets and result.subset not in options.subsets:
            tally.left_out += 1
        else:
            if size and size + result.text_bytes > _BATCH_BYTES * threads:
                yield from encoded()
            batch.append(result)
            size += result.text_bytes
    yield from encoded()


def _marked(ids: TokenIds, tokenizer: Tokenizer) -> np.ndarray:
    """The ids between the tokenizer's begin and end marks, as uint32."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return np.concatenate([np.asarray(part, np.uint32) for part in (begin, ids, end)])
