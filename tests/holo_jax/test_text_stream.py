"""Streamed text is the whole text, however tokens cut characters."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holo_jax.text_stream import TextStream
from holo_jax.tokenizers import ByteTokenizer, Tokenizer
from train.corpus.tokenizer_training import train_tokenizer

TEXTS = ["the memory of a memory ", "déjà vu ☃ ", "x = 1\n    y = 2\n"] * 20


class Wordish:
    """A vocabulary of characters that shows an unfinished one as U+FFFD, as decoders of text do."""

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(i for i in ids if i < 256).decode(errors="replace").encode()


@pytest.fixture(scope="module", params=["bytes", "tokenizers", "wordish"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made = {
        "bytes": ByteTokenizer,
        "wordish": Wordish,
        "tokenizers": lambda: train_tokenizer(280, iter(TEXTS)),
    }
    return made[request.param]()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(text=st.text(max_size=60), before=st.text(max_size=5), sizes=st.lists(st.integers(0, 5), min_size=1))
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str, before: str, sizes: list[int]) -> None:
    encode = getattr(tokenizer, "encode", ByteTokenizer().encode)
    ids, context = encode(text), encode(before)
    stream = TextStream(tokenizer, context)
    pieces, start = [], 0
    while start < len(ids):
        size = max(1, sizes[len(pieces) % len(sizes)])
        pieces.append(stream.push(ids[start : start + size]))
        start += size
    assert "".join(pieces) + stream.close() == text


def test_a_character_waits_until_it_is_whole() -> None:
    stream = TextStream(ByteTokenizer())
    first, second, third = "☃".encode()
    assert [stream.push([first]), stream.push([second]), stream.push([third])] == ["", "", "☃"]
    assert stream.push([first]) == "" and stream.close() == "\ufffd"
    stream = TextStream(ByteTokenizer())
    assert stream.push([0xFF, 65]) == "\ufffdA"


def test_long_streams_stay_exact() -> None:
    text = "spaß ☃ " * 200
    stream = TextStream(ByteTokenizer())
    assert "".join(stream.push([i]) for i in text.encode()) + stream.close() == text
