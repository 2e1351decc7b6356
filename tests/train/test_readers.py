"""Every document of every format is read, and every defect is counted by kind and place."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.train.corpora import Entry, entries, lines, write_jsonl, write_parquet, write_zst
from train.corpus.errors import SourceError
from train.corpus.readers import Defect, Fields, Text, read_documents, require_text
from train.corpus.sources import SourceFile

FIELDS = Fields(max_document_bytes=4096)


def source(path: Path) -> SourceFile:
    return SourceFile("train", path.name, path, path.stat().st_size)


def read(path: Path, fields: Fields = FIELDS) -> list[Text | Defect]:
    return list(read_documents(source(path), fields))


def expected(documents: list[Entry]) -> list[Text]:
    return [Text(d["text"], len(d["text"].encode()), d["meta"]["redpajama_set_name"]) for d in documents]


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    documents = entries(40)
    frames = b"".join(zstandard.compress(lines(documents[k : k + 9])) for k in range(0, 40, 9))
    (tmp_path / "frames.jsonl.zst").write_bytes(frames)
    paths = [
        write_jsonl(tmp_path / "a.jsonl", documents),
        write_zst(tmp_path / "a.jsonl.zst", documents),
        tmp_path / "frames.jsonl.zst",
        write_parquet(tmp_path / "struct.parquet", documents),
        write_parquet(tmp_path / "string.parquet", documents, json_meta=True),
    ]
    for path in paths:
        assert read(path) == expected(documents), path.name
        consumed = []
        list(read_documents(source(path), FIELDS, consumed.append))
        assert 0.9 * path.stat().st_size <= sum(consumed) <= path.stat().st_size


def test_line_defects(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "good", "meta": {"redpajama_set_name": "A"}}\n'
        b'{"text": "cut o\n'
        b'["text"]\n'
        b'{"text": "\xff"}\n'
        b'{"text": "\\ud800"}\n'
        b'{"text": 3}\n'
        b'{"txt": "x"}\n'
        b'{"text": " \\n"}\n'
        b'{"text": "x", "meta": "{"}\n'
        b'{"text": "x", "meta": {"redpajama_set_name": 4}}\n'
        b'{"text": "' + b"x" * 4097 + b'"}\n'
        b'{"text": "' + b"x" * 200_000 + b'"}\n'
        b"\n"
        b'{"text": "x", "meta": null}\n'
        b'{"text": "last, without newline"}'
    )
    assert read(path) == [
        Text("good", 4, "A"),
        Defect("bad_json", 2),
        Defect("bad_json", 3),
        Defect("bad_utf8", 4),
        Defect("bad_utf8", 5),
        Defect("missing_text", 6),
        Defect("missing_text", 7),
        Defect("empty_text", 8),
        Defect("bad_meta", 9),
        Defect("bad_meta", 10),
        Defect("oversized", 11),
        Defect("oversized", 12),
        Text("x", 1, ""),
        Text("last, without newline", 21, ""),
    ]


def test_truncated_zstd_keeps_what_came_before(tmp_path: Path) -> None:
    documents = entries(3000)
    path = write_zst(tmp_path / "a.jsonl.zst", documents)
    path.write_bytes(path.read_bytes()[:-20])
    *good, last = read(path)
    assert isinstance(last, Defect)
    assert last == Defect("truncated_zstd", len(good) + 1)
    assert good == expected(documents)[: len(good)]


def test_corrupt_zstd(tmp_path: Path) -> None:
    path = write_zst(tmp_path / "a.jsonl.zst", entries(20))
    path.write_bytes(b"not zstd" + path.read_bytes())
    assert read(path) == [Defect("corrupt_zstd", 1)]


def test_parquet_defects(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.array([b"good", None, b"\xff\xfe", b"", b"x" * 5000, b"end"], pa.binary())
    pq.write_table(pa.table({"text": texts.cast(pa.large_binary())}), path)
    assert read(path) == [
        Text("good", 4, ""),
        Defect("missing_text", 2),
        Defect("bad_utf8", 3),
        Defect("empty_text", 4),
        Defect("oversized", 5),
        Text("end", 3, ""),
    ]
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    assert read(path) == [Defect("corrupt_parquet", 1)]


def test_dictionary_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()}), path)
    assert read(path) == [Text("a", 1, ""), Text("b", 1, ""), Text("a", 1, "")]


def test_wrong_fields_are_refused_at_once(tmp_path: Path) -> None:
    lined = write_jsonl(tmp_path / "a.jsonl", entries(30))
    columned = write_parquet(tmp_path / "a.parquet", entries(30))
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "number.parquet")
    require_text([source(lined), source(columned)], FIELDS)
    with pytest.raises(SourceError, match=r"no text in field 'content'; pass --text-field"):
        require_text([source(lined)], Fields(text="content"))
    with pytest.raises(SourceError, match=r"no column 'content' but text, meta; pass --text-field"):
        require_text([source(columned)], Fields(text="content"))
    with pytest.raises(SourceError, match="column 'text' is int64; it must be text"):
        read(tmp_path / "number.parquet")


def test_other_fields(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "from": "web"}])
    assert read(path, Fields(text="body", subset="from")) == [Text("x", 1, "web")]
