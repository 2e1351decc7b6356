"""Hash checks of prepared directories: all files against the manifest, and a stamp that makes it quick."""

import concurrent.futures
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from train.corpus.errors import ShardError
from train.corpus.files import sha256_bytes, sha256_file, to_json, write_atomically
from train.corpus.manifest import MANIFEST_FILE, Json, data_files, read_manifest
from train.corpus.progress import ByteProgress

STAMP_FILE = ".verified.json"


def verify_directory(directory: Path, *, threads: int | None = None) -> Json:
    """Re-hashes every file of a prepared directory and returns its manifest.

    Raises:
      ManifestError: if the manifest is missing or damaged.
      ShardError: naming the first file, in manifest order, that is missing or differs.
    """
    manifest = read_manifest(directory)
    verify_files(directory, data_files(manifest), threads=threads)
    return manifest


def verify_files(directory: Path, files: Json, *, threads: int | None = None) -> None:
    """Checks size and SHA-256 of ``files`` (relative name to ``{"sha256", "bytes"?}``), in parallel."""
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            raise ShardError(f"{path} is missing")
        if "bytes" in expected and path.stat().st_size != expected["bytes"]:
            raise ShardError(f"{path} has {path.stat().st_size} bytes; the manifest says {expected['bytes']}")
    sizes = {name: (directory / name).stat().st_size for name in files}
    done = 0
    lock = threading.Lock()
    with ByteProgress("verify", sum(sizes.values())) as progress:

        def on_bytes(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                progress.update(done, done)

        with concurrent.futures.ThreadPoolExecutor(threads or usable_cores()) as pool:
            hashes = pool.map(lambda name: sha256_file(directory / name, on_bytes), files)
            for (name, expected), found in zip(files.items(), hashes, strict=True):
                if found != expected["sha256"]:
                    pool.shutdown(cancel_futures=True)
                    raise ShardError(
                        f"{directory / name} is damaged or swapped: its SHA-256 is not the manifest's"
                    )


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def verify_once(directory: Path, splits: Sequence[str], *, threads: int | None = None) -> Json:
    """``verify_directory`` for some splits, skipped when nothing changed since it last passed.

    A stamp keeps size, modification time and inode of every file that passed, under the hash of the
    manifest. It lies in the directory, or, when that is read-only, in the user's cache directory.

    Raises:
      ManifestError, ShardError: as ``verify_directory``.
    """
    manifest = read_manifest(directory)
    wanted = {shard["file"] for split in splits for shard in manifest["splits"][split]["shards"]}
    shards = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]}
    files = {name: entry for name, entry in data_files(manifest).items() if name not in shards - wanted}
    key = sha256_bytes((directory / MANIFEST_FILE).read_bytes())
    places = [directory / STAMP_FILE, _cache_directory() / f"{key}.json"]
    known: Json = {}
    for place in places:
        known |= _read_stamp(place, key)
    found = {name: _identity(directory / name) for name in files}
    stale = {name: files[name] for name in files if found[name] is None or known.get(name) != found[name]}
    if stale:
        verify_files(directory, stale, threads=threads)
        passed = known | {name: found[name] for name in stale}
        _write_stamp(places, {"manifest": key, "files": passed})
    return manifest


def _identity(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "holo-jax" / "verified"


def _read_stamp(path: Path, key: str) -> Json:
    try:
        stamp = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    files = stamp.get("files") if isinstance(stamp, dict) and stamp.get("manifest") == key else None
    return files if isinstance(files, dict) else {}


def _write_stamp(places: Sequence[Path], stamp: Json) -> None:
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, to_json(stamp))
        except OSError:
            continue
        if place != places[0]:
            print(f"{places[0].parent} is read-only: its check is remembered in {place}", file=sys.stderr)
        return
    print(f"{places[0].parent}: no place to remember its check; the next start repeats it", file=sys.stderr)
