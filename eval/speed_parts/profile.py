"""Where a step's device time goes: the largest kernels of a few traced calls, by name."""

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from eval.results import Scalar, Value, exact

_CALLS = 2


def kernel_milliseconds(run: Callable[[], Any]) -> dict[str, tuple[float, float]]:
    """Kernel name to (milliseconds, launches) of one ``run()``, from the profiler's device timelines.

    Trailing numbers are cut from names, so that the same kernel of several layers is one entry.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(_CALLS):
                jax.block_until_ready(run())
        files = list(Path(directory).rglob("*.trace.json.gz"))
        if not files:
            raise RuntimeError("the profiler wrote no trace")
        events = json.loads(gzip.decompress(files[0].read_bytes()))["traceEvents"]
    devices = {
        e["pid"]
        for e in events
        if e.get("name") == "process_name" and "/device:" in str(e.get("args", {}).get("name", ""))
    }
    streams = {
        (e["pid"], e["tid"])
        for e in events
        if e.get("name") == "thread_name" and e["pid"] in devices and "Stream" in e["args"].get("name", "")
    }
    times: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for event in events:
        if event.get("ph") == "X" and (event.get("pid"), event.get("tid")) in streams:
            entry = times[re.sub(r"[._]?\d+$", "", event["name"])]
            entry[0] += event["dur"] * 1e-3 / _CALLS
            entry[1] += 1 / _CALLS
    return {name: (milliseconds, launches) for name, (milliseconds, launches) in times.items()}


def top_kernels(run: Callable[[], Any], where: dict[str, Scalar], count: int = 40) -> list[Value]:
    """The largest kernels as values, and the sum over all of them."""
    found = kernel_milliseconds(run)
    ranked = sorted(found.items(), key=lambda item: -item[1][0])[:count]
    values = [
        exact("kernel_milliseconds", ms, detail=f"{launches:g} launches", kernel=name[:120], **where)
        for name, (ms, launches) in ranked
    ]
    total = sum(ms for ms, _ in found.values())
    return [exact("kernel_milliseconds", total, kernel="all", **where), *values]
