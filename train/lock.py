"""One run at a time in a run directory; of several processes, process 0 holds it."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from train.errors import LockError, StorageError, UsageError

LOCK_FILE = ".lock"
_TOUCH_SECONDS = 30.0
_STALE_SECONDS = 600.0
_MAX_CHARACTERS = 1 << 16
_SHARED_SECONDS = 60.0


class RunLock:
    """Holds a run directory until closed or until the process dies, however it dies.

    On one machine the kernel lock decides: a dead owner holds nothing, so there is nothing to clean
    up. File systems shared by machines do not always carry kernel locks, so the owner also renews
    the file's time stamp; an owner on another machine that has not done so for ten minutes counts
    as dead.
    """

    def __init__(self, workdir: Path) -> None:
        """Takes the lock.

        Raises:
          LockError: naming the owner, if another process has it.
          StorageError: if the file cannot be written.
        """
        self._path = workdir / LOCK_FILE
        self._touched = time.monotonic()
        try:
            self._file = open(self._path, "a+")  # noqa: SIM115 (held open for the life of the run)
        except OSError as error:
            raise StorageError(f"{workdir} cannot be written: {error.strerror}") from None
        try:
            self._take(workdir)
        except BaseException:
            self._file.close()
            raise

    def _take(self, workdir: Path) -> None:
        owner = self._owner()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockError(f"{workdir} is in use by {_describe(owner)}; stop it or wait") from None
        age = time.time() - os.fstat(self._file.fileno()).st_mtime
        if owner.get("host") not in (None, socket.gethostname()) and age < _STALE_SECONDS:
            raise LockError(
                f"{workdir} is in use by {_describe(owner)}, seen {age:.0f} s ago; stop it, or wait until "
                f"it has not been seen for {_STALE_SECONDS:.0f} s"
            )
        self._file.seek(0)
        self._file.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}, self._file)
        self._file.flush()
        os.fsync(self._file.fileno())  # seen by other machines, see ``check_shared``

    def _owner(self) -> dict[str, Any]:
        self._file.seek(0)
        try:
            owner = json.loads(self._file.read(_MAX_CHARACTERS))
        except (ValueError, RecursionError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def check(self) -> None:
        """Renews the time stamp, at most twice a minute.

        Raises:
          StorageError: if the run directory has vanished.
        """
        if time.monotonic() - self._touched < _TOUCH_SECONDS:
            return
        self._touched = time.monotonic()
        self.check_present()
        os.utime(self._path)

    def check_present(self) -> None:
        """Checks that the lock on disk is still the one held.

        Raises:
          StorageError: if the run directory was removed or replaced.
        """
        try:
            same = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            raise StorageError(f"{self._path.parent} has vanished while the run was working in it")

    def close(self) -> None:
        """Gives the directory back."""
        if self._file.closed:
            return
        self._file.seek(0)
        self._file.truncate()
        self._file.close()


def read_lock(workdir: Path) -> str:
    """The owner of a run directory as its lock has it; "" without one."""
    try:
        with open(workdir / LOCK_FILE, "rb") as file:
            return file.read(_MAX_CHARACTERS).decode(errors="replace")
    except OSError:
        return ""


def check_shared(workdir: Path, lock: str, seconds: float = _SHARED_SECONDS) -> None:
    """Checks that this process sees the run directory that another has locked, not one of the same name.

    Args:
      workdir: run directory.
      lock: ``read_lock`` of the process that holds it.
      seconds: how long a network file system may take to show it.

    Raises:
      UsageError: if it is another directory.
    """
    deadline = time.monotonic() + seconds
    while read_lock(workdir) != lock:
        if time.monotonic() > deadline:
            raise UsageError(
                f"{workdir} on {socket.gethostname()} is not the directory that process 0 works in; "
                "several processes need a run directory that all of them see"
            )
        time.sleep(0.2)


def _describe(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}"
