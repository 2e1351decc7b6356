"""A small good file of every format that is read, and how it is read."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from holo_jax.generate.reading import init_state
from holo_jax.state_io import StateError, load_state, save_state
from holo_jax.tokenizers import MARKS_FILE, TokenizerError
from tests.train.common import micro_config
from tests.train.corpora import entries, write_jsonl
from tests.train.pieces import sentencepiece_model
from train import prepare
from train.checkpoint import CheckpointStore
from train.corpus.manifest import MANIFEST_FILE as CORPUS_MANIFEST
from train.corpus.prepared import PreparedDataset
from train.corpus.tokenizers import load_tokenizer
from train.decisions import DECISIONS_FILE, Rollback, append_rollback, read_rollbacks
from train.errors import TrainError
from train.inputs import open_inputs
from train.lock import LOCK_FILE, RunLock
from train.manifest import DamageError, verify
from train.metrics import METRICS_FILE, MetricsLog
from train.resume import check_identity
from train.run_config import CONFIG_FILE

REFUSALS = (TrainError, DamageError, StateError, TokenizerError)


class Format(NamedTuple):
    """A file, what reads it, and whether any change at all must be refused."""

    path: Path
    read: Callable[[], Any]
    exact: bool = False


def write(directory: Path) -> Iterator[Format]:
    """Writes one of each."""
    yield from _run_files(directory / "run")
    yield from _data_files(directory / "data")
    config = micro_config().model
    state = directory / "state"
    save_state(state, init_state(config, 1), config, weights="w" * 64)
    yield Format(state, lambda: load_state(state, config, weights="w" * 64), exact=True)


def _run_files(run: Path) -> Iterator[Format]:
    config = micro_config()
    identity = open_inputs(config).identity
    run.mkdir()
    config.write(run, identity)
    append_rollback(run, Rollback(4, 7, 7, "test"))
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 5)]
    (run / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / LOCK_FILE).write_text(json.dumps({"pid": 1, "host": socket.gethostname(), "since": 0.0}))
    yield Format(run / CONFIG_FILE, lambda: check_identity(run, config, identity))
    yield Format(run / DECISIONS_FILE, lambda: read_rollbacks(run))
    yield Format(run / METRICS_FILE, lambda: MetricsLog(run, 3, tensorboard=False).close())
    yield Format(run / LOCK_FILE, lambda: RunLock(run).close())
    store = CheckpointStore(run / "checkpoints", config.checkpoint)
    store.save(1, {"w": np.arange(12.0), "step": np.int32(1)}, {"rollbacks": []})
    store.close()
    for path in sorted((run / "checkpoints" / "1").rglob("*")):
        if path.is_file() and path.stat().st_size:
            yield Format(path, lambda: verify(run / "checkpoints" / "1"), exact=True)


def _data_files(data: Path) -> Iterator[Format]:
    write_jsonl(data / "train.jsonl", entries(30))
    write_jsonl(data / "validation.jsonl", entries(5, 1))
    made = data / "made"
    options = [f"--source={data}", f"--out={made}", "--context-length=16", "--workers=1"]
    if code := prepare.main([*options, "--tokenizer=train:300"]):
        raise RuntimeError(f"preparing ended with {code}")
    yield Format(made / CORPUS_MANIFEST, lambda: PreparedDataset(made, verify=False))
    for path in sorted(made.glob("train-*.arrayrecord")):
        yield Format(path, lambda: PreparedDataset(made), exact=True)
    for name in ("tokenizer.json", MARKS_FILE):
        yield Format(made / "tokenizer" / name, lambda: load_tokenizer(made / "tokenizer").encode("a b"))
    model = data / "tokenizer.model"
    model.write_bytes(sentencepiece_model())
    yield Format(model, lambda: load_tokenizer(model).encode("a b"))
