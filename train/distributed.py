"""How a process joins the others of its run: by flags, by the environment, or as SLURM and Open MPI tell JAX.

    python -m train.main --config=... --coordinator=HOST:PORT --num_processes=2 --process_id=0

``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` say the same. Under ``srun`` and
``mpirun`` none is needed. With none given, and no scheduler that has started several, a process is alone.
"""

import dataclasses
import os
import sys
import threading
from collections.abc import Mapping

import jax

from train.errors import EXIT_FAILED, UsageError

_VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# What marks a step of a scheduler that JAX can ask for what is not given, and the number of its processes.
_SCHEDULERS = {"SLURM_STEP_NODELIST": "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri": "OMPI_COMM_WORLD_SIZE"}
_CONNECT_SECONDS = 300.0


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among the others. None: JAX asks the scheduler."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None

    def __str__(self) -> str:
        named = self.process_id is not None and self.num_processes is not None
        return f"process {self.process_id} of {self.num_processes}" if named else "this process"


def find_place(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str] = os.environ,
) -> Place | None:
    """What flags, environment and scheduler say, in this order of precedence; None for a process on its own.

    Raises:
      UsageError: naming what is missing, malformed or out of range.
    """
    given = {
        "coordinator": coordinator or environment.get(_VARIABLES["coordinator"]) or None,
        "num_processes": _number("num_processes", num_processes, environment),
        "process_id": _number("process_id", process_id, environment),
    }
    scheduled = _scheduled(environment)
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given) and scheduled < 2:
        return None
    if missing and scheduled < 2:
        names = " and ".join(f"--{name} (or {_VARIABLES[name]})" for name in missing)
        raise UsageError(f"{names} must be given too: several processes need all of {', '.join(given)}")
    place = Place(**given)  # type: ignore[arg-type]
    count = place.num_processes
    last = (count or scheduled) - 1
    if count is not None and count < 1:
        raise UsageError(f"num_processes is {count}; it must be positive")
    if place.process_id is not None and not 0 <= place.process_id <= last:
        raise UsageError(f"process_id is {place.process_id}; it must be from 0 to num_processes - 1 = {last}")
    if place.coordinator is not None:
        host, _, port = place.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UsageError(
                f"coordinator is {place.coordinator!r}; it must be HOST:PORT, a free port of process 0's host"
            )
    return None if count == 1 else place


def join(place: Place | None, seconds: float = 0.0) -> None:
    """Connects to the other processes of the run; to be called before any device is used.

    Whoever does not meet all of them in ``seconds`` (0, or more than that: five minutes) says so and exits.

    Raises:
      UsageError: if the scheduler's description does not suffice, or the coordinator's port is taken.
    """
    if place is None:
        return
    limit = min(seconds or _CONNECT_SECONDS, _CONNECT_SECONDS)
    # Its handler would swallow SIGTERM until ours is there; stops are agreed on by ``train.preemption``.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX itself ends a process that waits in vain by an abort and a stack trace.
    alarm = threading.Timer(limit, _give_up, (place, limit))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            initialization_timeout=int(limit) + 60,
        )
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise UsageError(f"{place} cannot join the others: {' '.join(str(error).split())}") from error
    finally:
        alarm.cancel()


def _give_up(place: Place, limit: float) -> None:
    where = f" at {place.coordinator}" if place.coordinator else ""
    print(
        f"train.main: {place}: not all processes met{where} within {limit:.0f} s; start all of them, "
        "with one coordinator that every host can reach",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_FAILED)


def _number(name: str, flag: int | None, environment: Mapping[str, str]) -> int | None:
    text = environment.get(_VARIABLES[name])
    if flag is not None or not text:
        return flag
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{_VARIABLES[name]} is {text!r}; it must be a whole number") from None


def _scheduled(environment: Mapping[str, str]) -> int:
    """How many processes a scheduler has started; 1 without one."""
    for marker, number in _SCHEDULERS.items():
        if marker in environment and environment.get(number, "").isdecimal():
            return int(environment[number])
    return 1
