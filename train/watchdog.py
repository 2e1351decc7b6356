"""Ends a process that hangs, with all stacks, instead of letting it hold its devices for days."""

import faulthandler
import sys
from typing import IO

from train.run_config import WatchdogConfig


class Watchdog:
    """A time limit on the current phase: start-up, step, save.

    The timer is a C thread that needs no interpreter lock, so it also fires while native code hangs
    holding it. On expiry every thread's stack goes to stderr and the process exits with code 1.
    """

    def __init__(self, config: WatchdogConfig, stream: IO[str] | None = None) -> None:
        self._limits = {
            "startup": config.startup_seconds,
            "step": config.step_seconds,
            "save": config.save_seconds,
        }
        self._stream = stream or sys.__stderr__ or sys.stderr

    def arm(self, phase: str) -> None:
        """Starts the limit of a phase anew; whatever ran before is over."""
        limit = self._limits[phase]
        if limit:
            faulthandler.dump_traceback_later(limit, exit=True, file=self._stream)
        else:
            faulthandler.cancel_dump_traceback_later()

    def disarm(self) -> None:
        """No limit until the next ``arm``."""
        faulthandler.cancel_dump_traceback_later()
