"""Speed of preparing and of loading: ``python -m train.corpus.benchmark prepare|load``.

    prepare --source=CORPUS --tokenizer=TOKENIZER [--workers=2] [--mb=20]
        The whole pipeline against the tokenizer library's own bulk call on the same texts, in turns, with
        as many threads as workers. On a shared machine compare CPU seconds, not wall seconds.
    load --data=DIR [--context-length=4096] [--batch=128] [--steps=50] [--step-ms=200]
        How long a consumer that is busy for ``step-ms`` a step waits for its next batch.

One JSON object on standard output.
"""

import argparse
import functools
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import zstandard

from train.corpus.errors import DataError
from train.corpus.manifest import TOKENIZER_DIRECTORY
from train.corpus.plan import PARTIAL_DIRECTORY, Options, shard_jobs
from train.corpus.readers import Fields, Text, read_documents
from train.corpus.runner import run_jobs
from train.corpus.sources import find_sources
from train.corpus.tokenizers import load_tokenizer, save_tokenizer
from train.errors import EXIT_USAGE

_TURNS = 2


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds, those of ended child processes included."""
    wall, cpu = time.perf_counter(), _cpu_seconds()
    work()
    return time.perf_counter() - wall, _cpu_seconds() - cpu


def _texts(source: str, limit: float) -> list[Text]:
    """About ``limit`` bytes of documents from the beginning of every file in turn."""
    iterators: list[Iterator[Any]] = [read_documents(file, Fields()) for file in find_sources(source)]
    found: list[Text] = []
    size = 0
    for document in itertools.chain.from_iterable(itertools.zip_longest(*iterators)):
        if isinstance(document, Text):
            found.append(document)
            size += document.text_bytes
        if size >= limit:
            break
    return found


def benchmark_prepare(source: str, tokenizer_spec: str, workers: int, megabytes: float) -> dict[str, Any]:
    """Rates in MB of text a second, by wall and by CPU time; the better of the turns."""
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    tokenizer = load_tokenizer(tokenizer_spec)
    documents = _texts(source, megabytes * 1e6)
    size = sum(document.text_bytes for document in documents) / 1e6
    texts = [document.text for document in documents]
    runs: dict[str, list[tuple[float, float]]] = {"library": [], "pipeline": []}
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        for part in range(workers):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[part::workers])
            (corpus / f"train-{part}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        jobs = shard_jobs(find_sources(str(corpus)))
        for turn in range(_TURNS):
            out = Path(scratch) / str(turn)
            (out / PARTIAL_DIRECTORY).mkdir(parents=True)
            save_tokenizer(tokenizer, out / TOKENIZER_DIRECTORY)
            runs["library"].append(_timed(functools.partial(tokenizer.encode_batch, texts, workers)))
            runs["pipeline"].append(_timed(functools.partial(run_jobs, out, jobs, Options(), workers)))
    wall = {name: size / min(wall for wall, _ in turns) for name, turns in runs.items()}
    cpu = {name: size / min(cpu for _, cpu in turns) for name, turns in runs.items()}
    return {
        "text_mb": size,
        "documents": len(documents),
        "workers": workers,
        "tokenizer": tokenizer.kind,
        "mb_per_second": wall,
        "mb_per_cpu_second": cpu,
        "ratio_wall": wall["pipeline"] / wall["library"],
        "ratio_cpu": cpu["pipeline"] / cpu["library"],
        "load_average": os.getloadavg(),
    }


def benchmark_load(data: str, context_length: int, batch: int, steps: int, step_ms: float) -> dict[str, Any]:
    """Milliseconds a step waited for its batch, after the first."""
    from train.data import make_loader, open_prepared  # these need JAX, which workers must not import

    opened = time.perf_counter()
    dataset = open_prepared([data], context_length=context_length)
    opened = time.perf_counter() - opened
    loader = make_loader(dataset, seed=0, global_batch_size=batch)
    waits = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        next(loader)
        waits.append(1e3 * (time.perf_counter() - begin))
        time.sleep(step_ms / 1e3)
    loader.close()
    first, *later = waits
    return {
        "tokens_per_step": context_length * batch,
        "open_seconds": opened,
        "first_ms": first,
        "mean_ms": statistics.mean(later),
        "median_ms": statistics.median(later),
        "max_ms": max(later),
        "share_of_step": statistics.mean(later) / step_ms,
        "load_average": os.getloadavg(),
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DataError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = _Parser(prog="python -m train.corpus.benchmark")
    kinds = parser.add_subparsers(dest="kind", required=True)
    prepare = kinds.add_parser("prepare")
    prepare.add_argument("--source", required=True)
    prepare.add_argument("--tokenizer", required=True)
    prepare.add_argument("--workers", type=int, default=2)
    prepare.add_argument("--mb", type=float, default=20)
    load = kinds.add_parser("load")
    load.add_argument("--data", required=True)
    load.add_argument("--context-length", type=int, default=4096)
    load.add_argument("--batch", type=int, default=128)
    load.add_argument("--steps", type=int, default=50)
    load.add_argument("--step-ms", type=float, default=200)
    try:
        given = parser.parse_args(argv)
        for name, value in vars(given).items():
            if not isinstance(value, str) and not 0 < value < 1e9:
                raise DataError(f"--{name.replace('_', '-')} is {value}; it must be positive")
        if given.kind == "prepare":
            result = benchmark_prepare(given.source, given.tokenizer, given.workers, given.mb)
        else:
            result = benchmark_load(given.data, given.context_length, given.batch, given.steps, given.step_ms)
    except (DataError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
