"""Every kind of tokenizer: found, exact both ways, saved and loaded again, refused with a reason."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.corpora import entries, write_jsonl
from tests.train.pieces import sentencepiece_model
from train.corpus.errors import TokenizerError
from train.corpus.readers import Fields
from train.corpus.sources import SourceFile
from train.corpus.tokenizer_training import sample_texts, train_tokenizer
from train.corpus.tokenizers import (
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    describe_tokenizer,
    load_tokenizer,
    save_tokenizer,
)

TEXTS = [entry["text"] for entry in entries(200)]


@pytest.fixture(scope="module")
def model() -> bytes:
    return sentencepiece_model()


@pytest.fixture(scope="module")
def trained() -> JsonTokenizer:
    return train_tokenizer(300, iter(TEXTS))


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "tokenizers"])
def tokenizer(request: pytest.FixtureRequest, model: bytes, trained: JsonTokenizer) -> Tokenizer:
    return {
        "bytes": ByteTokenizer(),
        "sentencepiece": SentencePieceTokenizer(model, "model"),
        "tokenizers": trained,
    }[request.param]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(text=st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="▁\0"), max_size=40))
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    for threads in (1, 2):
        together = tokenizer.encode_batch([text, "a", text], threads)
        assert [list(one) for one in together] == [ids, tokenizer.encode("a"), ids]


def test_marks_are_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id is not None
    assert tokenizer.eos_id is not None
    ids = tokenizer.encode("memory")
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode("a <s> b </s> c"))
    assert tokenizer.decode_bytes([tokenizer.bos_id, *ids, tokenizer.eos_id]) == b"memory"
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "memory"


def test_bytes_of_a_cut_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a☃")
    whole = tokenizer.decode_bytes(ids)
    assert whole == "a☃".encode()
    cut = tokenizer.decode_bytes(ids[:-1])
    assert len(cut) < len(whole)
    assert whole.startswith(cut)


def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    for place in (tmp_path, tmp_path / "tokenizer"):
        again = load_tokenizer(place)
        assert describe_tokenizer(again) == describe_tokenizer(tokenizer)
        assert again.encode("hello memory") == tokenizer.encode("hello memory")


def test_files_are_told_apart_by_content(model: bytes, trained: JsonTokenizer, tmp_path: Path) -> None:
    (tmp_path / "any.model.v1").write_bytes(model)
    (tmp_path / "any.json").write_bytes(trained.files()["tokenizer.json"])
    assert load_tokenizer(tmp_path / "any.model.v1").kind == "sentencepiece"
    assert load_tokenizer(f"sentencepiece:{tmp_path}/any.model.v1").kind == "sentencepiece"
    assert load_tokenizer(tmp_path / "any.json").kind == "tokenizers"
    assert load_tokenizer(f"tokenizers:{tmp_path}/any.json").kind == "tokenizers"
    assert load_tokenizer("bytes").kind == "bytes"


def test_local_hugging_face_directory(trained: JsonTokenizer, model: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert load_tokenizer(tmp_path).kind == "sentencepiece"
    inner = tokenizers.Tokenizer.from_str(trained.files()["tokenizer.json"].decode())
    inner.add_special_tokens(["<begin>", "<end>"])
    (tmp_path / "tokenizer.json").write_text(inner.to_str())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<begin>", "eos_token": {"content": "<end>"}})
    )
    found = load_tokenizer(tmp_path)
    assert (found.kind, found.vocab_size, found.bos_id, found.eos_id) == ("tokenizers", 302, 300, 301)
    save_tokenizer(found, tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").bos_id == 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there"),
        (b"{}", "is not a tokenizers JSON file"),
        (b"noise", "is not a SentencePiece model"),
        (b"", "is not a SentencePiece model"),
    ],
)
def test_refused_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_refused_directories(tmp_path: Path, trained: JsonTokenizer) -> None:
    with pytest.raises(TokenizerError, match="has neither"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(trained.files()["tokenizer.json"])
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<absent>"}')
    with pytest.raises(TokenizerError, match="bos token '<absent>' is not in the vocabulary"):
        load_tokenizer(tmp_path)


def test_training_is_deterministic(trained: JsonTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained.vocab_size == 300
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert train_tokenizer(300, iter(TEXTS)).files() == trained.files()


def test_training_refuses_impossible_sizes() -> None:
    with pytest.raises(TokenizerError, match="must have at least 258"):
        train_tokenizer(257, iter(TEXTS))
    with pytest.raises(TokenizerError, match="the sample gives only"):
        train_tokenizer(5000, iter(["a b"]))


def test_the_sample_is_spread_over_training_files(tmp_path: Path) -> None:
    sources = []
    for number, split in enumerate(["train", "train", "validation"]):
        path = write_jsonl(tmp_path / f"{number}.jsonl", [{"text": f"{number}" * 10}] * 50)
        sources.append(SourceFile(split, path.name, path, path.stat().st_size))
    texts = list(sample_texts(sources, Fields(), 100))
    assert texts == ["0" * 10] * 5 + ["1" * 10] * 5
