"""Where a step's device time goes: the largest kernels of a few traced calls, by name."""

import collections
import gzip
import itertools
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from eval.results import Scalar, Value, exact

_CALLS = 2


def _traced(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Events of the devices' streams in a few calls."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            # The host runs ahead, as where steps are timed.
            jax.block_until_ready([run() for _ in range(_CALLS)])
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


class StepTimes(NamedTuple):
    """Milliseconds of one run, means over the devices.

    Attributes:
      computing: in which a device ran something that is no collective.
      sending: in which it ran a collective (of NCCL, where waiting for other devices is inside) or a copy to
        another device.
      alone: in which it ran a collective and nothing else.
      idle: in which it ran nothing, from its first event to its last.
      gaps: where it was idle longest in all: by what ran before and what came next, with the number of times.
      kernels: the largest, by name without trailing numbers, with the sum of their durations.
      each: ``computing`` of every device; those of one machine differ in clocks, and wait for the slowest.
    """

    computing: float
    sending: float
    alone: float
    idle: float
    gaps: list[tuple[str, float, float]]
    kernels: list[tuple[str, float]]
    each: list[float]


def step_times(run: Callable[[], Any], count: int = 48) -> StepTimes | None:
    """Where the devices' time goes in a ``run()``; None where the profiler saw no kernels, as on CPUs."""
    devices: dict[Any, list[dict[str, Any]]] = collections.defaultdict(list)
    names: dict[str, float] = collections.defaultdict(float)
    for event in _traced(run):
        devices[event["pid"]].append(event)
        names[_plain(event["name"])[:100]] += event["dur"]
    if not devices:
        return None
    each = 1e-3 / _CALLS / len(devices)
    found = [exposed(devices[pid]) for pid in sorted(devices)]
    computing, sending, alone = (sum(one) * each for one in zip(*found, strict=True))
    largest = sorted(names.items(), key=lambda item: -item[1])[:count]
    idle: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for events in devices.values():
        for name, gap in gaps(events):
            idle[name][0] += gap * each
            idle[name][1] += 1 / _CALLS / len(devices)
    longest = sorted(((name, *spent) for name, spent in idle.items()), key=lambda item: -item[1])
    return StepTimes(
        computing=computing,
        sending=sending,
        alone=alone,
        idle=sum(gap for _, gap, _ in longest),
        gaps=longest[: count // 4],
        kernels=[(name, spent * each) for name, spent in largest],
        each=[own[0] * 1e-3 / _CALLS for own in found],
    )


def _plain(name: str) -> str:
    return re.sub(r"[._]?\d+$", "", name)


def gaps(events: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Every time between two events of a device in which nothing ran: which they were, and how long."""
    found = []
    ordered = sorted((e for e in events if e["dur"] > 0), key=lambda e: e["ts"])
    last, end = ordered[0]["name"], ordered[0]["ts"] + ordered[0]["dur"]
    for event in ordered[1:]:
        if event["ts"] > end:
            found.append((f"{_plain(last)[:48]} > {_plain(event['name'])[:48]}", event["ts"] - end))
        if event["ts"] + event["dur"] > end:
            last, end = event["name"], event["ts"] + event["dur"]
    return found


def exposed(events: list[dict[str, Any]]) -> tuple[float, float, float]:
    """How long a device computed, ran collectives, and of that nothing else, by events (``ts``, ``dur``)."""
    spans = [(e["ts"], e["ts"] + e["dur"], _sends(e["name"])) for e in events if e["dur"] > 0]
    borders = sorted({time for begin, end, _ in spans for time in (begin, end)})
    changes = collections.defaultdict(lambda: [0, 0])
    for begin, end, sends in spans:
        changes[begin][sends] += 1
        changes[end][sends] -= 1
    computed = total = alone = 0.0
    computing = sending = 0
    for begin, end in itertools.pairwise(borders):
        computing, sending = computing + changes[begin][0], sending + changes[begin][1]
        computed += (end - begin) * (computing > 0)
        total += (end - begin) * (sending > 0)
        alone += (end - begin) * (sending > 0 and computing == 0)
    return computed, total, alone


def _sends(name: str) -> bool:
    """Whether an event is a kernel of NCCL, or a copy to another device."""
    return "nccl" in name.lower() or name.lower().startswith("memcpyp2p")


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
