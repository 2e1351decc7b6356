"""Runs in a child process, with faults on order: deaths, poisoned batches, stalls.

The processes come from a fork server that has imported everything but started no device.
"""

import contextlib
import functools
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging

import train.checkpoint
import train.loop
import train.metrics
import train.recorder
from tests import compiling
from tests.train.common import micro_config
from train.distributed import Place, join
from train.errors import EXIT_PREEMPTED, TrainError
from train.preemption import AgreedStop
from train.processes import Processes, leave

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.train.child"])
LOG = "child.log"


def start(
    workdir: Path, overrides: dict[str, Any] | None = None, *, log: Path | None = None, **faults: Any
) -> Any:
    """Starts a micro run on one device in ``workdir``; its output is added to ``workdir``.log, or ``log``."""
    log = log or workdir.with_suffix(".log")
    process = _PROCESSES.Process(target=_main, args=(workdir, overrides or {}, faults, log))
    process.start()
    return process


def run(
    workdir: Path, overrides: dict[str, Any] | None = None, *, timeout: float = 300, **faults: Any
) -> int:
    """Runs to the end; returns the exit code (negative: the signal that killed it)."""
    process = start(workdir, overrides, **faults)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the child did not end in {timeout} s:\n{output(workdir)}")
    return process.exitcode


def start_command(
    arguments: list[str],
    log: Path,
    *,
    devices: int,
    level: int = 0,
    environment: dict[str, str] | None = None,
    **faults: Any,
) -> Any:
    """Starts ``python -m train.main`` on so many CPU devices; its output is added to ``log``.

    ``level`` is how far the compiler optimises.
    """
    given = (arguments, log, devices, level, environment or {}, faults)
    process = _PROCESSES.Process(target=_command, args=given)
    process.start()
    return process


def start_meeting(port: int, index: int, log: Path) -> Any:
    """Starts one of two processes that agree on a stop, and of which the second then stays away."""
    process = _PROCESSES.Process(target=_meeting, args=(port, index, log))
    process.start()
    return process


def output(workdir: Path) -> str:
    """What the children in ``workdir`` have printed so far."""
    path = workdir.with_suffix(".log")
    return path.read_text() if path.exists() else ""


def _command(
    arguments: list[str],
    log: Path,
    devices: int,
    level: int,
    environment: dict[str, str],
    faults: dict[str, Any],
) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Read when the first device is asked for, which the fork server has not done.
    os.environ.update(environment, XLA_FLAGS=compiling.flags(devices, level=level))
    jax.config.update("jax_platforms", "cpu")  # the fork server has read the variable when it imported jax
    sys.argv = ["train.main", *arguments]
    with contextlib.ExitStack() as stack:
        for name, value in faults.items():
            stack.enter_context(FAULTS[name](value))
        runpy.run_module("train.main", run_name="__main__")


def _meeting(port: int, index: int, log: Path) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    jax.config.update("jax_platforms", "cpu")
    join(Place(f"localhost:{port}", 2, index))
    processes = Processes()
    processes.at_end(lambda: print("given back", flush=True))
    try:
        with processes.ending_together():
            stop = AgreedStop(processes)
            steps = 0
            while not stop.reached():
                steps += 1
                if steps == 20 and index == 1:
                    stop.set("SIGTERM")
                time.sleep(0.01 if index else 0.005)
            print(f"stopped by {stop.signal_name} after step {steps}", flush=True)
            if index == 1:
                time.sleep(600)
            processes.exchange("the meeting", None, 1.0)
    except TrainError as error:
        print(error, flush=True)
        leave(error.exit_code, alone=True)


