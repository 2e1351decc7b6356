"""Turns a corpus into packed, checksummed training records: ``python -m train.prepare``.

    python -m train.prepare --source=CORPUS --tokenizer=TOKENIZER --out=DIR     prepare, or go on after a kill
    python -m train.prepare ... --task=I/N          make only every N-th shard, from I (0 to N-1)
    python -m train.prepare ... --merge             join what all tasks made
    python -m train.prepare --verify=DIR            check every hash, print the counts

Exit codes: 0 done, 2 a wrong argument or wrong data (one line says which), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from train.corpus import hub
from train.corpus.errors import DataError, PlanError
from train.corpus.manifest import MANIFEST_FILE, TOKENIZER_DIRECTORY, Json, counts_table, read_manifest
from train.corpus.plan import (
    PARTIAL_DIRECTORY,
    Options,
    ShardJob,
    make_plan,
    plan_of_manifest,
    read_plan,
    require_same_plan,
    shard_jobs,
    write_plan,
)
from train.corpus.readers import Fields, require_text
from train.corpus.runner import Tolerance, discard_partial, finished, merge, require_tolerable, run_jobs
from train.corpus.sources import SourceFile, find_sources
from train.corpus.tokenizer_training import sample_texts, train_tokenizer
from train.corpus.tokenizers import Tokenizer, load_tokenizer, save_tokenizer
from train.corpus.verify import usable_cores, verify_directory
from train.errors import EXIT_INTERRUPTED, EXIT_USAGE

_TRAIN = "train:"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DataError(message)


def _parser() -> _Parser:
    parser = _Parser(prog="python -m train.prepare", description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--source", help="directory, glob or file of .jsonl, .jsonl.zst, .parquet; or hf:OWNER/NAME@COMMIT")
    add(
        "--tokenizer", help="SentencePiece model, tokenizers JSON, directory with one, 'bytes', or train:SIZE"
    )
    add("--out", type=Path, help="directory to write")
    add("--context-length", type=int, default=4096, help="tokens in a record (default %(default)s)")
    add("--text-field", default=Fields().text, help="field or column of the text (default %(default)s)")
    add("--subset-field", default=Fields().subset, help="dotted name of the subset (default %(default)s)")
    add("--subsets", type=_names, default=(), help="keep only these subsets, comma separated")
    add("--split", help="split of every file, where paths do not tell it")
    add("--splits", type=_names, default=(), help="prepare only these splits, comma separated")
    add("--max-document-mb", type=float, default=8, help="longest document in MiB (default %(default)s)")
    add(
        "--max-bad",
        type=float,
        default=0.001,
        help="largest share of defective documents (default %(default)s)",
    )
    add(
        "--max-damaged-files",
        type=int,
        default=0,
        help="largest number of damaged files (default %(default)s)",
    )
    add(
        "--model-vocab-size",
        type=int,
        help="refuse a tokenizer with more entries than the model's vocabulary",
    )
    add(
        "--tokenizer-sample-mb",
        type=float,
        default=200,
        help="text to train a tokenizer on, in MB (default %(default)s)",
    )
    add("--workers", type=int, default=usable_cores(), help="processes (default: the cores, %(default)s)")
    add("--task", type=_task, help="I/N: make every N-th shard from the I-th, 0 <= I < N")
    add("--merge", action="store_true", help="join the shards of all tasks")
    add("--verify", type=Path, metavar="DIR", help="check a prepared directory and print its counts")
    add("--cache", type=Path, help="where hub downloads are kept (default: the hub's cache)")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _task(text: str) -> tuple[int, int]:
    index, separator, count = text.partition("/")
    if not separator or not index.isdecimal() or not count.isdecimal() or not int(index) < int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N")
    return int(index), int(count)


def _training(arguments: argparse.Namespace) -> Json | None:
    """How the tokenizer is to be trained, or None if it is given."""
    if not arguments.tokenizer.startswith(_TRAIN):
        return None
    size = arguments.tokenizer.removeprefix(_TRAIN)
    if not size.isdecimal():
        raise DataError(f"--tokenizer={arguments.tokenizer} must be train:SIZE, such as train:32000")
    return {"vocab_size": int(size), "sample_bytes": round(arguments.tokenizer_sample_mb * 1e6)}


def _tokenizer(
    arguments: argparse.Namespace, training: Json | None, sources: Sequence[SourceFile], fields: Fields
) -> Tokenizer:
    if training is None:
        return load_tokenizer(arguments.tokenizer)
    begun = _begun(arguments.out)
    if begun is not None and begun["tokenizer"]["training"] == training:
        return load_tokenizer(arguments.out / TOKENIZER_DIRECTORY)
    return train_tokenizer(training["vocab_size"], sample_texts(sources, fields, training["sample_bytes"]))


def _begun(directory: Path) -> Json | None:
    """The plan of a directory that is finished or begun, or None."""
    if (directory / MANIFEST_FILE).is_file():
        return plan_of_manifest(read_manifest(directory))
    return read_plan(directory)


def _require_arguments(arguments: argparse.Namespace) -> None:
    for name in ("source", "tokenizer", "out"):
        if getattr(arguments, name) is None:
            raise DataError(f"--{name} is missing")
    if arguments.workers < 1:
        raise DataError(f"--workers is {arguments.workers}; it must be at least 1")
    if arguments.merge and arguments.task:
        raise DataError("--task and --merge exclude each other: run all tasks, then merge")
    for name, largest in (("tokenizer_sample_mb", 1e6), ("max_document_mb", 1024)):
        value = getattr(arguments, name)
        if not 0 < value <= largest:
            option = name.replace("_", "-")
            raise DataError(f"--{option} is {value}; it must be over 0 and at most {largest:g}")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise DataError(f"--out={arguments.out} is not a directory")


def prepare(arguments: argparse.Namespace) -> Json | None:
    """Makes, or goes on making, a prepared directory; returns its manifest, None for one task of many."""
    _require_arguments(arguments)
    fields = Fields(arguments.text_field, arguments.subset_field, int(arguments.max_document_mb * (1 << 20)))
    options = Options(arguments.context_length, fields, arguments.subsets)
    tolerance = Tolerance(arguments.max_bad, arguments.max_damaged_files)
    from_hub = arguments.source.startswith(hub.PREFIX)
    source = str(hub.download(arguments.source, arguments.cache)) if from_hub else arguments.source
    sources = find_sources(source, split=arguments.split, splits=arguments.splits)
    require_text(sources, fields)
    training = _training(arguments)
    tokenizer = _tokenizer(arguments, training, sources, fields)
    limit = arguments.model_vocab_size
    if limit is not None and tokenizer.vocab_size > limit:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} entries; the model's vocabulary has {limit}"
        )
    name = arguments.source if from_hub else None
    plan = make_plan(options, tokenizer, sources, source_name=name, training=training)
    jobs = shard_jobs(sources)
    if (arguments.out / MANIFEST_FILE).is_file():
        return _finished_before(arguments.out, plan, tolerance)
    _start(arguments.out, plan, tokenizer)
    if not arguments.merge:
        index, count = arguments.task or (0, 1)
        _make(arguments.out, jobs[index::count], options, arguments.workers)
        if arguments.task:
            print(f"task {index} of {count} is done; when all are: the same command with --merge for --task")
            return None
    return merge(arguments.out, plan, jobs, tolerance, rehash=arguments.merge)


def _finished_before(directory: Path, plan: Json, tolerance: Tolerance) -> Json:
    manifest = read_manifest(directory)
    require_same_plan(directory, plan_of_manifest(manifest), plan)
    require_tolerable(manifest, tolerance)
    discard_partial(directory)
    print(f"{directory} is prepared already; --verify={directory} checks it")
    return manifest


def _start(directory: Path, plan: Json, tokenizer: Tokenizer) -> None:
    """Claims ``directory`` for the plan, or checks that it was claimed for the same one."""
    begun = read_plan(directory)
    if begun is not None:
        require_same_plan(directory, begun, plan)
        return
    present = {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()
    if present and not {PARTIAL_DIRECTORY} <= present <= {PARTIAL_DIRECTORY, TOKENIZER_DIRECTORY}:
        raise PlanError(f"--out={directory} is not empty and was not started by this command")
    (directory / PARTIAL_DIRECTORY).mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, directory / TOKENIZER_DIRECTORY)
    write_plan(directory, plan)


def _make(directory: Path, jobs: Sequence[ShardJob], options: Options, workers: int) -> None:
    kept = finished(directory, jobs, workers)
    if kept:
        print(f"{len(kept)} of {len(jobs)} shards are finished and intact")
    run_jobs(directory, [job for job in jobs if job.file not in kept], options, workers)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        arguments = _parser().parse_args(argv)
        if arguments.workers == 1:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if arguments.verify is not None:
            manifest: Json | None = verify_directory(arguments.verify)
        else:
            manifest = prepare(arguments)
        if manifest is not None:
            print(counts_table(manifest))
    except (DataError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
