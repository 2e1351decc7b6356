"""Runs the shards of a plan over worker processes, and joins the results."""

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import multiprocessing
import os
import queue
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.corpus.errors import BadInputError, DataError, PlanError
from train.corpus.files import sha256_file
from train.corpus.manifest import (
    TOKENIZER_DIRECTORY,
    Json,
    build_manifest,
    data_files,
    write_manifest,
)
from train.corpus.plan import PARTIAL_DIRECTORY, Options, ShardJob, read_receipt
from train.corpus.progress import ByteProgress
from train.corpus.readers import FILE_DEFECTS
from train.corpus.shards import Progress, make_shard
from train.corpus.tokenizers import Tokenizer, load_tokenizer
from train.corpus.verify import verify_files

_POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How much bad input is accepted.

    Attributes:
      defective: largest share of defective documents.
      damaged_files: largest number of damaged files (each loses an unknown number of documents).

    Raises:
      DataError: naming the field, its value and what it must be.
    """

    defective: float = 0.001
    damaged_files: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.defective <= 1:
            raise DataError(f"max_bad is {self.defective}; it must be a share in [0, 1]")
        if self.damaged_files < 0:
            raise DataError(f"max_damaged_files is {self.damaged_files}; it must not be negative")


def finished(directory: Path, jobs: Sequence[ShardJob], threads: int) -> dict[str, Json]:
    """Receipts, by shard file, of jobs that are done and whose shard and input still match their hashes."""
    receipts = {job.file: receipt for job in jobs if (receipt := read_receipt(directory, job)) is not None}

    def intact(job: ShardJob) -> bool:
        receipt, shard = receipts[job.file], directory / job.file
        return (
            shard.is_file()
            and shard.stat().st_size == receipt["bytes"]
            and sha256_file(shard) == receipt["sha256"]
            and sha256_file(job.source.path) == receipt["source"]["sha256"]
        )

    known = [job for job in jobs if job.file in receipts]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        kept = [job for job, good in zip(known, pool.map(intact, known), strict=True) if good]
    return {job.file: receipts[job.file] for job in kept}


def run_jobs(directory: Path, jobs: Sequence[ShardJob], options: Options, workers: int) -> None:
    """Makes the shards of ``jobs`` with ``workers`` processes; the largest inputs go first.

    With fewer files than workers the spare ones become tokenizer threads. One worker runs in this
    process. The tokenizer is read from ``directory``.

    Raises:
      DataError: as raised in a worker; or if a worker dies.
    """
    ordered = sorted(jobs, key=lambda job: -job.source.size)
    processes = min(workers, len(ordered))
    if processes == 0:
        return
    threads = workers // processes
    with ByteProgress("prepare", sum(job.source.size for job in ordered)) as shown:
        totals = Progress()

        def hear(part: Progress) -> None:
            nonlocal totals
            totals = Progress(
                *map(sum, zip(dataclasses.astuple(totals), dataclasses.astuple(part), strict=True))
            )
            note = f", {totals.documents:,} documents, {totals.defects:,} defective"
            shown.update(totals.source_bytes, totals.text_bytes, note)

        if workers == 1:
            tokenizer = load_tokenizer(directory / TOKENIZER_DIRECTORY)
            for job in ordered:
                make_shard(directory, job, options, tokenizer, report=hear)
        else:
            _run_processes(directory, ordered, options, processes, threads, hear)


def _run_processes(
    directory: Path,
    jobs: Sequence[ShardJob],
    options: Options,
    processes: int,
    threads: int,
    hear: Callable[[Progress], None],
) -> None:
    # Spawn: a forked child of a process with JAX or tokenizer threads can hang.
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, context, _start_worker, (str(directory / TOKENIZER_DIRECTORY), threads, reports)
    )
    pending: set[concurrent.futures.Future[str]] = set()
    try:
        pending = {pool.submit(_work, directory, job, options, threads) for job in jobs}
        while pending:
            done, pending = concurrent.futures.wait(
                pending, _POLL_SECONDS, concurrent.futures.FIRST_EXCEPTION
            )
            for future in done:
                future.result()
            while (part := _next(reports)) is not None:
                hear(part)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
            "a worker process died (killed, or out of memory); finished shards are kept, "
            "run the same command again"
        ) from error
    finally:
        for worker in list((pool._processes or {}).values()):
            if pending:
                worker.terminate()
        pool.shutdown(cancel_futures=True)


def _next(reports: Any) -> Progress | None:
    try:
        return reports.get_nowait()
    except queue.Empty:
        return None


class _Worker:
    """What a worker process keeps between shards."""

    tokenizer: Tokenizer
    reports: Any


def _start_worker(tokenizer: str, threads: int, reports: Any) -> None:
    # Ctrl-C reaches the whole process group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    _Worker.tokenizer = load_tokenizer(tokenizer)
    _Worker.reports = reports
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A worker whose parent was killed must not go on writing, nor wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(directory: Path, job: ShardJob, options: Options, threads: int) -> str:
    make_shard(directory, job, options, _Worker.tokenizer, threads=threads, report=_Worker.reports.put)
    return job.file


def merge(
    directory: Path, plan: Json, jobs: Sequence[ShardJob], tolerance: Tolerance, *, rehash: bool
) -> Json:
    """Joins all receipts into the manifest and removes what only the making needed.

    Args:
      rehash: check every shard's SHA-256 first (shards that other machines made).

    Raises:
      PlanError: if a shard is not made yet.
      BadInputError: if more input is bad than ``tolerance`` allows; no manifest is written.
      ShardError: naming a shard that does not match its receipt.
    """
    receipts = [read_receipt(directory, job) for job in jobs]
    missing = [job.file for job, receipt in zip(jobs, receipts, strict=True) if receipt is None]
    if missing:
        raise PlanError(
            f"{directory}: {len(missing)} of {len(jobs)} shards are not made yet, first {missing[0]}; "
            "run their tasks, then merge"
        )
    found = [receipt for receipt in receipts if receipt is not None]
    manifest = build_manifest(plan, found)
    require_tolerable(manifest, tolerance)
    if rehash:
        verify_files(directory, data_files(manifest))
    write_manifest(directory, manifest)
    discard_partial(directory)
    return manifest


def discard_partial(directory: Path) -> None:
    """Removes plan, receipts and unfinished files of a finished directory."""
    shutil.rmtree(directory / PARTIAL_DIRECTORY, ignore_errors=True)
    for left in directory.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def require_tolerable(manifest: Json, tolerance: Tolerance) -> None:
    """Refuses a corpus with too much bad input.

    Raises:
      BadInputError: with every kind's count, and the files that have most.
    """
    splits = manifest["splits"].values()
    shards = [shard for split in splits for shard in split["shards"]]
    kinds: collections.Counter[str] = collections.Counter()
    for split in splits:
        kinds.update(split["defects"])
    kept = sum(split["documents"] for split in splits)
    left_out = sum(split["left_out"] for split in splits)
    documents = kept + left_out
    damaged = sum(kinds[kind] for kind in FILE_DEFECTS)
    defective = sum(kinds.values()) - damaged
    share = defective / max(documents + defective, 1)
    if damaged > tolerance.damaged_files or share > tolerance.defective:
        found = [(shard, *item) for shard in shards for item in shard["defects"].items()]
        found.sort(key=lambda item: (-item[2]["count"], item[0]["source"]["name"], item[1]))
        worst = [
            f"{shard['source']['name']}: {defect['count']} {kind}, first at {defect['first']}"
            for shard, kind, defect in found
        ]
        more = f" (and {len(worst) - 5} more)" if len(worst) > 5 else ""
        raise BadInputError(
            f"{defective:,} of {documents + defective:,} documents are defective "
            f"(limit --max-bad={tolerance.defective:g}) and {damaged} files are damaged "
            f"(limit --max-damaged-files={tolerance.damaged_files}): " + "; ".join(worst[:5]) + more
        )
    if kept == 0:
        raise BadInputError(f"the source has no document to keep ({left_out:,} are of other subsets)")
