"""Tokenizers as data: loading for the pipeline, saving, and what a manifest records of them."""

import importlib.metadata
from pathlib import Path
from typing import Any

from holo_jax import tokenizers
from holo_jax.tokenizers import (
    MARKS_FILE,
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    TokenIds,
    Tokenizer,
)
from train.corpus.errors import TokenizerError
from train.corpus.files import sha256_bytes, to_json, write_atomically

__all__ = [
    "MARKS_FILE",
    "ByteTokenizer",
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "TokenIds",
    "Tokenizer",
    "describe_tokenizer",
    "load_tokenizer",
    "save_tokenizer",
    "saved_files",
]


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """``holo_jax.tokenizers.load_tokenizer``, whose errors are the data pipeline's.

    Raises:
      TokenizerError: naming the path and what is wrong with it.
    """
    try:
        return tokenizers.load_tokenizer(spec)
    except tokenizers.TokenizerError as error:
        raise TokenizerError(str(error)) from error


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes the tokenizer's files to ``directory``, from which ``load_tokenizer`` gives it back."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in saved_files(tokenizer).items():
        write_atomically(directory / name, data)


def saved_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """File name to content of everything ``save_tokenizer`` writes."""
    marks: dict[str, Any] = {"kind": tokenizer.kind}
    if isinstance(tokenizer, JsonTokenizer):
        for field, identifier in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
            marks[field] = None if identifier is None else tokenizer.token(identifier)
    return tokenizer.files() | {MARKS_FILE: to_json(marks)}


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the manifest records: kind, library, sizes, marks and the SHA-256 of every file."""
    package = {"sentencepiece": "sentencepiece", "tokenizers": "tokenizers"}.get(tokenizer.kind)
    files = {name: sha256_bytes(data) for name, data in saved_files(tokenizer).items()}
    return {
        "kind": tokenizer.kind,
        "library": f"{package} {importlib.metadata.version(package)}" if package else "",
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "files": files,
        "sha256": sha256_bytes(to_json(files)),
    }
