"""Tokenizers behind one small interface."""

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back.

    ``encode`` adds no begin or end mark; ``bos_id`` and ``eos_id`` are None when there is none.
    ``decode_bytes`` is exact for byte-level tokenizers; for SentencePiece it is what the model's
    own decoder gives, encoded as UTF-8.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255, then ``bos`` 256 and ``eos`` 257."""

    vocab_size = 258
    bos_id: int | None = 256
    eos_id: int | None = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes; a sequence that is not UTF-8 shows as U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes; begin and end marks are left out."""
        return bytes(int(i) for i in ids if int(i) < 256)
