"""What a preparation will do: options, tokenizer and the ordered list of input files.

One input file becomes one shard that depends on that file, the tokenizer and the options only. So the
bytes are the same for any number of workers or machines, and a killed run keeps what it finished.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.corpus.errors import DataError, PlanError
from train.corpus.files import field_differences, to_json, write_atomically
from train.corpus.manifest import Json
from train.corpus.packing import token_dtype
from train.corpus.readers import Fields
from train.corpus.sources import SourceFile
from train.corpus.tokenizers import Tokenizer, describe_tokenizer

PARTIAL_DIRECTORY = ".partial"
_PLAN_FILE = "plan.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything beside input and tokenizer that decides the shards' bytes.

    Attributes:
      context_length: tokens in a record.
      fields: where text and subset are, and the longest text.
      subsets: keep only documents of these subsets; empty keeps all.

    Raises:
      DataError: naming the field, its value and what it must be.
    """

    context_length: int = 4096
    fields: Fields = dataclasses.field(default_factory=Fields)
    subsets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= self.context_length < 1 << 31:
            raise DataError(f"context_length is {self.context_length}; it must be in [2, 2^31)")
        if not self.fields.text:
            raise DataError("text_field is empty; it must name the field of the text")
        if not 1 <= self.fields.max_document_bytes <= 1 << 30:
            size = self.fields.max_document_bytes
            raise DataError(f"max_document_bytes is {size}; it must be in [1, 2^30]")


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """One shard to make.

    Attributes:
      source: the input file.
      file: name of the shard, relative to the output directory.
      receipt: name of the note that it is finished, relative to the output directory.
    """

    source: SourceFile
    file: str
    receipt: str


def shard_jobs(sources: Sequence[SourceFile]) -> list[ShardJob]:
    """A job for each source, numbered within its split."""
    totals = {split: sum(s.split == split for s in sources) for split in {s.split for s in sources}}
    numbers = dict.fromkeys(totals, 0)
    jobs = []
    for source in sources:
        name = f"{source.split}-{numbers[source.split]:05d}-of-{totals[source.split]:05d}"
        numbers[source.split] += 1
        jobs.append(ShardJob(source, f"{name}.arrayrecord", f"{PARTIAL_DIRECTORY}/{name}.json"))
    return jobs


def make_plan(
    options: Options,
    tokenizer: Tokenizer,
    sources: Sequence[SourceFile],
    *,
    source_name: str | None = None,
    training: Json | None = None,
) -> Json:
    """The plan as JSON.

    Args:
      source_name: the pinned dataset id; None for local files.
      training: how the tokenizer was trained; None if it was given.
    """
    return {
        "options": json.loads(json.dumps(dataclasses.asdict(options))),
        "source": source_name,
        "tokenizer": describe_tokenizer(tokenizer) | {"training": training},
        "token_dtype": token_dtype(tokenizer.vocab_size).name,
        "files": {
            job.file: {"name": job.source.name, "bytes": job.source.size} for job in shard_jobs(sources)
        },
    }


def plan_of_manifest(manifest: Json) -> Json:
    """The plan that a finished directory was made by."""
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    files = {shard["file"]: {key: shard["source"][key] for key in ("name", "bytes")} for shard in shards}
    kept = {key: manifest[key] for key in ("options", "source", "tokenizer", "token_dtype")}
    return kept | {"files": files}


def read_plan(directory: Path) -> Json | None:
    """The plan of an unfinished directory, or None."""
    path = directory / PARTIAL_DIRECTORY / _PLAN_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is damaged: {error}; remove {directory} and start again") from error


def write_plan(directory: Path, plan: Json) -> None:
    """Claims a directory for a plan."""
    write_atomically(directory / PARTIAL_DIRECTORY / _PLAN_FILE, to_json(plan))


def require_same_plan(directory: Path, old: Json, new: Json) -> None:
    """Refuses to go on in a directory that was started otherwise.

    Raises:
      PlanError: listing the fields that differ.
    """
    lines = field_differences(old, new)
    if lines:
        more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise PlanError(
            f"{directory} was started with other options: {'; '.join(lines[:4])}{more}. "
            "Use another --out, or remove it"
        )


def read_receipt(directory: Path, job: ShardJob) -> dict[str, Any] | None:
    """The receipt of a finished shard, or None if there is none that can be read."""
    try:
        return json.loads((directory / job.receipt).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
