"""PyTorch peers as processes: they compile beside this one and are timed while it leaves the device alone."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.common import Reporter
from eval.results import absent, exact
from eval.speed_parts.floors import Ceilings
from eval.speed_parts.models import Size
from eval.speed_parts.timing import median, say

# What each needs beside PyTorch, what is compiled (fla fuses its layers by hand: only our loss over its
# models is), and whether its attention's operations count.
_PEERS = {
    "llama": ("torch", "all", True),
    "llama_cudnn": ("torch", "all", True),
    "seed": ("torch", "all", False),
    "seed_eager": ("torch", "none", False),
    "gla": ("fla", "loss", False),
    "gated_deltanet": ("fla", "loss", False),
}
METRICS = ("tokens_per_second", "milliseconds", "peak_gib")
_TIMEOUT = 600
_AT_A_TIME = 2  # that warm up, which needs the memory of a whole step


@dataclasses.dataclass(frozen=True)
class Asked:
    """A peer at a length, written ``NAME@LENGTH``."""

    name: str
    length: int


def parse_peer(text: str) -> Asked:
    """The peer written as ``text``.

    Raises:
      ValueError: for another form or an unknown name.
    """
    match = re.fullmatch(r"(\w+)@(\d+)", text.strip())
    if not match or match[1] not in _PEERS or not int(match[2]):
        raise ValueError(
            f"peer is {text!r}; it must look like llama@2048, with a name of {', '.join(_PEERS)}"
        )
    return Asked(match[1], int(match[2]))


class Peer:
    """One peer at a length: a process that compiles beside this one and is timed in turns."""

    def __init__(self, asked: Asked, size: Size, tokens: int, locks: Sequence[Path], number: int) -> None:
        self.asked, self.length, self.size = asked, asked.length, size
        package, compiled, _ = _PEERS[asked.name]
        self.batch = max(1, tokens // asked.length)
        self.where = {"part": "peers", "model": asked.name, "length": asked.length, "batch": self.batch}
        self._seconds: list[float] = []
        self._answer: dict[str, Any] = {}
        self._ready, self._process = False, None
        lacking = [name for name in ("torch", package) if importlib.util.find_spec(name) is None]
        if lacking:
            self._answer = {"status": "unavailable", "detail": f"{lacking[0]} is not installed"}
            return
        request = {
            "model": asked.name,
            "length": asked.length,
            "batch": self.batch,
            **dataclasses.asdict(size),
            "compiled": compiled,
            "locks": [str(lock) for lock in _held(locks, number, longer=asked.length > tokens)],
        }
        self._process = _start(request)

    def wait(self) -> None:
        """Until it has compiled and waits for its turn, or has failed."""
        if self._process is None or self._ready:
            return
        line = _line(self._process)
        say(f"{self.asked.name}@{self.length}: {line or 'no answer'}")
        if line == "ready":
            self._ready = True
        else:
            self._fail(line)

    def measure(self, samples: int, least_seconds: float, *, profiled: bool = False) -> None:
        """Times ``samples`` more samples; does nothing once it has failed (it has no profile)."""
        del profiled
        self.wait()
        if self._process is None:
            return
        try:
            self._process.stdin.write(json.dumps({"samples": samples, "seconds": max(least_seconds, 0.05)}))
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            line = _line(self._process)
        except BrokenPipeError:
            line = ""
        if not line.startswith("{") or "seconds" not in (answer := json.loads(line)):
            self._fail(line)
            return
        self._seconds += answer["seconds"]
        peaks = [a["peak_bytes"] for a in (self._answer, answer) if a.get("peak_bytes") is not None]
        self._answer = answer | {"peak_bytes": max(peaks, default=None)}

    def _fail(self, line: str) -> None:
        self._answer = json.loads(line) if line.startswith("{") else {"status": "failed"}
        if "detail" not in self._answer:
            self._process.kill()
            self._process.wait()
            self._process.errors.seek(0)
            last = (self._process.errors.read().strip().splitlines() or ["no message"])[-1]
            self._answer["detail"] = last[-300:]
        self.close()

    def close(self) -> None:
        """Ends the process, which frees the device memory it holds."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def report(self, reporter: Reporter, ceilings: Ceilings) -> None:
        """Reports what was measured, or why nothing was."""
        answer, where = self._answer, self.where
        if "seconds" not in answer:
            status, detail = answer.get("status", "failed"), answer.get("detail", "")
            reporter.add(*(absent(metric, status, detail=detail, **where) for metric in METRICS))
            return
        reporter.note(f"peers: torch {answer['torch']} on {answer['device']}")
        per_step = self.batch * self.length
        products = answer["product_parameters"]
        flops = 6 * products
        if _PEERS[self.asked.name][2]:
            flops += 6 * self.size.layers * self.length * self.size.width
        rate = median("tokens_per_second", [per_step / s for s in self._seconds], where)
        reporter.add(
            rate,
            median("milliseconds", self._seconds, where, scale=1e3),
            exact("share_of_product_rate", rate.value * flops / ceilings.flops_per_second, **where),
            exact("product_parameters", products, **where),
            exact("compile_seconds", answer["compile_seconds"], **where),
            exact("last_loss", answer["last_loss"], detail="random tokens", **where),
        )
        if answer["peak_bytes"] is not None:
            reporter.add(exact("peak_gib", answer["peak_bytes"] / 2**30, **where))
        say(f"{self.asked.name}@{self.length}: {rate.value:.0f} tokens/s")


@contextlib.contextmanager
def started(asked: Sequence[Asked], size: Size, tokens: int) -> Iterator[list[Peer]]:
    """The peers as processes that compile meanwhile; what is left of them is ended at the end."""
    peers: list[Peer] = []
    with tempfile.TemporaryDirectory() as directory:
        locks = [Path(directory, f"lock{index}") for index in range(_AT_A_TIME)]
        for lock in locks:
            lock.touch()
        try:
            for number, one in enumerate(asked):
                peers.append(Peer(one, size, tokens, locks, number))
            yield peers
        finally:
            for peer in peers:
                peer.close()


def _held(locks: Sequence[Path], number: int, *, longer: bool) -> Sequence[Path]:
    """The locks under which a peer warms up: one, or all if its row is longer than a step's tokens.

    Such a row may fit the device only alone, and would take from others what they need before it fails.
    """
    return locks if longer else [locks[number % len(locks)]]


def _start(request: dict[str, Any]) -> subprocess.Popen:
    command = [sys.executable, "-m", "eval.speed_parts.peers.torch_step", json.dumps(request)]
    return launch(command)


def launch(command: list[str]) -> subprocess.Popen:
    """A process whose lines are read and written one by one; its errors go to ``process.errors``, a file."""
    # A caching allocator that splits its blocks would report more than the step needs at long rows.
    # Inductor would start a compiler process for each core, in every peer.
    environment = os.environ | {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
    }
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, text=True, env=environment, stdin=pipe, stdout=pipe, stderr=errors)
    process.errors = errors
    return process


def _line(process: subprocess.Popen) -> str:
    """The next line, or nothing if the process ends or takes too long (and is then ended)."""
    timer = threading.Timer(_TIMEOUT, process.kill)
    timer.start()
    try:
        return process.stdout.readline().strip()
    finally:
        timer.cancel()