def _main(workdir: Path, overrides: dict[str, Any], faults: dict[str, Any], log: Path) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.set_verbosity(logging.FATAL)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    with contextlib.ExitStack() as stack:
        for name, value in faults.items():
            stack.enter_context(FAULTS[name](value))
        try:
            result = train.loop.train(micro_config(**overrides), workdir, devices=jax.devices()[:1])
        except TrainError as error:
            print(f"train: {error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
    sys.exit(EXIT_PREEMPTED if result.stopped_by else 0)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def _replaced(place: Any, name: str, make: Any) -> Iterator[None]:
    original = getattr(place, name)
    setattr(place, name, make(original))
    try:
        yield
    finally:
        setattr(place, name, original)


def signal_before_step(when: tuple[int, int]) -> Any:
    """Sends itself a signal before a step of this start, counted from 1."""
    step, number = when

    def make(put_batch: Any) -> Any:
        calls = []

        def wrapped(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == step:
                os.kill(os.getpid(), number)
            return put_batch(*args)

        return wrapped

    return _replaced(train.loop, "put_batch", make)


def die_after_row(step: int) -> Any:
    """Dies as soon as the row of ``step`` is on file."""

    def make(write: Any) -> Any:
        def wrapped(self: Any, row: Any) -> None:
            write(self, row)
            if row["step"] == step:
                _die()

        return wrapped

    return _replaced(train.metrics.MetricsLog, "write", make)


def die_before_manifest(step: int) -> Any:
    """Dies when orbax has committed ``step`` and only the manifest is missing."""

    def make(write_manifest: Any) -> Any:
        def wrapped(directory: Path, record: dict[str, Any]) -> None:
            if record["step"] == step:
                _die()
            write_manifest(directory, record)

        return wrapped

    return _replaced(train.checkpoint, "write_manifest", make)


def die_in_save(when: tuple[int, float]) -> Any:
    """Dies some seconds after the save of a step began."""
    step, seconds = when

    def make(save: Any) -> Any:
        def wrapped(self: Any, at: int, *args: Any, **kwargs: Any) -> None:
            if at == step:
                threading.Thread(target=lambda: (time.sleep(seconds), _die()), daemon=True).start()
            save(self, at, *args, **kwargs)

        return wrapped

    return _replaced(train.checkpoint.CheckpointStore, "save", make)


def fill_disk(how: tuple[int, str]) -> Any:
    """Fills the run directory's disk but for some KiB: after the row of step 7, or in the save of step 8."""
    room, when = how

    def fill(workdir: Path) -> None:
        with open(workdir / "filler", "wb", buffering=0) as filler:
            with contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(1024))
            filler.truncate(max(0, filler.tell() - 1024 * room))

    def make_write(write: Any) -> Any:
        def wrapped(self: Any, row: Any) -> None:
            write(self, row)
            if row["step"] == 7:
                fill(self.path.parent)

        return wrapped

    def make_save(check_space: Any) -> Any:
        def wrapped(self: Any, step: int, state: Any) -> None:
            check_space(self, step, state)
            if step == 8:
                fill(self.directory.parent)

        return wrapped

    def make_manifest(write_manifest: Any) -> Any:
        def wrapped(directory: Path, record: dict[str, Any]) -> None:
            if record["step"] == 8:
                fill(directory.parent.parent)
            write_manifest(directory, record)

        return wrapped

    return {
        "row": lambda: _replaced(train.metrics.MetricsLog, "write", make_write),
        "save": lambda: _replaced(train.checkpoint.CheckpointStore, "_check_space", make_save),
        "manifest": lambda: _replaced(train.checkpoint, "write_manifest", make_manifest),
    }[when]()


def stall(phase: str) -> Any:
    """Hangs at start-up, at the third batch, in the third step, or in the save of step 12."""

    def make(original: Any) -> Any:
        calls = []

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if {"startup": True, "save": args[1:2] == (12,)}.get(phase, len(calls) == 3):
                time.sleep(600)
            return original(*args, **kwargs)

        return wrapped

    return _replaced(
        *{
            "startup": (train.loop, "open_inputs"),
            "data": (train.loop, "put_batch"),
            "step": (train.recorder.Recorder, "flush"),
            "save": (train.checkpoint.CheckpointStore, "save"),
        }[phase],
        make,
    )


def slow(seconds: float) -> Any:
    """Makes every step last that much longer."""

    def make(put_batch: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            time.sleep(seconds)
            return put_batch(*args)

        return wrapped

    return _replaced(train.loop, "put_batch", make)


POISON = 63


@functools.lru_cache(maxsize=8)
def _build_poisoned(*key: Any) -> Any:
    """``train.loop.build`` with a loss that is NaN for batches in which a row begins with POISON."""

    def make_loss(model_functions: Any) -> Any:
        def wrapped(config: Any) -> Any:
            functions = model_functions(config)

            def loss(params: Any, tokens: Any, segment_ids: Any, key: Any) -> Any:
                total, count = functions.loss(params, tokens, segment_ids, key)
                bad = jax.numpy.any(tokens[:, 0] == POISON)
                return jax.numpy.where(bad, jax.numpy.nan, 1.0) * total, count

            return functions._replace(loss=loss)

        return wrapped

    with _replaced(train.loop, "model_functions", make_loss):
        return _build(*key)


_build = train.loop.build.__wrapped__


@contextlib.contextmanager
def poison(batches: list[int]) -> Iterator[None]:
    """Makes the loss of the batches with these numbers NaN, wherever in the run they come."""

    def make_put(put_batch: Any) -> Any:
        def wrapped(batch: Any, parts: int, sharding: Any) -> Any:
            tokens = batch["tokens"].copy()
            tokens[:, 0] = POISON if batch.get("number") in batches else 0
            return put_batch(batch | {"tokens": tokens}, parts, sharding)

        return wrapped

    def make_loader(make: Any) -> Any:
        return lambda *args, **kwargs: _Numbered(make(*args, **kwargs))

    with (
        _replaced(train.loop, "build", lambda build: _build_poisoned),
        _replaced(train.loop, "put_batch", make_put),
        _replaced(train.loop, "make_loader", make_loader),
    ):
        yield


class _Numbered:
    """A loader whose batches carry their number."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    @property
    def step(self) -> int:
        return self._loader.step

    def __next__(self) -> Any:
        number = self._loader.step
        return next(self._loader) | {"number": number}

    def close(self) -> None:
        self._loader.close()


FAULTS = {
    "die_after_row": die_after_row,
    "die_before_manifest": die_before_manifest,
    "die_in_save": die_in_save,
    "fill_disk": fill_disk,
    "poison": poison,
    "signal_before_step": signal_before_step,
    "slow": slow,
    "stall": stall,
}
