"""The default corpus, which needs no download: the source files of the running Python's standard library.

Bytes are the tokens, so no tokenizer is needed and losses convert to bits per byte exactly.
"""

import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train.corpus.dataset import Document, Record, segments_to_record
from train.corpus.errors import DataError
from train.corpus.tokenizers import ByteTokenizer, describe_tokenizer

SPLITS = ("train", "heldout")
_HELDOUT_PERCENT = 5
_THIRD_PARTY = {"site-packages", "dist-packages"}


def split_of(relative: str) -> str:
    """The split of a file: held out for 5% of the SHA-256 values of its relative path."""
    value = int.from_bytes(hashlib.sha256(relative.encode()).digest()[:8], "big")
    return "heldout" if value % 100 < _HELDOUT_PERCENT else "train"


@functools.lru_cache(maxsize=4)
def _read(root: Path) -> tuple[tuple[str, bytes], ...]:
    """(relative path, bytes) of all non-empty .py files under ``root``, by path, without third-party code."""
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _THIRD_PARTY.isdisjoint(relative.parts) and path.is_file():
            files.append((relative.as_posix(), path))
    content = ((name, path.read_bytes()) for name, path in sorted(files))
    return tuple((name, data) for name, data in content if data)


class PythonSource:
    """Standard library source files as a ``Dataset``: files in path order, end to end, cut into records.

    Every file is ``bos``, its bytes, ``eos``. No token is dropped or repeated; only the last record
    is padded. A file cut by a record border goes on in the next record as a new segment.
    """

    def __init__(self, root: Path, split: str, context_length: int) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; python_source has {', '.join(SPLITS)}")
        if context_length < 2:
            raise ValueError(f"context_length is {context_length}; it must be at least 2")
        self.root, self.split = root, split
        self._context_length = context_length
        self.tokenizer = ByteTokenizer()
        digest = hashlib.sha256(f"python_source/1/{split}/{context_length}".encode())
        pieces, sizes = [], []
        for document in self.documents():
            digest.update(f"\0{document.name}\0{document.text_bytes}\0".encode() + (document.raw or b""))
            pieces.append(document.tokens.astype(np.uint16))
            sizes.append(len(document.tokens))
        if not pieces:
            raise DataError(f"no .py file of split {split!r} under {root}")
        self._tokens = np.concatenate(pieces)
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._fingerprint = digest.hexdigest()

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def tokenizer_sha256(self) -> str:
        return describe_tokenizer(self.tokenizer)["sha256"]

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def __len__(self) -> int:
        return -(-len(self._tokens) // self._context_length)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        begin = index * self._context_length
        piece = self._tokens[begin : begin + self._context_length]
        tokens = np.zeros(self._context_length, np.int32)
        tokens[: len(piece)] = piece
        first, last = np.searchsorted(self._starts, [begin + 1, begin + len(piece)])
        starts = np.concatenate([[0], self._starts[first:last] - begin]).astype(np.int64)
        return segments_to_record(tokens, starts, len(piece))

    def documents(self, split: str | None = None, *, min_tokens: int = 1) -> Iterator[Document]:
        """Whole files of a split (default: this one) with their bytes, by path."""
        wanted = self.split if split is None else split
        if wanted not in SPLITS:
            raise ValueError(f"split is {split!r}; python_source has {', '.join(SPLITS)}")
        for name, raw in _read(self.root):
            if split_of(name) == wanted and len(raw) + 2 >= min_tokens:
                ids = np.empty(len(raw) + 2, np.int32)
                ids[0], ids[-1] = self.tokenizer.bos_id, self.tokenizer.eos_id
                ids[1:-1] = np.frombuffer(raw, np.uint8)
                yield Document(ids, name, "", len(raw), raw)


def python_source(
    context_length: int, split: str = "train", *, root: str | Path | None = None
) -> PythonSource:
    """Packed bytes of the standard library of the running Python (about 30 MB), or of ``root``.

    Args:
      context_length: tokens in a record.
      split: "train", or "heldout" (5% of the files, chosen by the hash of their path).
      root: another directory of .py files, for tests.

    Raises:
      ValueError: for an unknown split or a context length under 2.
      DataError: if there are no such files.
    """
    directory = Path(root) if root is not None else Path(sysconfig.get_paths()["stdlib"])
    return PythonSource(directory, split, context_length)
