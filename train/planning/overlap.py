"""What a GPU's compiler moves so that exchanges between devices run beside something, and what that holds.

Read from the schedules and buffers of steps compiled for two and four H100s (``docs/log.md``, 2026-11-28):

- it begins from the end, and what only results need (the last product for the head's weights, with its
  logits) comes beside the last sums of gradients, after the loop over blocks;
- constants that loops begin from wait for nothing: all are filled before the first loop;
- sums of gradients go into the next turn of the loop over blocks, so its first turn is taken out of it. What
  that turn computes again in order to exchange depends on no loss: it runs before it;
- arrays of a block that depend on nothing are made once for all blocks, forward and backward.
"""

from collections.abc import Callable, Iterator
from typing import Any

from jax.extend.core import Jaxpr

from train.planning.packing import Interval
from train.planning.steps import Step, Walk, inner

_GATHERS = frozenset(("all_gather", "all_to_all", "ppermute"))
_EXCHANGES = _GATHERS | {"reduce_scatter", "psum", "psum_invariant"}


def ordered(steps: list[Step]) -> list[Step]:
    """The steps as they run: if a loop exchanges, what only results need comes after the last that does."""
    loops = _exchanging(steps, _EXCHANGES)
    if not loops:
        return steps
    end = loops[-1] + 1
    needed: set[int] = set()
    late: set[int] = set()
    for index in reversed(range(end)):
        step = steps[index]
        if step.joins:
            needed.update(step.joins if needed.intersection(step.joins) else ())
        elif step.inside or needed.intersection(step.makes):
            needed.update(step.reads)
        else:
            late.add(index)
    early = [steps[index] for index in range(end) if index not in late]
    return early + [steps[index] for index in sorted(late)] + steps[end:]


def filled_first(first: dict[Any, int], steps: list[Step], constants: dict[int, Any]) -> dict[Any, int]:
    """When constants needed at ``first`` are filled: what loops begin from, before the first of them."""
    begun = {constants[v] for step in steps for v in (*step.carried, *step.filled) if v in constants}
    begin = min((first[constant] for constant in begun & first.keys()), default=0)
    return first | dict.fromkeys(begun & first.keys(), begin)


def held_apart(
    steps: list[Step], starts: list[int], ends: list[int], written: Callable[[Walk, list[Step]], set[int]]
) -> Iterator[Interval]:
    """What loops over blocks hold outside of their turns, if they gather.

    Args:
      steps: of the function.
      starts, ends: when they run.
      written: which arrays of a body are written.
    """
    loops = [index for index in _exchanging(steps, _GATHERS) if steps[index].name == "scan"]
    if len(loops) < 2:
        return
    bodies = [Walk(steps[index].inside[0]) for index in loops]
    uses: dict[Any, list[int]] = {}
    for index, body in zip(loops, bodies, strict=True):
        for v in _independent(body):
            uses.setdefault((body.kinds[v], body.sizes[v]), []).append(index)
    for (_, size), at in uses.items():
        yield Interval(starts[at[0]], ends[at[-1]], size)
    body = bodies[-1]
    size = sum(body.sizes[v] for v in _computed_first(body, steps[loops[-1]].turns, written))
    yield Interval(ends[loops[-2]] + 1, starts[loops[-1]] - 1, size)


def _independent(body: Walk) -> set[int]:
    """Arrays that depend on no argument, and are read by steps that do."""
    given = set(body.given)
    found: set[int] = set()
    for step in body.used():
        if not given.isdisjoint(step.reads):
            given.update(step.makes)
            found.update(v for v in step.reads if v not in given)
    return found


def _computed_first(body: Walk, turns: range, written: Callable[[Walk, list[Step]], set[int]]) -> set[int]:
    """Arrays on the way to an exchange, of nothing that turns hand on, that other steps read."""
    steps = body.used()
    handed, given = set(turns), set(body.given)
    late: list[bool] = []
    for step in steps:
        late.append(not handed.isdisjoint(step.reads))
        handed.update(step.makes if late[-1] else ())
        given.update(step.makes if not given.isdisjoint(step.reads) else ())
    stored = written(body, steps)
    wanted: set[int] = set()
    made: set[int] = set()
    sent: set[int] = set()
    for step, of_handed in zip(reversed(steps), reversed(late), strict=True):
        if of_handed or not (step.name in _GATHERS or sent.intersection(step.makes)):
            wanted.update(step.reads)
            continue
        sent.update(step.reads)
        made.update(step.makes)
        if wanted.intersection(step.makes) - stored:
            wanted.update(step.reads)
    return (made & wanted & stored & given) - body.given


def _exchanging(steps: list[Step], names: frozenset[str]) -> list[int]:
    return [index for index, step in enumerate(steps) if any(_sends(one, names) for one in step.inside)]


def _sends(jaxpr: Jaxpr, names: frozenset[str]) -> bool:
    return any(
        eqn.primitive.name in names or any(_sends(one, names) for one in inner(eqn)) for eqn in jaxpr.eqns
    )
