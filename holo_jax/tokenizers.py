"""Tokenizers behind one small interface: bytes, SentencePiece models, ``tokenizers`` JSON files.

Their libraries are imported when one is made; ``pip install holo-jax[train]`` brings both.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from holo_jax.optional import require

TokenIds = Sequence[int] | np.ndarray
_MAX_BYTES = 1 << 27
MARKS_FILE = "marks.json"
_BOS_NAMES = ("<s>", "<|bos|>", "<bos>", "<|begin_of_text|>", "[BOS]")
_EOS_NAMES = ("</s>", "<|eos|>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]")


class TokenizerError(ValueError):
    """A tokenizer that cannot be found or read. The message names the path and what is wrong with it."""


class Tokenizer(Protocol):
    """Text to token ids and back.

    ``encode`` adds no begin or end mark and reads names of special tokens in the text as plain text.
    ``bos_id`` and ``eos_id`` are None where there is no such mark. ``decode_bytes`` gives the bytes
    exactly, also when a sequence ends inside a character; ``decode`` shows those as U+FFFD. Marks are
    left out of both.
    """

    @property
    def kind(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> Sequence[TokenIds]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...

    def files(self) -> dict[str, bytes]: ...


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255, then ``bos`` 256 and ``eos`` 257."""

    kind = "bytes"
    vocab_size = 258
    bos_id = 256
    eos_id = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> Sequence[TokenIds]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(int(i) for i in ids if int(i) < 256)

    def files(self) -> dict[str, bytes]:
        return {}


class SentencePieceTokenizer:
    """A SentencePiece model (``.model``)."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str) -> None:
        if not model:
            raise TokenizerError(f"{name} is not a SentencePiece model: it is empty")
        sentencepiece = require("sentencepiece", "train")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise TokenizerError(f"{name} is not a SentencePiece model: {str(error).strip()}") from error
        self._model = model
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id = _or_none(self._processor.bos_id())
        self.eos_id = _or_none(self._processor.eos_id())
        first = self._processor.encode("a")[0]
        self._adds_space = self._processor.id_to_piece(first).startswith("▁")

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> Sequence[TokenIds]:
        if threads == 1:  # the library's batch call starts a thread, whose memory is kept apart and grows
            return [self._processor.encode(text) for text in texts]
        return self._processor.encode(list(texts), num_threads=threads)

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of the pieces, without the space that the model puts before a text."""
        parts = []
        for i in map(int, ids):
            piece = self._processor.id_to_piece(i)
            if self._processor.is_byte(i):
                parts.append(bytes([int(piece[3:5], 16)]))
            elif self._processor.is_unknown(i):
                parts.append("\ufffd".encode())
            elif not self._processor.is_control(i):
                parts.append(piece.replace("▁", " ").encode())
        data = b"".join(parts)
        return data[1:] if self._adds_space and data.startswith(b" ") else data

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model}


class JsonTokenizer:
    """A ``tokenizers`` JSON file. Its threads are set per process by ``RAYON_NUM_THREADS``."""

    kind = "tokenizers"

    def __init__(self, data: bytes, name: str, bos: str | None = None, eos: str | None = None) -> None:
        tokenizers = require("tokenizers", "train")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{name} is not a tokenizers JSON file: {error}") from error
        self._data = data
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # A document that quotes "</s>" must not get an end mark in the middle.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise TokenizerError(f"{name} is not a tokenizers JSON file: its vocabulary is empty")
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id = _mark(vocabulary, bos, _BOS_NAMES, name, "bos")
        self.eos_id = _mark(vocabulary, eos, _EOS_NAMES, name, "eos")
        self._byte_of = _byte_level_alphabet() if _is_byte_level(json.loads(data)) else None
        self._special = {
            i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> Sequence[TokenIds]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes, exact for byte-level vocabularies; otherwise ``decode`` as UTF-8."""
        if self._byte_of is None:
            return self.decode(ids).encode()
        parts = []
        for i in map(int, ids):
            token = self._tokenizer.id_to_token(i)
            if token is not None and i not in self._special:
                known = all(character in self._byte_of for character in token)
                parts.append(bytes(self._byte_of[c] for c in token) if known else token.encode())
        return b"".join(parts)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._data}

    def token(self, identifier: int) -> str | None:
        """The vocabulary's own spelling of an id."""
        return self._tokenizer.id_to_token(identifier)


def _or_none(identifier: int) -> int | None:
    return identifier if identifier >= 0 else None


def _mark(
    vocabulary: dict[str, int], wanted: str | None, usual: Sequence[str], name: str, field: str
) -> int | None:
    if wanted is not None:
        if not isinstance(wanted, str) or wanted not in vocabulary:
            raise TokenizerError(f"{name}: the {field} token {wanted!r} is not in the vocabulary")
        return vocabulary[wanted]
    return next((vocabulary[token] for token in usual if token in vocabulary), None)


def _is_byte_level(description: dict[str, Any]) -> bool:
    decoder = description.get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _byte_level_alphabet() -> dict[str, int]:
    """Character to byte: printable Latin-1 stands for itself, the other bytes for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """A tokenizer from ``bytes``, a file, or a directory.

    Args:
      spec: ``bytes``; a SentencePiece model or ``tokenizers`` JSON file (told apart by content, or
        named by ``sentencepiece:PATH``, ``tokenizers:PATH``); a directory with ``tokenizer.json`` or
        ``tokenizer.model``, such as a local Hugging Face model; or a prepared data directory.

    Raises:
      TokenizerError: naming the path and what is wrong with it.
    """
    text = str(spec)
    if text == "bytes":
        return ByteTokenizer()
    kind, separator, rest = text.partition(":")
    explicit = kind if separator and kind in ("sentencepiece", "tokenizers") else None
    path = Path(rest if explicit else text)
    if path.is_dir():
        return _load_directory(path)
    if not path.is_file():
        raise TokenizerError(
            f"tokenizer {text!r} is not there; give a file, a directory with tokenizer.json or "
            "tokenizer.model, or 'bytes'"
        )
    data = _read_bytes(path)
    if explicit == "tokenizers" or (explicit is None and data.lstrip()[:1] == b"{"):
        return JsonTokenizer(data, str(path))
    return SentencePieceTokenizer(data, str(path))


def _load_directory(path: Path) -> Tokenizer:
    if (path / "tokenizer").is_dir() and not (path / "tokenizer.json").is_file():
        path = path / "tokenizer"
    if (path / MARKS_FILE).is_file():
        marks = _read_object(path / MARKS_FILE)
        if marks.get("kind") == "bytes":
            return ByteTokenizer()
        names = (marks.get("bos"), marks.get("eos"))
    else:
        config = (
            _read_object(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
        )
        names = (_token_text(config.get("bos_token")), _token_text(config.get("eos_token")))
    if (path / "tokenizer.json").is_file():
        file = path / "tokenizer.json"
        return JsonTokenizer(_read_bytes(file), str(file), *names)
    if (path / "tokenizer.model").is_file():
        file = path / "tokenizer.model"
        return SentencePieceTokenizer(_read_bytes(file), str(file))
    raise TokenizerError(f"{path} has neither tokenizer.json nor tokenizer.model")


def _read_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise TokenizerError(f"{path} is no tokenizer: it is larger than {_MAX_BYTES} bytes")
    return data


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} is not a JSON object")
    return value


def _token_text(value: Any) -> str | None:
    """A token of tokenizer_config.json: a string, or an object that has it as ``content``."""
    return value.get("content") if isinstance(value, dict) else value
