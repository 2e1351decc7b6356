"""Checkpoints: asynchronous writes by orbax, committed by a hash manifest, verified before use.

``checkpoints/STEP/`` holds ``state`` (the train state), ``meta`` (plain values) and the manifest.
A step whose manifest is missing or does not hold is renamed ``STEP.bad-KIND`` and never used again;
the one before takes its place. Of several processes each writes what its devices hold, process 0 commits and
deletes, and each verifies its share of the files.
"""

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from train.errors import CheckpointError, ResumeError
from train.manifest import DamageError, read_manifest, sync_directory, verify, write_manifest
from train.processes import LONG_SECONDS, Processes
from train.run_config import CheckpointConfig
from train.sharding import path_name

_ITEMS = ("state", "meta")
_DELETING = ".deleting"
_OVERHEAD_BYTES = 1 << 18  # metadata and manifests of a small checkpoint
_SETTLE_TRIES, _SETTLE_SECONDS = 5, 0.2
_QUARANTINED = re.compile(r"(\d+)\.bad-")


class Restored(NamedTuple):
    """A restored checkpoint: its step, the state on the devices, and its plain values."""

    step: int
    state: Any
    meta: dict[str, Any]


class Quarantine(NamedTuple):
    """A step that was put aside: where to, and why."""

    step: int
    path: Path
    reason: str


