"""Documents out of .jsonl, .jsonl.zst and .parquet files, one at a time, with every defect counted.

Memory is bounded by the longest allowed document, not by the file.
"""

import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from train.corpus.errors import SourceError
from train.corpus.sources import SourceFile, format_of

# Defects of one document.
DOCUMENT_DEFECTS = ("bad_json", "bad_meta", "bad_utf8", "empty_text", "missing_text", "oversized")
# Defects that lose an unknown number of documents.
FILE_DEFECTS = ("corrupt_parquet", "corrupt_zstd", "truncated_zstd")

_LINE_PER_TEXT = 8  # an escaped JSON line is at most about 6 times as long as its text
_READ = 1 << 18
_ZSTD_INPUT = 1 << 10  # 4 bytes can inflate to 128 KiB: fed in small pieces, memory stays bounded
_PARQUET_ROWS = 16
_PROBED = 16
_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_dictionary,
)


@dataclasses.dataclass(frozen=True)
class Fields:
    """Where text and subset name are, and what counts as too long.

    Attributes:
      text: name of the text field or column.
      subset: dotted name of the subset, ``meta.redpajama_set_name``; absent values give "".
      max_document_bytes: longest text accepted.
    """

    text: str = "text"
    subset: str = "meta.redpajama_set_name"
    max_document_bytes: int = 8 << 20


class Text(NamedTuple):
    """A good document."""

    text: str
    text_bytes: int
    subset: str


class Defect(NamedTuple):
    """A bad document or a damaged file; ``place`` is the line or row, from 1."""

    kind: str
    place: int


class _Truncated(Exception):
    pass


