"""Datasets of the Hugging Face hub, at a pinned commit."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from train.corpus.errors import SourceError
from train.corpus.sources import FORMATS

PREFIX = "hf:"
_NUMBERED = re.compile(r"^(?P<stem>.*?)-(?P<index>\d{5})-of-(?P<count>\d{5})")


def parse(source: str) -> tuple[str, str]:
    """``hf:OWNER/NAME@COMMIT`` as (OWNER/NAME, COMMIT).

    Raises:
      SourceError: if it has another form; a branch such as ``main`` is refused, since it moves.
    """
    name, separator, revision = source.removeprefix(PREFIX).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise SourceError(f"{source!r} names no dataset; write hf:OWNER/NAME@COMMIT")
    if not separator or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise SourceError(
            f"{source!r} has no pinned revision; write hf:{name}@COMMIT with the 40 hexadecimal digits that "
            f"https://huggingface.co/datasets/{name}/commits/main shows"
        )
    return name, revision


def download(source: str, cache: Path | None = None) -> Path:
    """Fetches a dataset's text files and returns their directory. A broken download goes on where it stopped.

    Args:
      source: ``hf:OWNER/NAME@COMMIT``.
      cache: directory to download to; the hub's own cache by default.

    Raises:
      SourceError: if the hub is out of reach, refuses, or has no such dataset, with the local way out;
        or if a numbered file is missing from what came.
    """
    name, revision = parse(source)
    try:
        directory = huggingface_hub.snapshot_download(
            name,
            repo_type="dataset",
            revision=revision,
            cache_dir=cache,
            allow_patterns=[f"*{ending}" for ending in FORMATS],
        )
    except hub_errors.GatedRepoError as error:
        raise SourceError(
            f"{name} is gated: accept its terms on https://huggingface.co/datasets/{name} and log in with "
            f"'hf auth login', or {_local_way(name, revision)}"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise SourceError(f"{name} has no commit {revision}") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise SourceError(f"the hub has no dataset {name}, or it is private") from error
    except (hub_errors.HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(
            f"cannot fetch {name}: {reason} Either be online, or {_local_way(name, revision)}"
        ) from error
    root = Path(directory)
    check_complete(source, [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()])
    return root


def check_complete(source: str, names: Sequence[str]) -> None:
    """Refuses a numbered family (``train-00003-of-00048...``) with a gap."""
    families: dict[tuple[str, int], set[int]] = defaultdict(set)
    for name in names:
        if match := _NUMBERED.match(name):
            families[match["stem"], int(match["count"])].add(int(match["index"]))
    for (stem, count), present in sorted(families.items()):
        missing = sorted(set(range(count)) - present)
        if missing:
            raise SourceError(
                f"{source}: {len(missing)} of {count} files of {stem!r} are missing, first "
                f"{stem}-{missing[0]:05d}-of-{count:05d}; the download is not complete, run it again online"
            )


def _local_way(name: str, revision: str) -> str:
    return (
        f"on a machine that is, run 'hf download {name} --repo-type dataset --revision {revision} "
        "--local-dir DIR' and pass --source=DIR"
    )
