"""Training, top to bottom: mesh, data, model, sharding, restore, step, evaluation, save."""

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from holo_jax.config import HoloConfig
from holo_jax.exchange import Exchange
from holo_jax.model import count_parameters
from holo_jax.pretrained import TOKENIZER
from train.checkpoint import CheckpointStore
from train.corpus.dataset import Record
from train.corpus.tokenizers import save_tokenizer
from train.data import Loader, make_loader
from train.decisions import Rollback, batch_of_step, before, read_rollbacks
from train.errors import StorageError
from train.evaluate import check_heldout, heldout_batches, mean_loss
from train.inputs import Inputs, open_inputs
from train.lock import RunLock, check_shared, read_lock
from train.metrics import MetricsLog, Unrecorded
from train.model_functions import ModelFunctions, model_functions
from train.optimizer import learning_rate_schedule, make_optimizer
from train.preemption import AgreedStop, StopRequest, stop_on_signals
from train.processes import Processes
from train.progress import ProgressDisplay
from train.recorder import Recorder, RollbackNeeded
from train.resume import CHECKPOINT_DIRECTORY, check_identity, check_same_request, restore_newest
from train.rollback import decide_rollback
from train.run_config import OptimizerConfig, RunConfig
from train.sharding import (
    batch_sharding,
    check_batch,
    check_model,
    check_processes,
    local_rows,
    make_mesh,
    put_batch,
    replicated,
)
from train.step import StepFunctions, TrainState, make_step_functions
from train.summary import summarize
from train.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call of ``train`` ended.

    Attributes:
      step: steps done.
      stopped_by: name of the signal that stopped it early, "" if it finished.
      summary: what ``summary.json`` holds; empty if it was stopped.
    """

    step: int
    stopped_by: str
    summary: dict[str, Any]


def train(
    config: RunConfig,
    workdir: Path,
    *,
    accept: Collection[str] = (),
    devices: Sequence[jax.Device] | None = None,
    stop: StopRequest | None = None,
    display: ProgressDisplay | None = None,
) -> Result:
    """Trains until ``config.num_steps``, from where ``workdir`` stands.

    Args:
      config: the run.
      workdir: run directory; created if it does not exist.
      accept: names of configuration fields or sections that may differ from the run's.
      devices: all by default.
      stop: set it to stop after the current step; signals set it too.
      display: what a person sees.

    Raises:
      UsageError: before anything is written, if configuration, data, mesh and run directory do not fit.
      TrainError: if the run cannot go on; what was committed is intact.
    """
    watchdog = Watchdog(config.watchdog)
    watchdog.arm("startup")
    processes = Processes(config.watchdog.startup_seconds / 2)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(processes.ending_together())
            mesh = processes.together("checking the mesh", lambda: _check_mesh(config, devices))
            inputs = processes.in_turn("opening the data", lambda: open_inputs(config))
            functions, steps = processes.together("the model", lambda: _check_sizes(config, mesh, inputs))
            check_same_request(processes, {"config": config.to_dict(), "data": inputs.identity})
            changes = processes.decide(
                "comparing with the run directory",
                lambda: check_identity(workdir, config, inputs.identity, accept),
            )
            if display is None:
                display = ProgressDisplay(
                    config.num_steps,
                    config.tokens_per_step,
                    config.log.every_steps,
                    quiet=not processes.primary,
                )
            if stop is None:
                stop = StopRequest() if processes.count == 1 else AgreedStop(processes)
            stack.enter_context(stop_on_signals(stop))
            run = _open_run(
                stack, config, workdir, mesh, inputs, functions, steps, watchdog, display, stop, processes
            )
            for change in changes:
                display.message(f"accepted change of {change}")
            return _run(run)
    finally:
        watchdog.disarm()


def _check_mesh(config: RunConfig, devices: Sequence[jax.Device] | None) -> Mesh:
    mesh = make_mesh(config.mesh, devices)
    check_processes(mesh)
    check_batch(mesh, config.global_batch_size, config.accumulation_steps, config.context_length)
    return mesh


def _check_sizes(config: RunConfig, mesh: Mesh, inputs: Inputs) -> tuple[ModelFunctions, StepFunctions]:
    check_heldout(inputs.heldout, config.eval.num_batches, config.eval.global_batch_size)
    check_batch(mesh, config.eval.global_batch_size, 1, inputs.heldout.context_length)
    for length in (config.context_length, inputs.heldout.context_length):
        check_model(mesh, config.model, length)
    return build(config.model, config.optimizer, config.num_steps, mesh, config.mesh.exchange)


# ``eval.scaling`` has some thirty of them at one time.
@functools.lru_cache(maxsize=64)
def build(
    model: HoloConfig,
    optimizer: OptimizerConfig,
    num_steps: int,
    mesh: Mesh,
    exchange: Exchange = Exchange(),  # noqa: B008 (frozen)
) -> tuple[ModelFunctions, StepFunctions]:
    """The model and its jitted steps; the same objects, compiled once, for the same arguments."""
    functions = model_functions(model)
    schedule = learning_rate_schedule(optimizer, num_steps)
    update = make_optimizer(optimizer, num_steps, functions.axes)
    return functions, make_step_functions(functions, update, schedule, mesh, exchange)


@dataclasses.dataclass
class _Run:
    """What the stages of one call of ``train`` share."""

    config: RunConfig
    workdir: Path
    mesh: Mesh
    inputs: Inputs
    functions: ModelFunctions
    steps: StepFunctions
    watchdog: Watchdog
    display: ProgressDisplay
    stop: StopRequest
    processes: Processes
    lock: RunLock | None
    store: CheckpointStore
    rollbacks: list[Rollback]


def _open_run(
    stack: contextlib.ExitStack,
    config: RunConfig,
    workdir: Path,
    mesh: Mesh,
    inputs: Inputs,
    functions: ModelFunctions,
    steps: StepFunctions,
    watchdog: Watchdog,
    display: ProgressDisplay,
    stop: StopRequest,
    processes: Processes,
) -> _Run:
    """Takes the run directory: lock, configuration, checkpoints."""
    lock = None

    def take() -> str:
        nonlocal lock
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = RunLock(workdir)
            stack.callback(lock.close)
            processes.at_end(lock.close)
            config.write(workdir, inputs.identity)
            if inputs.tokenizer is not None:
                save_tokenizer(inputs.tokenizer, workdir / TOKENIZER)
        except OSError as error:
            raise StorageError(f"{workdir} cannot be written: {error.strerror}") from None
        return read_lock(workdir)

    owner = processes.decide("taking the run directory", take)
    processes.together("looking for the run directory", lambda: check_shared(workdir, owner))
    store = CheckpointStore(
        workdir / CHECKPOINT_DIRECTORY,
        config.checkpoint,
        lambda entry: display.message(f"checkpoint {entry.step} put aside as {entry.path}: {entry.reason}"),
        processes,
    )
    stack.push(lambda kind, error, trace: _close(store, processes, error))
    stack.callback(display.close)
    rollbacks = [
        Rollback(**values)
        for values in processes.decide(
            "reading the rollbacks", lambda: [dataclasses.asdict(entry) for entry in read_rollbacks(workdir)]
        )
    ]
    return _Run(
        config,
        workdir,
        mesh,
        inputs,
        functions,
        steps,
        watchdog,
        display,
        stop,
        processes,
        lock,
        store,
        rollbacks,
    )


def _close(store: CheckpointStore, processes: Processes, error: BaseException | None) -> None:
    """Waits for the last save, unless an error of this process has to end the others first."""
    if error is None or processes.count == 1 or getattr(error, "known_to_all", False):
        store.close()


def _run(run: _Run) -> Result:
    """Restores and trains, as often as a rollback asks for it; then sums up."""
    config = run.config
    while True:
        state = _start(run)
        step = int(state.step)
        log = _open_log(run, step)
        if missing := log.missing_steps(step):
            run.display.message(f"warning: {log.path} lacks {missing} of the first {step} steps")
        try:
            state = _train_steps(run, state, log)
            break
        except RollbackNeeded as needed:
            run.watchdog.arm("save")
            decide_rollback(
                run.workdir,
                run.store,
                run.rollbacks,
                config.guard,
                needed.step,
                run.display.message,
                run.processes,
            )
        finally:
            log.close()
    step = int(state.step)
    run.watchdog.arm("save")
    run.store.wait()
    if run.stop and step < config.num_steps:
        run.display.message(f"stopped by {run.stop.signal_name} after step {step}; start again to go on")
        return Result(step, run.stop.signal_name, {})
    run.watchdog.disarm()
    run.display.close()
    summary = summarize(
        run.config,
        run.workdir,
        run.inputs,
        run.functions,
        run.steps,
        run.mesh,
        state.params,
        run.display.message,
        run.processes.primary,
    )
    return Result(step, "", summary)


def _open_log(run: _Run, step: int) -> MetricsLog:
    if not run.processes.primary:
        return Unrecorded()
    return MetricsLog(run.workdir, step, tensorboard=run.config.log.tensorboard)


def _start(run: _Run) -> TrainState:
    """The state to go on from: the newest good checkpoint, or a new one, committed as step 0."""
    run.watchdog.arm("startup")
    steps = run.steps
    restored = restore_newest(
        run.workdir, run.store, run.rollbacks, steps.shapes, steps.shardings, run.processes
    )
    if restored is not None:
        run.display.message(f"going on from checkpoint {restored.step} in {run.workdir}")
        return restored.state
    parameters = count_parameters(steps.shapes.params)
    run.display.message(f"new run in {run.workdir}: {parameters:,} parameters on {_where(run)}")
    seed = np.asarray(jax.random.key_data(jax.random.key(run.config.seed, impl="threefry2x32")))
    state = steps.init(jax.device_put(seed, replicated(run.mesh)))
    run.store.save(0, state, _meta(run, 0, 0))
    run.store.wait()
    return state


def _where(run: _Run) -> str:
    many = f" of {run.processes.count} processes" if run.processes.count > 1 else ""
    return f"{run.mesh.size} device(s){many}"


def _train_steps(run: _Run, state: TrainState, log: MetricsLog) -> TrainState:
    """Steps until the end or a stop, with evaluations and checkpoints on the way."""
    config, steps, rows_at = run.config, run.steps, batch_sharding(run.mesh)
    first = int(state.step)
    recorder = Recorder(config.guard, log, run.display)
    run.display.start(first)
    save_owed = False
    with contextlib.ExitStack() as stack:
        loader = stack.enter_context(contextlib.closing(_loader(run, first)))
        for step in range(first, config.num_steps):
            if loader.step != batch_of_step(step, run.rollbacks):
                loader = stack.enter_context(contextlib.closing(_loader(run, step)))
            number = loader.step
            run.watchdog.arm("startup" if step == first else "step")
            batch = put_batch(next(loader), config.accumulation_steps, rows_at)
            with jax.transfer_guard("disallow"):
                state, metrics = steps.train(state, batch)
            # The device works on this step while the host records the one before.
            recorder.flush()
            recorder.pending = (step + 1, number, metrics)

            done, last = step + 1, step + 1 == config.num_steps
            extra = {}
            if last or (config.eval.every_steps and done % config.eval.every_steps == 0):
                extra["heldout_loss"] = _heldout_loss(run, state)
            save_owed = save_owed or done % config.checkpoint.every_steps == 0
            stopping = run.stop.reached()
            if extra or save_owed or last or stopping:
                nonfinite_run = recorder.flush(extra)
                stopping = stopping or run.stop.reached()
                # In a run of skipped steps a periodic save waits, so that there is a state from before it.
                if last or stopping or (save_owed and not nonfinite_run):
                    _save(run, state, done, nonfinite_run, extra.get("heldout_loss"), log)
                    save_owed = False
            run.store.check()
            if run.lock is not None:
                run.lock.check()
            if stopping:
                break
    return state


def _loader(run: _Run, step: int) -> Loader:
    """Batches from the one that the step after ``step`` done ones reads."""
    return make_loader(
        run.inputs.train,
        seed=run.config.seed,
        global_batch_size=run.config.global_batch_size,
        start_step=batch_of_step(step, run.rollbacks),
        rows=_rows(run, run.config.global_batch_size, run.config.accumulation_steps),
        num_threads=run.config.data.num_threads,
    )


def _rows(run: _Run, global_batch_size: int, accumulation_steps: int = 1) -> list[int] | None:
    """The rows of each batch that this process reads; None for all."""
    if run.processes.count == 1:
        return None
    return local_rows(batch_sharding(run.mesh), global_batch_size, accumulation_steps)


def _heldout_loss(run: _Run, state: TrainState) -> float:
    evaluation = run.config.eval

    def batches() -> Iterator[Record]:
        size = evaluation.global_batch_size
        for batch in heldout_batches(run.inputs.heldout, evaluation.num_batches, size, _rows(run, size)):
            run.watchdog.arm("step")
            yield batch

    return mean_loss(run.steps.evaluate, state.params, batches(), batch_sharding(run.mesh))


def _meta(run: _Run, step: int, nonfinite_run: int) -> dict[str, Any]:
    """What a checkpoint says besides its arrays."""
    return {
        "config": run.config.to_dict(),
        "data": run.inputs.identity,
        "next_batch": batch_of_step(step, run.rollbacks),
        "rollbacks": before(step, run.rollbacks),
        "nonfinite_run": nonfinite_run,
    }


def _save(
    run: _Run, state: TrainState, step: int, nonfinite_run: int, metric: float | None, log: MetricsLog
) -> None:
    """Starts saving a checkpoint; the record of the steps it covers is on disk before it can be committed."""
    run.watchdog.arm("save")
    log.sync()
    if run.lock is not None:
        run.lock.check_present()
    run.store.save(step, state, _meta(run, step, nonfinite_run), metric)
