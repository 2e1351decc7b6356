"""How much memory arrays need that live at different times, placed as XLA places them.

Its heap simulator takes arrays by size, largest first, and by how long they live, longest first; each goes
into the smallest gap that those placed before leave while it lives, or to the end. The better of both counts.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Interval(NamedTuple):
    """An array in memory from one moment to another, both included."""

    start: int
    end: int
    size: int


def packed_bytes(intervals: Iterable[Interval]) -> int:
    """Bytes from the lowest to the highest address in use."""
    found = [one for one in intervals if one.size and one.start <= one.end]
    return min(
        _highest(sorted(found, key=lambda one: (-one.size, one.start - one.end, one.start))),
        _highest(sorted(found, key=lambda one: (one.start - one.end, -one.size, one.start))),
    )


def _highest(ordered: list[Interval]) -> int:
    placed: list[tuple[int, int, int, int]] = []
    highest = 0
    for one in ordered:
        at = low = 0
        room: int | None = None
        for begin, end in sorted(
            (begin, end) for start, until, begin, end in placed if start <= one.end and one.start <= until
        ):
            gap = begin - low
            if gap >= one.size and (room is None or gap < room):
                at, room = low, gap
            low = max(low, end)
        if room is None:
            at = low
        placed.append((one.start, one.end, at, at + one.size))
        highest = max(highest, at + one.size)
    return highest
