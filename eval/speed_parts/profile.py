"""Where a step's device time goes: the largest kernels of a few traced calls, by name."""

import collections
import gzip
import itertools
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from eval.results import Scalar, Value, exact

_CALLS = 2


def _traced(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Events of the devices' streams in a few calls."""
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
    return [e for e in events if e.get("ph") == "X" and (e.get("pid"), e.get("tid")) in streams]


def kernel_milliseconds(run: Callable[[], Any]) -> dict[str, tuple[float, float]]:
    """Kernel name to (milliseconds, launches) of one ``run()``, from the profiler's device timelines.

    Trailing numbers are cut from names, so that the same kernel of several layers is one entry.
    """
    times: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for event in _traced(run):
        entry = times[re.sub(r"[._]?\d+$", "", event["name"])]
        entry[0] += event["dur"] * 1e-3 / _CALLS
        entry[1] += 1 / _CALLS
    return {name: (milliseconds, launches) for name, (milliseconds, launches) in times.items()}


def communication_milliseconds(run: Callable[[], Any]) -> tuple[float, float] | None:
    """Milliseconds of one ``run()`` in which a device ran a collective, and in which it ran nothing else.

    Means over the devices, from the kernels of NCCL; waiting for other devices is inside them. None where the
    profiler saw no kernels, as on CPUs.
    """
    devices: dict[Any, list[dict[str, Any]]] = collections.defaultdict(list)
    for event in _traced(run):
        devices[event["pid"]].append(event)
    spent = [exposed(events) for events in devices.values()]
    if not spent:
        return None
    total, alone = (sum(one) / len(spent) / _CALLS * 1e-3 for one in zip(*spent, strict=True))
    return total, alone


def exposed(events: list[dict[str, Any]]) -> tuple[float, float]:
    """How long a device ran collectives, and of that nothing else, by its events (``ts``, ``dur``)."""
    spans = [(e["ts"], e["ts"] + e["dur"], "nccl" in e["name"].lower()) for e in events if e["dur"] > 0]
    borders = sorted({time for begin, end, _ in spans for time in (begin, end)})
    changes = collections.defaultdict(lambda: [0, 0])
    for begin, end, sends in spans:
        changes[begin][sends] += 1
        changes[end][sends] -= 1
    total = alone = 0.0
    computing = sending = 0
    for begin, end in itertools.pairwise(borders):
        computing, sending = computing + changes[begin][0], sending + changes[begin][1]
        total += (end - begin) * (sending > 0)
        alone += (end - begin) * (sending > 0 and computing == 0)
    return total, alone


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
