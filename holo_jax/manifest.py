"""The commit record of a checkpoint: a SHA-256 of every file, written last and verified before loading.

Orbax restores an array with a flipped bit without complaint. So a checkpoint counts as committed
only with a manifest, and is read only if every byte of it agrees with the manifest. The manifest
protects itself: its first line is the SHA-256 of the rest.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.sha256.json"
_MAX_BYTES = 64 << 20


class DamageError(Exception):
    """A checkpoint is not what was committed. ``kind`` is a short word for file names."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def write_manifest(directory: Path, record: dict[str, Any]) -> None:
    """Hashes every file under ``directory``, brings them to disk, and writes the manifest in one piece.

    Args:
      directory: a complete checkpoint.
      record: plain values kept with the hashes.

    Raises:
      OSError: if the disk refuses; then there is no manifest.
    """
    files = {}
    for path in _files(directory):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.relative_to(directory).as_posix()] = [path.stat().st_size, digest]
    body = json.dumps({"record": record, "files": files}, indent=1, sort_keys=True).encode()
    part = directory / (MANIFEST_FILE + ".part")
    with part.open("wb") as file:
        file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        file.flush()
        os.fsync(file.fileno())
    part.replace(directory / MANIFEST_FILE)
    for path in (*(p for p in directory.rglob("*") if p.is_dir()), directory, directory.parent):
        sync_directory(path)


def read_manifest(directory: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """(record, files) of a manifest whose own hash holds.

    Raises:
      DamageError: if it is missing, or not what was written.
    """
    path = directory / MANIFEST_FILE
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES)
    except FileNotFoundError:
        if not any(directory.iterdir()):
            raise DamageError("empty", "the directory is empty") from None
        raise DamageError("uncommitted", f"it has no {MANIFEST_FILE}: the save did not finish") from None
    except OSError as error:
        raise DamageError("unreadable", f"{MANIFEST_FILE}: {error.strerror}") from None
    digest, _, body = text.partition(b"\n")
    if digest != hashlib.sha256(body).hexdigest().encode():
        raise DamageError("manifest", f"{MANIFEST_FILE} does not match its own hash")
    content = json.loads(body)
    return content["record"], content["files"]


def verify(directory: Path, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Compares every byte of a checkpoint with its manifest and returns the manifest's record.

    Args:
      directory: of the checkpoint.
      share: (i, n) reads only the i-th of every n files; their names are all compared.

    Raises:
      DamageError: naming the first file that is missing, surplus, truncated or changed.
    """
    record, expected = read_manifest(directory)
    present = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
    for name in sorted(expected.keys() - present.keys()):
        raise DamageError("missing-file", f"{name} is missing")
    for name in sorted(present.keys() - expected.keys()):
        raise DamageError("surplus-file", f"{name} was not part of it")
    for name, (size, digest) in sorted(expected.items())[share[0] :: share[1]]:
        try:
            found = present[name].stat().st_size
            if found != size:
                raise DamageError("size", f"{name} has {found} bytes; it was committed with {size}")
            with present[name].open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DamageError("unreadable", f"{name}: {error.strerror}") from None
        if actual != digest:
            raise DamageError("hash", f"{name} has changed: SHA-256 {actual[:12]}, committed {digest[:12]}")
    return record


def sync_directory(directory: Path) -> None:
    """Brings a directory's entries to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(directory: Path) -> list[Path]:
    own = {MANIFEST_FILE, MANIFEST_FILE + ".part"}
    inside = (p for p in directory.rglob("*") if not p.is_dir())
    return sorted(p for p in inside if p.relative_to(directory).as_posix() not in own)
