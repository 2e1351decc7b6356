"""Held-out evaluation: windows hold every target once, bits per byte are a code length, by hand."""

import gzip
import lzma
import math

import numpy as np
import pytest

from train.corpus.dataset import Document
from train.errors import ConfigError
from train.evaluate import batched, bits_per_byte, check_heldout, compressor_bits_per_byte, windows
from train.inputs import RandomTokens


def document(*tokens: int, raw: bytes | None = None) -> Document:
    return Document(np.array(tokens, np.int32), "x", "", len(tokens) - 2, raw)


def targets(record) -> list[tuple[int, int]]:
    """(input, target) pairs that count: neighbours in the same segment, padding left out."""
    tokens, segments = record["tokens"], record["segment_ids"]
    same = (segments[1:] == segments[:-1]) & (segments[1:] != 0)
    return [(int(a), int(b)) for a, b in zip(tokens[:-1][same], tokens[1:][same], strict=True)]


def test_windows_by_hand() -> None:
    records = list(windows([document(1, 2, 3, 4, 5, 6), document(7, 8), document(9, 10, 11)], 4))
    assert [list(r["tokens"]) for r in records] == [[1, 2, 3, 4], [4, 5, 6, 0], [7, 8, 0, 0], [9, 10, 11, 0]]
    assert [list(r["segment_ids"]) for r in records] == [
        [1, 1, 1, 1],
        [1, 1, 1, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
    ]


def test_short_documents_share_a_record() -> None:
    (record,) = windows([document(1, 2), document(3, 4)], 5)
    assert list(record["tokens"]) == [1, 2, 3, 4, 0]
    assert list(record["segment_ids"]) == [1, 1, 2, 2, 0]
    assert list(record["positions"]) == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("length", [2, 3, 7, 16])
def test_every_token_but_the_first_is_a_target_once(length: int) -> None:
    documents = [
        document(*range(100 * i, 100 * i + size)) for i, size in enumerate([2, 3, 7, 16, 17, 31, 50], 1)
    ]
    found = [pair for record in windows(documents, length) for pair in targets(record)]
    assert sorted(found) == sorted((int(t), int(t) + 1) for d in documents for t in d.tokens[:-1])


def test_the_last_batch_is_padded() -> None:
    batches = list(batched(windows([document(1, 2, 3), document(4, 5, 6), document(7, 8, 9)], 3), 2))
    assert [b["tokens"].shape for b in batches] == [(2, 3), (2, 3)]
    assert not batches[1]["segment_ids"][1].any()


def test_bits_per_byte_of_a_uniform_code() -> None:
    def evaluate(params, batch):
        segments = np.asarray(batch["segment_ids"][0])
        count = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)).sum()
        return np.float32(count * math.log(256)), count

    import jax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), P())
    # 20 bytes and one end mark, each 8 bits.
    bits = bits_per_byte(evaluate, None, [document(*range(22))], 8, 3, sharding)
    assert bits == pytest.approx(8 * 21 / 20, rel=1e-6)


def test_compressors_are_the_real_ones() -> None:
    raw = [b"def f(x):\n    return x\n" * 20, b"import os\n" * 9]
    found = compressor_bits_per_byte([document(*range(9), raw=part) for part in raw])
    joined = b"".join(raw)
    assert gzip.decompress(gzip.compress(joined, 9)) == joined
    assert found["gzip_bits_per_byte"] == 8 * len(gzip.compress(joined, 9)) / len(joined)
    assert found["xz_bits_per_byte"] == 8 * len(lzma.compress(joined, preset=9)) / len(joined)


def test_too_few_heldout_records_are_refused() -> None:
    check_heldout(RandomTokens(8, 4, 0, records=6), 3, 2)
    with pytest.raises(ConfigError, match="= 8; it must be at most the 6 held-out records"):
        check_heldout(RandomTokens(8, 4, 0, records=6), 4, 2)
