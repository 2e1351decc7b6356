"""Files that appear whole or not at all, and their hashes."""

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hex; ``on_bytes`` hears how many bytes each block had."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        buffer = bytearray(_BLOCK)
        view = memoryview(buffer)
        while count := stream.readinto(buffer):
            digest.update(view[:count])
            if on_bytes is not None:
                on_bytes(count)
    return digest.hexdigest()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def temporary_path(path: Path) -> Path:
    """A hidden name beside ``path`` that no other process on any host uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def is_temporary(path: Path, target: str) -> bool:
    """Whether ``path`` is an unfinished version of the file named ``target``."""
    return path.name.startswith(f".{target}.") and path.name.endswith(".tmp")


def publish(temporary: Path, path: Path) -> None:
    """Makes ``temporary`` durable and gives it its final name in one step."""
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes ``data`` so that a reader, or a kill, sees the whole file or the old one."""
    temporary = temporary_path(path)
    temporary.write_bytes(data)
    publish(temporary, path)


def to_json(value: Any) -> bytes:
    """Canonical readable JSON: sorted keys, one space of indent, final newline."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def field_differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """``field: old -> new`` for every leaf in which two JSON values differ, lists as leaves."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(set(old) | set(new)):
            name = f"{prefix}.{key}" if prefix else str(key)
            lines += field_differences(old.get(key), new.get(key), name)
        return lines
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]
