"""PyTorch peers as processes: they compile beside this one and are timed while it leaves the device alone."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.common import Reporter
from eval.results import absent, exact
from eval.speed_parts.floors import Ceilings
from eval.speed_parts.models import Size
from eval.speed_parts.timing import median, say

# What each needs beside PyTorch, whether it is compiled, and whether its attention's operations count.
_PEERS = {
    "llama": ("torch", True, True),
    "llama_cudnn": ("torch", True, True),
    "seed": ("torch", True, False),
    "seed_eager": ("torch", False, False),
    "gla": ("fla", False, False),
    "gated_deltanet": ("fla", False, False),
}
METRICS = ("tokens_per_second", "milliseconds", "peak_gib")
_TIMEOUT = 600
_AT_A_TIME = 2  # that warm up, which needs the memory of a whole step


@dataclasses.dataclass(frozen=True)
class Peer:
    """A peer at a length, written ``NAME@LENGTH``."""

    name: str
    length: int


def parse_peer(text: str) -> Peer:
    """The peer written as ``text``.

    Raises:
      ValueError: for another form or an unknown name.
    """
    match = re.fullmatch(r"(\w+)@(\d+)", text.strip())
    if not match or match[1] not in _PEERS or not int(match[2]):
        raise ValueError(
            f"peer is {text!r}; it must look like llama@2048, with a name of {', '.join(_PEERS)}"
        )
    return Peer(match[1], int(match[2]))


class Peers:
    """Peers as processes that compile while this one does, and are timed in turn while it waits.

    Use as a context: processes that were not measured are ended at its end.
    """

    def __init__(
        self,
        reporter: Reporter,
        peers: Sequence[Peer],
        size: Size,
        tokens: int,
        ceilings: Ceilings,
        *,
        samples: int,
        least_seconds: float,
    ) -> None:
        self.reporter, self.size, self.ceilings = reporter, size, ceilings
        self.waiting: list[tuple[Peer, dict[str, Any], subprocess.Popen]] = []
        self.directory = tempfile.TemporaryDirectory()
        self.locks = [Path(self.directory.name, f"lock{index}") for index in range(_AT_A_TIME)]
        for lock in self.locks:
            lock.touch()
        for peer in peers:
            package, compiled, _ = _PEERS[peer.name]
            batch = max(1, tokens // peer.length)
            where = {"part": "peers", "model": peer.name, "length": peer.length, "batch": batch}
            lacking = [name for name in ("torch", package) if importlib.util.find_spec(name) is None]
            if lacking:
                detail = f"{lacking[0]} is not installed"
                reporter.add(*(absent(metric, "unavailable", detail=detail, **where) for metric in METRICS))
                continue
            request = {
                "model": peer.name,
                "length": peer.length,
                "batch": batch,
                **dataclasses.asdict(size),
                "samples": samples,
                "seconds": max(least_seconds, 0.05),
                "compiled": compiled,
                "lock": str(self.locks[len(self.waiting) % _AT_A_TIME]),
            }
            self.waiting.append((peer, where, _start(request)))

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, *exception: object) -> None:
        for _, _, process in self.waiting:
            process.kill()
            process.wait()
        self.directory.cleanup()

    def measure(self) -> None:
        """Waits until all have compiled, then times one after the other; does nothing the second time."""
        said = [_line(process) for _, _, process in self.waiting]
        for line in said:
            peer, where, process = self.waiting.pop(0)
            answer = _answer(process, line)
            say(f"{peer.name}@{peer.length}: {answer}")
            _report(self.reporter, peer, answer, where, self.size, self.ceilings)


def _start(request: dict[str, Any]) -> subprocess.Popen:
    command = [sys.executable, "-m", "eval.speed_parts.peers.torch_step", json.dumps(request)]
    return launch(command)


def launch(command: list[str]) -> subprocess.Popen:
    """A process whose lines are read and written one by one; its errors go to ``process.errors``, a file."""
    # A caching allocator that splits its blocks would report more than the step needs at long rows.
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
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


def _answer(process: subprocess.Popen, line: str) -> dict[str, Any]:
    """Lets a peer that said it is ready measure; what it printed, or the last line of its errors."""
    if line == "ready":
        process.stdin.write("go\n")
        process.stdin.flush()
        line = _line(process)
    process.wait(_TIMEOUT)
    if line.startswith("{"):
        return json.loads(line)
    process.errors.seek(0)
    last = (process.errors.read().strip().splitlines() or ["no message"])[-1]
    return {"status": "failed", "detail": last[-300:]}


def _report(
    reporter: Reporter,
    peer: Peer,
    answer: dict[str, Any],
    where: dict[str, Any],
    size: Size,
    ceilings: Ceilings,
) -> None:
    if "seconds" not in answer:
        status, detail = answer.get("status", "failed"), answer.get("detail", "")
        reporter.add(*(absent(metric, status, detail=detail, **where) for metric in METRICS))
        return
    reporter.note(f"peers: torch {answer['torch']} on {answer['device']}")
    per_step = where["batch"] * peer.length
    seconds, products = answer["seconds"], answer["product_parameters"]
    flops = 6 * products
    if _PEERS[peer.name][2]:
        flops += 6 * size.layers * peer.length * size.width
    rate = median("tokens_per_second", [per_step / s for s in seconds], where)
    reporter.add(
        rate,
        median("milliseconds", seconds, where, scale=1e3),
        exact("share_of_product_rate", rate.value * flops / ceilings.flops_per_second, **where),
        exact("product_parameters", products, **where),
        exact("compile_seconds", answer["compile_seconds"], **where),
        exact("last_loss", answer["last_loss"], detail="random tokens", **where),
    )
    if answer["peak_bytes"] is not None:
        reporter.add(exact("peak_gib", answer["peak_bytes"] / 2**30, **where))
