"""Which files a corpus has, which split each belongs to, and in which order."""

import dataclasses
import glob
import re
from collections.abc import Sequence
from pathlib import Path

from train.corpus.errors import SourceError

FORMATS = (".jsonl.zst", ".jsonl", ".parquet")
_SPLIT_OF_WORD = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_NAME = re.compile(r"[A-Za-z0-9_]+")


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One input file.

    Attributes:
      split: "train", "validation", "test" or a name given by the user.
      name: path relative to the source, with "/"; the same wherever the corpus lies.
      path: where it lies here.
      size: bytes.
    """

    split: str
    name: str
    path: Path
    size: int


def format_of(name: str) -> str | None:
    """The ending of ``name`` if it is one that can be read, else None."""
    return next((ending for ending in FORMATS if name.endswith(ending)), None)


def split_of(name: str) -> str | None:
    """The split that a relative path tells: by a directory, else by a word of the file name."""
    *directories, file = name.split("/")
    for word in [*directories, *re.split(r"[-_.]", file)]:
        if word.lower() in _SPLIT_OF_WORD:
            return _SPLIT_OF_WORD[word.lower()]
    return None


def find_sources(source: str, *, split: str | None = None, splits: Sequence[str] = ()) -> list[SourceFile]:
    """All files of a local source, ordered by split and name.

    Args:
      source: a directory (searched whole), a glob, or one file.
      split: the split of every file, where paths do not tell it.
      splits: keep only these; empty keeps all.

    Raises:
      SourceError: if nothing is found, a file's split is unknown, or a wanted split has no file.
    """
    if split is not None and not _NAME.fullmatch(split):
        raise SourceError(f"--split={split!r} must be a word of letters, digits and _")
    root, paths = _list(source)
    files = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        found = split or split_of(name)
        if found is None:
            raise SourceError(
                f"cannot tell the split of {path}: no part of {name!r} is train, validation or test; "
                "pass --split=NAME"
            )
        files.append(SourceFile(found, name, path, path.stat().st_size))
    present = sorted({file.split for file in files})
    for wanted in splits:
        if wanted not in present:
            raise SourceError(f"--splits asks for {wanted!r}, but {source} has {', '.join(present)}")
    kept = [file for file in files if not splits or file.split in splits]
    return sorted(kept, key=lambda file: (file.split, file.name))


def _list(source: str) -> tuple[Path, list[Path]]:
    """The root that names are relative to, and the readable files under ``source``."""
    path = Path(source).expanduser()
    if path.is_dir():
        root, candidates = path, list(path.rglob("*"))
    elif path.is_file():
        root, candidates = path.parent, [path]
    elif glob.has_magic(source):
        candidates = [Path(match) for match in {*glob.glob(str(path), recursive=True)}]
        fixed = []
        for part in path.parts[:-1]:
            if glob.has_magic(part):
                break
            fixed.append(part)
        root = Path(*fixed)
    else:
        raise SourceError(_missing(source))
    hidden = lambda match: any(part.startswith(".") for part in match.relative_to(root).parts)  # noqa: E731
    paths = [match for match in candidates if match.is_file() and format_of(match.name) and not hidden(match)]
    if not paths:
        raise SourceError(f"{source} has no {', '.join(FORMATS)} file")
    return root, paths


def _missing(source: str) -> str:
    message = f"source {source!r} is not there"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        message += f"; for the Hugging Face dataset of that name pass --source=hf:{source}@COMMIT"
    return message
