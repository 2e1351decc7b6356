"""Records hold every token of every document once, and documents can be put together again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.corpus.packing import SEGMENT, Packer, decode_record, token_dtype

HEADER_BYTES = 8


def pack(documents: list[list[int]], context_length: int, dtype: np.dtype) -> list[bytes]:
    packer = Packer(context_length, dtype)
    records = [
        r for k, d in enumerate(documents) for r in packer.add(np.array(d, np.uint32), 10 * len(d), k % 3)
    ]
    records += packer.finish()
    assert packer.records == len(records)
    return records


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 60000), min_size=1, max_size=40), min_size=1, max_size=12),
    st.integers(2, 17),
    st.sampled_from([np.dtype("<u2"), np.dtype("<u4")]),
)
def test_documents_survive_packing(documents: list[list[int]], length: int, dtype: np.dtype) -> None:
    decoded = [decode_record(r, length, dtype) for r in pack(documents, length, dtype)]
    total = sum(map(len, documents))
    assert len(decoded) == -(-total // length)
    assert all(record.length == length for record in decoded[:-1])
    rebuilt: dict[int, list[int]] = {}
    for record in decoded:
        ends = [*record.segments["start"][1:], record.length]
        for row, end in zip(record.segments, ends, strict=True):
            pieces = rebuilt.setdefault(int(row["document"]), [])
            assert row["offset"] == len(pieces)
            assert row["size"] == len(documents[row["document"]])
            assert row["text_bytes"] == 10 * row["size"]
            assert row["subset"] == row["document"] % 3
            pieces += record.tokens[row["start"] : end].tolist()
        assert not record.tokens[record.length :].any()
    assert rebuilt == dict(enumerate(documents))


def test_a_record_by_hand() -> None:
    records = pack([[1, 2, 3], [4, 5, 6]], 4, np.dtype("<u2"))
    first, second = (decode_record(r, 4, np.dtype("<u2")) for r in records)
    assert first.tokens.tolist() == [1, 2, 3, 4]
    assert first.segments[["start", "document", "offset", "size"]].tolist() == [(0, 0, 0, 3), (3, 1, 0, 3)]
    assert second.tokens.tolist() == [5, 6, 0, 0]
    assert second.length == 2
    assert second.segments[["start", "document", "offset", "size"]].tolist() == [(0, 1, 1, 3)]
    assert len(records[0]) == HEADER_BYTES + 2 * SEGMENT.itemsize + 4 * 2


@pytest.mark.parametrize(
    "change", [lambda r: r[:-1], lambda r: r + b"x", lambda r: b"", lambda r: b"\xff" * len(r)]
)
def test_a_record_of_wrong_size_is_refused(change) -> None:
    record = pack([[1, 2, 3]], 4, np.dtype("<u2"))[0]
    with pytest.raises(ValueError, match="a record of"):
        decode_record(change(record), 4, np.dtype("<u2"))


def test_token_dtype_holds_the_vocabulary() -> None:
    assert token_dtype(1 << 16) == np.uint16
    assert token_dtype((1 << 16) + 1) == np.uint32
