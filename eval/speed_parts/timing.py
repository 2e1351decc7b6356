"""Compile apart, several at a time; then time with the device's queue kept full, on several input sets."""

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from eval.intervals import bootstrap
from eval.results import Scalar, Value, absent


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile.

    Attributes:
      where: settings that name its measurements.
      lower: traces and lowers it; called on the main thread.
      options: XLA compiler options of this program alone.
    """

    where: dict[str, Scalar]
    lower: Callable[[], Any]
    options: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled program, or why there is none (``status`` "oom" or "failed")."""

    job: Job
    program: Any
    seconds: float
    status: str = "ok"
    detail: str = ""


def failure(error: BaseException) -> tuple[str, str]:
    """Status and one line of an error: "oom" for exhausted memory, else "failed"."""
    text = f"{type(error).__name__}: {error}".strip()
    lowered = text.lower()
    exhausted = "resource_exhausted" in lowered or "out of memory" in lowered
    return ("oom" if exhausted else "failed"), text.splitlines()[0][:300]


_START = time.monotonic()


def say(text: str) -> None:
    """A line of progress with the seconds since the start, on standard error."""
    print(f"[{time.monotonic() - _START:6.1f} s] {text}", file=sys.stderr, flush=True)


def _announce(built: Built) -> None:
    settings = " ".join(str(v) for v in built.job.where.values())
    say(f"compiled in {built.seconds:.1f} s: {settings} {built.status} {built.detail}".rstrip())


class Compiler:
    """Compiles on ``workers`` threads while the main thread traces on; use as a context.

    If it is made with ``held``, programs are only traced until ``release``.
    """

    def __init__(
        self, workers: int, progress: Callable[[Built], None] = _announce, *, held: bool = False
    ) -> None:
        self._pool = ThreadPoolExecutor(max(1, workers))
        self._progress = progress
        self._released = threading.Event()
        self._closed = False
        if not held:
            self.release()

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed = True
        self.release()
        self._pool.shutdown(cancel_futures=True)

    def release(self) -> None:
        """Begins to compile what was submitted."""
        self._released.set()

    def submit(self, job: Job) -> Future[Built]:
        """Traces and lowers the job now, and compiles it beside what follows; the future never raises."""
        try:
            return self._pool.submit(self._build, job, job.lower())
        except Exception as error:
            failed: Future[Built] = Future()
            failed.set_result(Built(job, None, 0.0, *failure(error)))
            self._progress(failed.result())
            return failed

    def _build(self, job: Job, lowered: Any) -> Built:
        self._released.wait()
        if self._closed:
            return Built(job, None, 0.0, "failed", "not compiled: the run ended")
        start = time.perf_counter()
        try:
            program = lowered.compile(compiler_options=job.options)
            built = Built(job, program, time.perf_counter() - start)
        except Exception as error:
            built = Built(job, None, time.perf_counter() - start, *failure(error))
        self._progress(built)
        return built


def compile_all(
    jobs: Sequence[Job], workers: int, progress: Callable[[Built], None] = _announce
) -> list[Built]:
    """Traces the jobs in order and compiles them on ``workers`` threads; results in the order of the jobs."""
    with Compiler(workers, progress) as compiler:
        return [built.result() for built in [compiler.submit(job) for job in jobs]]


def sample_seconds(run: Callable[[], Any], *, samples: int, least_seconds: float) -> list[float]:
    """Seconds of one ``run()``, ``samples`` times.

    Each sample queues enough calls to last ``least_seconds`` and waits once, so the host's dispatch is hidden
    behind the device. One call and one whole sample go before, as warm-up.
    """
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    once = max(time.perf_counter() - start, 1e-6)
    calls = max(1, round(least_seconds / once))
    measured = []
    for _ in range(samples + 1):
        start = time.perf_counter()
        for _ in range(calls - 1):
            run()
        jax.block_until_ready(run())
        measured.append((time.perf_counter() - start) / calls)
    return measured[1:]


def median(metric: str, samples: Sequence[float], where: dict[str, Scalar], *, scale: float = 1.0) -> Value:
    """The median of samples times ``scale``, with its bootstrap interval."""
    values = np.asarray(samples, np.float64) * scale
    return Value(metric, where, *bootstrap(values, statistic=np.median), len(values), "bootstrap")


def missing(metrics: Sequence[str], built: Built, stage: str) -> list[Value]:
    """Values for a program that did not compile or run."""
    return [absent(m, built.status, detail=f"{stage}: {built.detail}", **built.job.where) for m in metrics]


def program_bytes(program: Any) -> int:
    """Device bytes that XLA planned for one call: arguments, outputs that are no arguments, temporaries."""
    stats = program.memory_analysis()
    return int(
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
