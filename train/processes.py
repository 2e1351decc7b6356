"""Several processes that train as one: process 0 decides and writes, all agree, and none is left waiting.

Everything goes through the key-value store of JAX's coordination service, not through devices: it works
before the first compilation, in background threads, and with a time limit. A process alone does none of it.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed  # the store has no public name yet; orbax takes it from here too

from train.errors import EXIT_FAILED, TrainError

T = TypeVar("T")

LONG_SECONDS = 20 * 86400.0  # no limit: within the 32 bits of the store's milliseconds
_MEETING_SECONDS = 600.0
_FAREWELL_SECONDS = 5.0
_LEAVING_SECONDS = 1.0
_FAILURE = "holo/failure"


class Elsewhere(TrainError):
    """An error of another process; the message names it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Processes:
    """The processes of a run, as one of them sees them.

    All call the same methods in the same order, with the same ``what``, which a message names.

    Attributes:
      index, count: which process this is, of how many.
      primary: whether it is process 0, the only one that writes into the run directory and speaks.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        """Args: seconds: how long a meeting may take; 0 for ten minutes."""
        self.index, self.count = jax.process_index(), jax.process_count()
        self.primary = self.index == 0
        self._seconds = seconds or _MEETING_SECONDS
        self._store: Any = distributed.global_state.client
        self._meetings: dict[str, int] = {}
        self._watches: dict[str, threading.Thread] = {}
        self._last: list[Callable[[], None]] = []

    def exchange(self, what: str, value: Any, seconds: float | None = None) -> list[Any]:
        """Everyone's plain value, in the order of the processes; returns when all have come.

        Raises:
          TrainError: naming those that did not come within ``seconds``.
        """
        if self.count == 1:
            return [value]
        number = self._meetings[what] = self._meetings.get(what, 0) + 1
        limit = self._seconds if seconds is None else seconds
        place = f"holo/{what}/{number}/"
        try:
            self._store.key_value_set(f"{place}{self.index}", json.dumps(value))
            self._store.wait_at_barrier(place, int(limit * 1000))
            found = self._at(place)
            if self.primary and number > 1:  # whoever has come here has read what was said the last time
                self._store.key_value_delete(f"holo/{what}/{number - 1}/")
        except jax.errors.JaxRuntimeError as error:
            raise TrainError(self._absent(what, place, limit, error)) from error
        return [found[index] for index in range(self.count)]

    def together(self, what: str, action: Callable[[], T]) -> T:
        """Runs ``action`` everywhere; returns this process's result once all have succeeded.

        Raises:
          TrainError: everywhere, if it failed anywhere: its own error, or that of the first that failed.
        """
        return self._shared(what, action, lambda result: None)[0]

    def decide(self, what: str, action: Callable[[], T]) -> T:
        """Runs ``action`` in process 0 and returns its result, plain JSON, everywhere.

        Raises:
          TrainError: everywhere, if it failed.
        """
        if self.count == 1:
            return action()
        return self._shared(what, action if self.primary else lambda: None, lambda result: result)[1][0]

    def in_turn(self, what: str, action: Callable[[], T]) -> T:
        """``together``, but process 0 first: what it leaves on disk spares the others work."""
        own = self.together(what, action if self.primary else lambda: None)
        return self.together(what, action if own is None else lambda: own)

    def watch(self, key: str, action: Callable[[str], None]) -> None:
        """Has a thread wait for what some process tells under ``key``, and hand it to ``action``."""

        def wait() -> None:
            while True:
                try:
                    value = self._store.blocking_key_value_get(key, int(LONG_SECONDS * 1000))
                except jax.errors.JaxRuntimeError as error:
                    if "DEADLINE_EXCEEDED" in str(error):
                        continue
                    return
                if value:
                    action(value)
                return

        self._watches[key] = threading.Thread(target=wait, name=key, daemon=True)
        self._watches[key].start()

    def tell(self, key: str, value: str) -> bool:
        """Tells all who watch ``key``; False if somebody else was first, or nobody can be reached."""
        try:
            self._store.key_value_set(key, value)
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def at_end(self, action: Callable[[], None]) -> None:
        """Has ``action`` run before another process's failure ends this one, whose stack is not unwound."""
        self._last.append(action)

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """A failure inside, in any process, ends all: with its message, and at once.

        Without it the others would wait in a collective operation for a process that has left.

        Raises:
          TrainError: instead of JAX's own error, when a process cannot reach another that has died.
        """
        if self.count == 1:
            yield
            return
        self.watch(_FAILURE, self._end)
        try:
            yield
            # Process 0 may still be summing up.
            self.exchange("the end", None, LONG_SECONDS)
        except jax.errors.JaxRuntimeError as error:
            failure = TrainError(
                "the devices failed, or another process has died: "
                f"{' '.join(str(error).split())[:300]}; start all again to go on from the last checkpoint"
            )
            self._farewell(failure)
            raise failure from error
        except BaseException as error:
            if getattr(error, "known_to_all", False):
                self._close()
            else:
                self._farewell(error)
            raise
        self._close()

    def _shared(self, what: str, action: Callable[[], T], told: Callable[[T], Any]) -> tuple[T, list[Any]]:
        """(own result, what everyone told of theirs)."""
        if self.count == 1:
            result = action()
            return result, [told(result)]
        own: TrainError | None = None
        said: dict[str, Any] = {}
        try:
            result = action()
            said = {"value": told(result)}
        except TrainError as error:
            own, said = error, {"failed": [str(error), error.exit_code]}
        answers = self.exchange(what, said)
        failures = [(index, answer["failed"]) for index, answer in enumerate(answers) if "failed" in answer]
        if failures:
            index, (text, code) = failures[0]
            failure = own or Elsewhere(f"process {index} of {self.count}: {text}", code)
            failure.known_to_all = True
            raise failure
        return result, [answer["value"] for answer in answers]

    def _close(self) -> None:
        """Ends the watching threads; everyone is still there."""
        for key, thread in self._watches.items():
            if self.primary:
                self.tell(key, "")
            thread.join()

    def _at(self, place: str) -> dict[int, Any]:
        said = self._store.key_value_dir_get(place)
        return {int(key.rpartition("/")[2]): json.loads(value) for key, value in said}

    def _absent(self, what: str, place: str, limit: float, error: Exception) -> str:
        if "DEADLINE_EXCEEDED" not in str(error):
            return f"{what} was cut: another process has died ({' '.join(str(error).split())[:200]})"
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            missing = ", ".join(str(i) for i in sorted(set(range(self.count)) - self._at(place).keys()))
            return f"{what}: process {missing} of {self.count} did not come within {limit:.0f} s"
        return f"{what}: not all of {self.count} processes came within {limit:.0f} s"

    def _farewell(self, error: BaseException) -> None:
        """Tells the others why this process ends, and waits a moment for them to have heard it."""
        text = str(error) if isinstance(error, TrainError) else f"{type(error).__name__}: {error}"
        code = getattr(error, "exit_code", EXIT_FAILED)
        if not self.tell(_FAILURE, json.dumps([self.index, " ".join(text.split()), code])):
            time.sleep(3 * _FAREWELL_SECONDS)  # another failed first, and ``_end`` is about to say so
            return
        deadline = time.monotonic() + _FAREWELL_SECONDS
        for other in set(range(self.count)) - {self.index}:
            self._await(f"{_FAILURE} heard/{other}", deadline - time.monotonic())
        self.tell(f"{_FAILURE} heard/{self.index}", "heard")
        if self.primary:
            time.sleep(_LEAVING_SECONDS)  # the store ends with it, and JAX aborts whoever is still there

    def _end(self, told: str) -> None:
        index, text, code = json.loads(told)
        if index == self.index:
            return
        print(f"train.main: process {index} of {self.count}: {text}", file=sys.stderr, flush=True)
        self.tell(f"{_FAILURE} heard/{self.index}", "heard")
        if self.primary:  # the store ends with process 0, and would take those that still use it along
            self._await(f"{_FAILURE} heard/{index}", 2 * _FAREWELL_SECONDS)
        for action in self._last:
            with contextlib.suppress(OSError):
                action()
        os._exit(code)

    def _await(self, key: str, seconds: float) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.blocking_key_value_get(key, max(1, int(1000 * seconds)))


def sign(error: TrainError) -> str:
    """The error in one line, signed with the process that reports it if there are several."""
    text = " ".join(str(error).split())
    if not jax.distributed.is_initialized() or isinstance(error, Elsewhere):
        return text
    state = distributed.global_state
    return f"process {state.process_id} of {state.num_processes}: {text}"


def leave(code: int, *, alone: bool) -> NoReturn:
    """Ends this process; ``alone``, without meeting the others once more, who may be gone."""
    if jax.distributed.is_initialized():
        if alone:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        jax.distributed.shutdown()
    sys.exit(code)
