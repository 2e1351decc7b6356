"""The most bytes that a traced function holds at one time beside its arguments.

Element-wise steps and changes of form are taken to be fused into what reads them, sums included: written to
memory is only what a product, a kernel, a sum or a loop makes, what products, kernels and loops read, what
several steps read, and the result; ``train.planning.steps`` says which arrays are one. On GPUs steps run in
the order of ``train.planning.overlap``, elsewhere as traced. Arrays are placed as the compiler places them
(``train.planning.packing``).
"""

import collections
from typing import Any

from jax.extend.core import Jaxpr

from train.planning.overlap import filled_first, held_apart, ordered
from train.planning.packing import Interval, packed_bytes
from train.planning.steps import AGAIN, IN_PLACE, MADE, STORED, Step, Walk


def live_bytes(jaxpr: Jaxpr, *, gpu: bool) -> int:
    """Bytes in which the arrays that are written and still needed find room, those in loops included.

    Args:
      jaxpr: of the function as traced; inside of ``shard_map`` shapes are those of one device.
      gpu: whether it runs on a GPU, whose compiler makes again what costs no more than to read it, and
        computes while it sends.

    Returns:
      Bytes, without the arguments and constants.
    """
    return packed_bytes(_intervals(jaxpr, 0, gpu)[0])


def _intervals(jaxpr: Jaxpr, clock: int, gpu: bool) -> tuple[list[Interval], int]:
    """When each written array is in memory, from ``clock`` on, and the moment after; nothing given."""
    walk = Walk(jaxpr)
    steps = walk.used()
    if gpu:
        steps = ordered(steps)
    stored = written(walk, steps, gpu)
    last = _last_reads(walk, steps, stored)
    found: list[Interval] = []
    starts: list[int] = []
    ends: list[int] = []
    for step in steps:
        starts.append(clock)
        for body in step.inside:
            inside, clock = _intervals(body, clock, gpu)
            found += inside
        ends.append(clock)
        clock += 1
    ends.append(clock)
    filled = _first_uses(walk, steps, stored, starts)
    if gpu:
        filled = filled_first(filled, steps, walk.constants)
        found += held_apart(steps, starts, ends, lambda body, own: written(body, own, gpu))
    begun: dict[int, int] = {}
    updated = {v for step in steps for v in (*step.carried, *step.filled)}
    kept: dict[Any, int] = {}
    for index, step in enumerate(steps):
        # A loop updates what it carries; an element-wise result takes the place of an operand.
        over = step.carried if step.name in STORED | MADE else step.reads
        free = [v for v in over if v in begun and last[v] == index]
        for v in step.makes:
            if v not in stored or v not in last or v in walk.given or v in begun:
                continue
            constant = walk.constants.get(v)
            begun[v] = starts[index] if constant is None else filled.get(constant, starts[index])
            if constant is not None and v not in updated:
                one = kept.setdefault(constant, v)
                if one != v:  # equal and only read: one array
                    last[one] = max(last[one], last[v])
                    del begun[v]
                    continue
            place = next((old for old in free if walk.sizes[old] == walk.sizes[v]), None)
            if place is not None:
                begun[v] = begun.pop(place)
                free.remove(place)
    found += [Interval(at, ends[last[v]], walk.sizes[v]) for v, at in begun.items()]
    return found, clock


def written(walk: Walk, steps: list[Step], gpu: bool) -> set[int]:
    """Which arrays are written to memory.

    A GPU makes an element-wise result again in each step that reads it, of one array that is no larger.
    """
    stored = set(walk.results)
    readers = collections.Counter(v for step in steps for v in set(step.reads))
    for step in steps:
        stored.update(step.joins)
        if step.name in STORED:
            stored.update(step.reads)
        if step.name in STORED | MADE | IN_PLACE:
            stored.update(step.makes)
    sources: dict[int, frozenset[int]] = {}
    for step in steps:
        read = frozenset[int]().union(*(sources.get(v, frozenset((v,))) for v in step.reads))
        for v in set(step.makes) - stored:
            one = gpu and len(read) == 1 and sum(walk.sizes[w] for w in read) <= walk.sizes[v]
            if one or step.name in AGAIN or readers[v] < 2:
                sources[v] = read
            else:
                stored.add(v)
    return stored


def _last_reads(walk: Walk, steps: list[Step], stored: set[int]) -> dict[int, int]:
    """The step that reads an array last; what is fused reads its sources as late as what it is fused into."""
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        last |= dict.fromkeys(step.reads, index)
    for index in reversed(range(len(steps))):
        step = steps[index]
        end = max((last.get(v, index) for v in step.makes if v not in stored), default=index)
        for v in step.reads:
            last[v] = max(last[v], end)
    return last | dict.fromkeys(walk.results, len(steps))


def _first_uses(walk: Walk, steps: list[Step], stored: set[int], starts: list[int]) -> dict[Any, int]:
    """When each constant is first needed: all arrays that begin as the same one are filled at once."""
    first: dict[Any, int] = {}
    for step, start in zip(steps, starts, strict=True):
        for v in (*step.reads, *step.filled):
            if v in walk.constants and v in stored:
                first.setdefault(walk.constants[v], start)
    return first
