"""Starts the PyTorch peers, one process after the other, while this process leaves the device alone."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from eval.common import Reporter
from eval.results import absent, exact
from eval.speed_parts.floors import Ceilings
from eval.speed_parts.models import Size
from eval.speed_parts.timing import failure, median, say

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


def run(
    reporter: Reporter,
    peers: Sequence[Peer],
    size: Size,
    tokens: int,
    ceilings: Ceilings,
    *,
    samples: int,
    least_seconds: float,
) -> None:
    """Measures the peers whose packages are installed; the others are recorded as unavailable."""
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
        }
        answer = _in_a_process(request)
        say(f"{peer.name}@{peer.length}: {answer}")
        _report(reporter, peer, answer, where, size, ceilings)


def _in_a_process(request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "eval.speed_parts.peers.torch_step", json.dumps(request)]
    # A caching allocator that splits its blocks would report more than the step needs at long rows.
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, env=environment)
    except subprocess.TimeoutExpired as error:
        return {"status": "failed", "detail": failure(error)[1]}
    if done.returncode or not done.stdout.strip():
        return {"status": "failed", "detail": (done.stderr.strip().splitlines() or ["no message"])[-1][-300:]}
    return json.loads(done.stdout.splitlines()[-1])


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