def read_documents(
    file: SourceFile, fields: Fields, on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[Text | Defect]:
    """Every document of a file in order, each as ``Text`` or ``Defect``.

    Args:
      on_bytes: hears how many bytes of the file were consumed.

    Raises:
      SourceError: if a parquet file has no such column.
    """
    if format_of(file.name) == ".parquet":
        yield from _read_parquet(file, fields, on_bytes)
    else:
        yield from _read_lines(file, fields, on_bytes)


def require_text(sources: Sequence[SourceFile], fields: Fields) -> None:
    """Looks at the first documents of one file of each format, so that a wrong field name shows at once.

    Raises:
      SourceError: if none of them has the text field.
    """
    for ending in sorted({str(format_of(source.name)) for source in sources}):
        first = next(source for source in sources if source.name.endswith(ending))
        results = list(itertools.islice(read_documents(first, fields), _PROBED))
        if results and all(
            isinstance(result, Defect) and result.kind == "missing_text" for result in results
        ):
            raise SourceError(f"{first.path} has no text in field {fields.text!r}; pass --text-field")


class _BlockStream(io.RawIOBase):
    """A raw stream over blocks; the base class makes it readable line by line."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest, self._at = b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._at == len(self._rest):
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest, self._at = block, 0
        count = min(len(buffer), len(self._rest) - self._at)
        buffer[:count] = memoryview(self._rest)[self._at : self._at + count]
        self._at += count
        return count


def _blocks(file: SourceFile, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    with file.path.open("rb", buffering=0) as stream:
        while block := stream.read(_READ):
            on_bytes(len(block))
            yield block


def _inflated(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompresses frame after frame; a file that ends inside a frame is an error, not an end."""
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    begun = False
    for block in blocks:
        for place in range(0, len(block), _ZSTD_INPUT):
            data = block[place : place + _ZSTD_INPUT]
            while data:
                yield frame.decompress(data)
                begun = True
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, begun = decompressor.decompressobj(), False
    if begun:
        raise _Truncated


def _read_lines(file: SourceFile, fields: Fields, on_bytes: Callable[[int], None]) -> Iterator[Text | Defect]:
    compressed = format_of(file.name) == ".jsonl.zst"
    blocks = _blocks(file, on_bytes)
    stream = io.BufferedReader(_BlockStream(_inflated(blocks) if compressed else blocks), _READ)
    limit = _LINE_PER_TEXT * fields.max_document_bytes + (1 << 16)
    number = 0
    try:
        while line := stream.readline(limit):
            number += 1
            if len(line) == limit and not line.endswith(b"\n"):
                while (rest := stream.readline(limit)) and not rest.endswith(b"\n"):
                    pass
                yield Defect("oversized", number)
            elif line.strip():
                yield _parse_line(line, number, fields)
    except _Truncated:
        yield Defect("truncated_zstd", number + 1)
    except zstandard.ZstdError:
        yield Defect("corrupt_zstd", number + 1)


def _parse_line(line: bytes, number: int, fields: Fields) -> Text | Defect:
    try:
        decoded = line.decode()
    except UnicodeDecodeError:
        return Defect("bad_utf8", number)
    try:
        entry = json.loads(decoded)
    except (ValueError, RecursionError):
        return Defect("bad_json", number)
    if not isinstance(entry, dict):
        return Defect("bad_json", number)
    text = entry.get(fields.text)
    if not isinstance(text, str):
        return Defect("missing_text", number)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # an escaped lone surrogate
        return Defect("bad_utf8", number)
    return _checked(text, size, _subset(entry, fields.subset.split(".")), number, fields)


def _checked(text: str, size: int, subset: str | None, number: int, fields: Fields) -> Text | Defect:
    if not text.strip():
        return Defect("empty_text", number)
    if size > fields.max_document_bytes:
        return Defect("oversized", number)
    if subset is None:
        return Defect("bad_meta", number)
    return Text(text, size, subset)


def _subset(entry: Any, path: list[str]) -> str | None:
    """The value at a dotted path, through structs and JSON strings; "" if absent, None if it is no string."""
    value = entry
    for name in path:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return None
        if value is None:
            return ""
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return "" if value is None else value if isinstance(value, str) else None


def _read_parquet(
    file: SourceFile, fields: Fields, on_bytes: Callable[[int], None]
) -> Iterator[Text | Defect]:
    number = 0
    head = fields.subset.split(".")[0]
    try:
        with pq.ParquetFile(file.path, buffer_size=1 << 18, pre_buffer=False) as parquet:
            names = parquet.schema_arrow.names
            if fields.text not in names:
                raise SourceError(
                    f"{file.path} has no column {fields.text!r} but {', '.join(names)}; pass --text-field"
                )
            kind = parquet.schema_arrow.field(fields.text).type
            if not any(check(kind) for check in _TEXT_TYPES):
                raise SourceError(f"{file.path}: column {fields.text!r} is {kind}; it must be text")
            rows = max(parquet.metadata.num_rows, 1)
            columns = [fields.text] + ([head] if head in names else [])
            for batch in parquet.iter_batches(_PARQUET_ROWS, columns=columns, use_threads=False):
                yield from _rows(batch, number, fields, head)
                number += batch.num_rows
                on_bytes(file.size * batch.num_rows // rows)
    except (pa.ArrowException, OSError):
        yield Defect("corrupt_parquet", number + 1)


def _rows(batch: pa.RecordBatch, before: int, fields: Fields, head: str) -> Iterator[Text | Defect]:
    # As bytes: one value that is not UTF-8 must not take its whole batch along.
    texts = _plain(batch.column(fields.text)).cast(pa.large_binary())
    metas = _plain(batch.column(head)) if head in batch.schema.names else None
    for row in range(batch.num_rows):
        number = before + row + 1
        data = texts[row].as_py()
        if data is None:
            yield Defect("missing_text", number)
            continue
        try:
            text = data.decode()
            entry = {} if metas is None else {head: metas[row].as_py()}
        except UnicodeDecodeError:
            yield Defect("bad_utf8", number)
            continue
        yield _checked(text, len(data), _subset(entry, fields.subset.split(".")), number, fields)


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
