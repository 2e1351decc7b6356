"""The manifest of a prepared directory: what it holds, from what, made how, and every file's hash.

It names no host, path, time or worker, so that equal inputs give equal bytes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.corpus.errors import ManifestError
from train.corpus.files import sha256_bytes, to_json, write_atomically

FORMAT = 1
_MAX_BYTES = 1 << 27  # 700 bytes a shard
MANIFEST_FILE = "manifest.json"
TOKENIZER_DIRECTORY = "tokenizer"

_SLIMPAJAMA = "hf:DKYoon/SlimPajama-6B@b5f90f419b7489cdba26fdbc8c022fcb5562f968"

Json = dict[str, Any]
_COUNTS = ("documents", "tokens", "text_bytes")


def build_manifest(plan: Json, receipts: Sequence[Json]) -> Json:
    """Joins the receipts of all shards, in the order of the plan."""
    splits: dict[str, Json] = {}
    for receipt in receipts:
        shard = dict(receipt)
        splits.setdefault(shard.pop("split"), {"shards": []})["shards"].append(shard)
    for split in splits.values():
        split.update(_totals(split["shards"]))
    manifest = {
        "format": FORMAT,
        "options": plan["options"],
        "source": plan["source"],
        "tokenizer": plan["tokenizer"],
        "token_dtype": plan["token_dtype"],
        "splits": splits,
    }
    return manifest | {"checksum": _checksum(manifest)}


def _totals(shards: Sequence[Json]) -> Json:
    totals: Json = {
        name: sum(shard[name] for shard in shards) for name in (*_COUNTS, "packed_tokens", "records")
    }
    subsets: dict[str, Json] = {}
    defects: dict[str, int] = {}
    for shard in shards:
        for name, counts in shard["subsets"].items():
            entry = subsets.setdefault(name, dict.fromkeys(_COUNTS, 0))
            for field in _COUNTS:
                entry[field] += counts[field]
        for kind, defect in shard["defects"].items():
            defects[kind] = defects.get(kind, 0) + defect["count"]
    totals["left_out"] = sum(shard["left_out"] for shard in shards)
    return totals | {"subsets": subsets, "defects": defects}


def _checksum(manifest: Json) -> str:
    return sha256_bytes(to_json({key: value for key, value in manifest.items() if key != "checksum"}))


def write_manifest(directory: Path, manifest: Json) -> None:
    write_atomically(directory / MANIFEST_FILE, to_json(manifest))


def read_manifest(directory: Path) -> Json:
    """The manifest of a prepared directory, checked against its own checksum.

    Raises:
      ManifestError: if it is missing, unreadable, changed, or of another format; a missing one says
        which command makes it.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        state = (
            "was started but not finished"
            if (directory / ".partial").is_dir()
            else "is no prepared data directory"
        )
        raise ManifestError(
            f"{directory} {state} (no {MANIFEST_FILE}); this makes it from SlimPajama-6B: "
            f"python -m train.prepare --source={_SLIMPAJAMA} --tokenizer=train:32000 --out={directory} "
            "(--source may also name local files)"
        )
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ManifestError(f"{path} has format {found!r}; this version reads format {FORMAT}")
    try:
        intact = manifest.get("checksum") == _checksum(manifest)
    except (ValueError, RecursionError):  # text that is no Unicode, or nested without end
        intact = False
    if not intact:
        raise ManifestError(f"{path} is damaged: its content does not match its checksum")
    return manifest


def data_files(manifest: Json) -> dict[str, Json]:
    """Every file the manifest vouches for: relative name to ``{"sha256", "bytes"?}``."""
    files: dict[str, Json] = {}
    for name, digest in manifest["tokenizer"]["files"].items():
        files[f"{TOKENIZER_DIRECTORY}/{name}"] = {"sha256": digest}
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            files[shard["file"]] = {"sha256": shard["sha256"], "bytes": shard["bytes"]}
    return files


def counts_table(manifest: Json) -> str:
    """Documents, tokens, bytes and records by split and subset, as aligned text."""
    rows = [("split", "subset", "documents", "tokens", "text bytes", "records")]
    for name, split in sorted(manifest["splits"].items()):
        totals = [f"{split[field]:,}" for field in _COUNTS]
        rows.append((name, "all", *totals, f"{split['records']:,}"))
        for subset, counts in sorted(split["subsets"].items()):
            rows.append((name, subset or "(no name)", *[f"{counts[field]:,}" for field in _COUNTS], ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if k < 2 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    for name, split in sorted(manifest["splits"].items()):
        for kind, count in sorted(split["defects"].items()):
            lines.append(f"{name}: {count:,} {kind}")
        if split["left_out"]:
            lines.append(f"{name}: {split['left_out']:,} documents of other subsets left out")
    return "\n".join(lines)
