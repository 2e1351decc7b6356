"""Tiny corpora in every source format, for the tests of preparing and loading data."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

Entry = dict[str, Any]
SUBSETS = ("RedPajamaBook", "RedPajamaC4")
_WORDS = ["holographic", "memory", "binds", "a", "value", "to", "its", "key", "é", "ü", "漢字", "🙂\n"]


def entries(count: int, seed: int = 0, longest: int = 60) -> list[Entry]:
    """Documents of random words with a subset each."""
    source = random.Random(seed)
    return [
        {
            "text": " ".join(source.choices(_WORDS, k=source.randint(1, longest))),
            "meta": {"redpajama_set_name": source.choice(SUBSETS)},
        }
        for _ in range(count)
    ]


def lines(documents: Sequence[Any]) -> bytes:
    return "".join(json.dumps(document) + "\n" for document in documents).encode()


def write_jsonl(path: Path, documents: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lines(documents))
    return path


def write_zst(path: Path, documents: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress(lines(documents)))
    return path


def write_parquet(path: Path, documents: Sequence[Entry], *, json_meta: bool = False, rows: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    metas = [json.dumps(d["meta"]) if json_meta else d["meta"] for d in documents]
    table = pa.table({"text": [d["text"] for d in documents], "meta": metas})
    pq.write_table(table, path, row_group_size=rows)
    return path


def slimpajama(root: Path, shards: int = 3, count: int = 12) -> Path:
    """A directory in the layout of SlimPajama-627B."""
    for number in range(shards):
        write_zst(root / "train" / "chunk1" / f"example_train_{number}.jsonl.zst", entries(count, number))
    write_zst(root / "validation" / "chunk1" / "example_holdout_0.jsonl.zst", entries(count, 100))
    return root