class CheckpointStore:
    """Saves, verifies, restores and retains the checkpoints of one run.

    One save is in flight at a time. An error of a background save is raised by the next ``check``,
    ``save`` or ``wait``. The caller holds the run's lock. Several processes call all methods alike.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        on_quarantine: Callable[[Quarantine], None] = lambda entry: None,
        processes: Processes | None = None,
    ) -> None:
        """Opens or creates ``directory`` and clears what an interrupted save or deletion left.

        Args:
          directory: ``checkpoints`` of a run directory.
          config: what to keep.
          on_quarantine: told of every step that is put aside.
          processes: of the run.

        Raises:
          CheckpointError: if the directory cannot be used.
        """
        self.directory = directory
        self._config = config
        self._on_quarantine = on_quarantine
        self._processes = processes or Processes()
        self._save_failed = False
        self._processes.decide("opening the checkpoints", self._make_directory)
        try:
            # Retention is ours, as orbax would count a step that has no manifest; and nothing of a step
            # is read before it is verified.
            options = ocp.CheckpointManagerOptions(
                save_root_metadata=False, create=False, lightweight_initialize=True
            )
            self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_names=_ITEMS)
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be used: {error}") from None
        self._commits = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._commit: Future[None] | None = None

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be used: {error}") from None

    def steps(self) -> list[int]:
        """Steps on disk that are not quarantined, committed or not, ascending."""
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def quarantined(self) -> list[Path]:
        """Steps put aside."""
        return sorted(path for path in self.directory.iterdir() if _QUARANTINED.match(path.name))

    def save(self, step: int, state: Any, meta: dict[str, Any], metric: float | None = None) -> None:
        """Starts saving; returns as soon as the arrays are copied off the devices.

        Args:
          step: must be new.
          state: tree of arrays.
          meta: plain JSON values.
          metric: held-out loss at this step, lower is better; None if it was not measured.

        Raises:
          CheckpointError: if this or the previous save failed.
        """
        self.wait()
        self._check_space(step, state)
        meta = meta | {"arrays": describe_arrays(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._failed(step, error) from error
        self._commit = self._commits.submit(self._finish, step, metric)

    def check(self) -> None:
        """Raises the error of a background save that has failed meanwhile."""
        if self._commit is not None and self._commit.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is committed.

        Raises:
          CheckpointError: if it failed.
        """
        commit, self._commit = self._commit, None
        if commit is not None:
            commit.result()

    def close(self) -> None:
        """Waits for the last save and stops the background thread."""
        try:
            self.wait()
        finally:
            self._commits.shutdown()
            # After a failed save orbax raises its error once more here.
            with contextlib.suppress(Exception) if self._save_failed else contextlib.nullcontext():
                self._manager.close()

    def candidates(self) -> Iterator[int]:
        """Steps that verify, newest first; those that do not are quarantined on the way."""
        for step in reversed(self._processes.decide("listing the checkpoints", self.steps)):
            damage = self._damage(step)
            if damage is None:
                yield step
            else:
                self.quarantine(step, *damage)

    def _damage(self, step: int) -> tuple[str, str] | None:
        """(kind, detail) of the first damage that any process finds in its share of a step's files."""
        own = None
        try:
            verify(self._path(step), (self._processes.index, self._processes.count))
        except DamageError as damage:
            own = [damage.kind, str(damage)]
        found = [entry for entry in self._processes.exchange("verifying a checkpoint", own) if entry]
        return (found[0][0], found[0][1]) if found else None

    def read_meta(self, step: int) -> dict[str, Any]:
        """The plain values of a verified step."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args).meta

    def restore(self, step: int, shapes: Any, shardings: Any) -> Restored:
        """Loads a verified step onto any mesh.

        Args:
          step: one of ``candidates``.
          shapes: tree of ``jax.ShapeDtypeStruct``.
          shardings: the same tree of shardings.

        Raises:
          ResumeError: if names, shapes or dtypes differ from those saved (orbax would cast silently).
          CheckpointError: if orbax cannot read what verified.
        """
        meta = self.read_meta(step)
        compare_arrays(meta["arrays"], describe_arrays(shapes), self._path(step))
        target = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            state = self._manager.restore(step, args=args).state
        except Exception as error:
            raise CheckpointError(
                f"{self._path(step)} is intact but cannot be restored: {_one_line(error)}"
            ) from error
        return Restored(step, state, meta)

    def quarantine(self, step: int, kind: str, reason: str) -> Quarantine:
        """Renames a step so that it is neither read nor in the way of a new save."""

        def put_aside() -> str:
            target = self.directory / f"{step}.bad-{kind}"
            number = 2
            while target.exists():
                target = self.directory / f"{step}.bad-{kind}-{number}"
                number += 1
            self._path(step).rename(target)
            sync_directory(self.directory)
            return target.name

        target = self.directory / self._processes.decide("putting a checkpoint aside", put_aside)
        # Without this the manager still lists the step and would refuse to save it again.
        self._manager.reload()
        entry = Quarantine(step, target, reason)
        self._on_quarantine(entry)
        return entry

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _finish(self, step: int, metric: float | None) -> None:
        """In the background: waits for orbax, writes the manifest, deletes what need not be kept.

        Orbax is done in process 0 only when it is in all. A failure in one ends all (``train.processes``), so
        the others may wait for the manifest without a limit.
        """
        try:
            self._manager.wait_until_finished()
            if self._processes.primary:
                write_manifest(self._path(step), {"step": step, "metric": metric})
        except Exception as error:
            raise self._failed(step, error) from error
        self._processes.exchange("the commit of a checkpoint", None, LONG_SECONDS)
        if self._processes.primary:
            self._delete_old()

    def _check_space(self, step: int, state: Any) -> None:
        """A full disk in the middle of a save is handled, but refusing beforehand is cleaner."""
        try:
            free = shutil.disk_usage(self.directory).free
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be used: {error}") from None
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OVERHEAD_BYTES
        if size > free:
            raise CheckpointError(
                f"checkpoint {step} could not be written: No space left on device: it needs up to "
                f"{size / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free; those before it are intact"
            )

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        """Removes what a failed save has written; its writers may still be at work for a moment."""
        self._save_failed = True
        for _ in range(_SETTLE_TRIES if self._processes.primary else 0):
            self._clear_leftovers()
            if self._path(step).exists():
                self._delete(step)
            time.sleep(_SETTLE_SECONDS)
        return CheckpointError(
            f"checkpoint {step} could not be written: {_one_line(error)}; those before it are intact"
        )

    def _delete_old(self) -> None:
        committed: dict[int, float | None] = {}
        for step in self.steps():
            try:
                committed[step] = read_manifest(self._path(step))[0]["metric"]
            except DamageError:
                continue  # judged, and put aside if need be, when it is a candidate
        for step in committed.keys() - steps_to_keep(committed, self._config):
            self._delete(step)

    def _delete(self, step: int) -> None:
        # Renamed first: a deletion that is cut short must not leave half a checkpoint.
        doomed = self.directory / f"{step}{_DELETING}"
        self._path(step).rename(doomed)
        self._manager.reload()
        shutil.rmtree(doomed, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        for path in self.directory.iterdir():
            if ".orbax-checkpoint-tmp" in path.name or path.name.endswith(_DELETING):
                shutil.rmtree(path, ignore_errors=True)


def steps_to_keep(committed: dict[int, float | None], config: CheckpointConfig) -> set[int]:
    """The steps that retention keeps: the latest, the best by held-out loss, and the regular ones.

    Args:
      committed: committed steps and their metric (None: not measured).
      config: ``keep_latest`` >= 1, so the newest committed step is always kept.
    """
    keep = set(sorted(committed)[-config.keep_latest :])
    measured = [(metric, step) for step, metric in committed.items() if metric is not None]
    keep.update(step for _, step in sorted(measured)[: config.keep_best])
    if config.keep_every_steps:
        keep.update(step for step in committed if step and step % config.keep_every_steps == 0)
    return keep


def describe_arrays(tree: Any) -> dict[str, str]:
    """Dotted name of every array -> its dtype and shape."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def compare_arrays(saved: dict[str, str], wanted: dict[str, str], where: Path) -> None:
    """Checks that a checkpoint holds exactly the arrays that are wanted.

    Raises:
      ResumeError: with the first few differences.
    """
    lines = [
        f"{name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if lines:
        more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise ResumeError(f"{where} holds other arrays than this configuration: {'; '.join(lines[:4])}{more}")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-160:]}"
