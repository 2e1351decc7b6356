"""Steps and peers timed in turns: those of one length right after one another, and again."""

from collections.abc import Callable, Sequence
from typing import Protocol

from eval.common import Reporter
from eval.speed_parts.floors import Ceilings


class Timed(Protocol):
    """A train step that can be timed several times and reports once."""

    length: int

    def wait(self) -> None:
        """Until it has compiled, or has failed to."""

    def measure(self, samples: int, least_seconds: float, *, profiled: bool = False) -> None:
        """Times ``samples`` more samples; a failure is kept for the report."""

    def report(self, reporter: Reporter, ceilings: Ceilings) -> None:
        """Reports all of them, or why there are none."""


def run(
    reporter: Reporter,
    timed: Sequence[Timed],
    ceilings: Ceilings,
    *,
    samples: int,
    least_seconds: float,
    rounds: int = 2,
    profiled: Callable[[Timed], bool] = lambda _: False,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Times all of a length in turns, ``samples`` in all, so that a drift of the card meets all alike.

    Waits first until all have compiled. Lengths come in the order in which they first appear; each is
    reported, and saved, before the next begins.
    """
    for one in timed:
        one.wait()
    for length in dict.fromkeys(one.length for one in timed):
        group = [one for one in timed if one.length == length]
        for turn in range(rounds):
            for one in group:
                last = turn == rounds - 1
                one.measure(-(-samples // rounds), least_seconds, profiled=last and profiled(one))
                if last:
                    one.report(reporter, ceilings)
                    save()
