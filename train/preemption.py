"""Signals that ask a run to stop: all finish the same step, save, exit; a second Ctrl-C exits at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from train.errors import EXIT_INTERRUPTED
from train.processes import Processes

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STOP = "holo/stop"


class StopRequest:
    """Whether a signal asked to stop, and which."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.signal_name = ""

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self, signal_name: str) -> None:
        """Asks to stop after the current step."""
        if not self._event.is_set():
            self.signal_name = signal_name
            self._event.set()

    def reached(self) -> bool:
        """Whether to stop here; asked once a step."""
        return bool(self)


class AgreedStop(StopRequest):
    """A stop that one process asks for and all make after the same step.

    The first request reaches a thread of every process. These threads meet while no process can begin another
    step, and agree on the furthest step that any has begun, which all can still do. It takes no time while
    nobody asks, and no device.
    """

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self._processes = processes
        self._lock = threading.Lock()
        self._asked = 0  # calls of ``reached`` that let the run go on; equal in all at the same step
        self._until: int | None = None
        processes.watch(_STOP, self._agree)

    def set(self, signal_name: str) -> None:
        """Asks all to stop."""
        self._processes.tell(_STOP, signal_name)

    def reached(self) -> bool:
        """Whether to stop here, the same in all processes."""
        with self._lock:
            if self._until is not None and self._asked >= self._until:
                self._event.set()
                return True
            self._asked += 1
            return False

    def _agree(self, signal_name: str) -> None:
        with self._lock:
            self._until = max(self._processes.exchange("the stop", self._asked))
            self.signal_name = signal_name


@contextlib.contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[None]:
    """Turns SIGTERM and SIGINT into ``request``; a second SIGINT ends the process with code 130.

    A thread reads the signals from a pipe that the C-level handler writes, so they are seen while
    the main thread is inside a long compilation or a save. Ending at once is as safe as ``kill -9``:
    a checkpoint counts only once its manifest is in place.

    Outside the main thread Python allows no handlers; there the caller stops a run by ``request.set``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_watch, args=(reader, request), name="signals", daemon=True)
    thread.start()
    previous = {number: signal.signal(number, _ignore) for number in _SIGNALS}
    previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(writer)
        thread.join()
        os.close(reader)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Keeps the default action away; the pipe carries the signal."""


def _watch(reader: int, request: StopRequest) -> None:
    interrupts = 0
    while data := os.read(reader, 64):
        for number in data:
            if number == signal.SIGINT:
                interrupts += 1
            if interrupts > 1:
                print("interrupted twice: exiting at once", file=sys.stderr, flush=True)
                os._exit(EXIT_INTERRUPTED)
            if number in _SIGNALS:
                request.set(signal.Signals(number).name)
