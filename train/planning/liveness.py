"""The most bytes that a traced function holds at one time beside its arguments, run in the order traced.

Calls are taken apart, as the compiler does. Element-wise steps and changes of form are taken to be fused into
what reads them, sums included: written to memory is only what a product, a kernel, a sum or a loop makes,
what products, kernels and loops read, what several steps read, and the result. Updates of a slice, and what a
loop carries, happen in place; reshaped arrays are the same.
"""

import collections
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_LOOPS = frozenset(("scan", "while", "cond"))
# Their operands are read from memory, their results written to it.
_STORED = _LOOPS | frozenset(
    (
        "dot_general",
        "conv_general_dilated",
        "triangular_solve",
        "sort",
        "scatter",
        "scatter-add",
        "cumsum",
        "cummax",
        "cumlogsumexp",
        "all_gather",
        "all_to_all",
        "reduce_scatter",
        "psum",
        "psum_invariant",
        "ppermute",
        "pallas_call",
        "mpmd_map",
        "pure_callback",
    )
)
# What they are given may be fused into them; what they make is written.
_MADE = frozenset(
    (
        "gather",
        "concatenate",
        "stack",
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "reduce_and",
        "reduce_or",
        "reduce",
        "argmax",
        "argmin",
    )
)
# Whatever reads them makes them again; other element-wise results are written if several steps read them.
_AGAIN = frozenset(("broadcast_in_dim", "iota", "convert_element_type"))
# The same bytes under another shape; one result for each operand.
_SAME = frozenset(
    ("reshape", "squeeze", "expand_dims", "transpose", "optimization_barrier", "name", "reduce_precision")
)
_IN_PLACE = frozenset(("dynamic_update_slice",))


class _Step(NamedTuple):
    """One equation of the function with its calls taken apart; arrays are numbers."""

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    inside: tuple[Jaxpr, ...]
    carried: tuple[int, ...]  # operands that a loop updates


class _Walk:
    """The steps of a function, and the bytes of every array in it."""

    def __init__(self, jaxpr: Jaxpr) -> None:
        self.sizes: list[int] = []
        self.steps: list[_Step] = []
        known: dict[Any, int] = {}
        self.arguments = len(jaxpr.invars)
        for v in (*jaxpr.invars, *jaxpr.constvars):
            known[v] = self._new(v.aval)
        self.given = set(known.values())
        self._add(jaxpr, known)
        self.results = {known[v] for v in jaxpr.outvars if not isinstance(v, Literal)}

    def _new(self, aval: Any) -> int:
        dtype = getattr(aval, "dtype", None)
        self.sizes.append(0 if dtype is None else math.prod(aval.shape) * dtype.itemsize)
        return len(self.sizes) - 1

    def _add(self, jaxpr: Jaxpr, known: dict[Any, int]) -> None:
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            inside = tuple(_inner(eqn))
            read: list[Any] = [None if isinstance(v, Literal) else known[v] for v in eqn.invars]
            if name not in _STORED | _MADE and len(inside) == 1 and len(inside[0].invars) == len(read):
                own = {v: self._new(v.aval) for v in inside[0].constvars}
                for v, at, given in zip(inside[0].invars, read, eqn.invars, strict=True):
                    own[v] = self._new(given.aval) if at is None else at
                self._add(inside[0], own)
                for v, result in zip(eqn.outvars, inside[0].outvars, strict=True):
                    known[v] = self._new(v.aval) if isinstance(result, Literal) else own[result]
                continue
            reads = tuple(at for at in read if at is not None)
            if name in _SAME and len(reads) == len(eqn.outvars):
                known |= dict(zip(eqn.outvars, reads, strict=True))
                continue
            if name in _IN_PLACE and read[0] is not None:
                known[eqn.outvars[0]] = read[0]
                self.steps.append(_Step(name, reads, (read[0],), (), ()))
                continue
            carried: tuple[int, ...] = ()
            if name == "scan":
                carry, wanted = _carry(eqn, inside[0]), _Walk(inside[0]).wanted()
                carried = tuple(read[i] for i in carry if read[i] is not None)
                reads = tuple(read[i] for i in sorted({*carry, *wanted}) if read[i] is not None)
            for v in eqn.outvars:
                known[v] = self._new(v.aval)
            makes = tuple(known[v] for v in eqn.outvars)
            self.steps.append(_Step(name, reads, makes, inside if name in _LOOPS else (), carried))

    def used(self) -> list[_Step]:
        """The steps that results depend on."""
        wanted, found = set(self.results), []
        for step in reversed(self.steps):
            if wanted.intersection(step.makes):
                wanted.update(step.reads)
                found.append(step)
        return found[::-1]

    def wanted(self) -> set[int]:
        """Which of the function's arguments its results depend on, by position."""
        read = self.results.union(*(step.reads for step in self.used()))
        return read.intersection(range(self.arguments))


def live_bytes(jaxpr: Jaxpr) -> int:
    """Largest sum of the arrays that are written and still needed, those in loops included.

    Args:
      jaxpr: of the function as traced; inside of ``shard_map`` shapes are those of one device.

    Returns:
      Bytes, without the arguments and constants.
    """
    walk = _Walk(jaxpr)
    steps = walk.used()
    last: dict[int, int] = {}
    stored = set(walk.results)
    readers = collections.Counter(v for step in steps for v in set(step.reads))
    for index, step in enumerate(steps):
        last |= dict.fromkeys(step.reads, index)
        if step.name in _STORED:
            stored.update(step.reads)
        if step.name in _STORED | _MADE | _IN_PLACE:
            stored.update(step.makes)
        elif step.name not in _AGAIN:
            stored.update(v for v in step.makes if readers[v] > 1)
    # What is fused reads its sources as late as what it is fused into.
    for index in reversed(range(len(steps))):
        step = steps[index]
        end = max((last.get(v, index) for v in step.makes if v not in stored), default=index)
        for v in step.reads:
            last[v] = max(last[v], end)
    last |= dict.fromkeys(walk.results, len(steps))
    ends: dict[int, list[int]] = {}
    for v, index in last.items():
        ends.setdefault(index, []).append(v)
    alive: set[int] = set(walk.given)
    live = peak = 0
    for index, step in enumerate(steps):
        made = {v for v in step.makes if v in stored and v in last} - alive
        alive |= made
        live += sum(walk.sizes[v] for v in made)
        reused = sum(walk.sizes[v] for v in step.carried if v in alive - walk.given and last[v] == index)
        inside = max((live_bytes(sub) for sub in step.inside), default=0)
        peak = max(peak, live - reused + inside)
        for v in ends.pop(index, ()):
            if v in alive and v not in walk.given:
                alive.remove(v)
                live -= walk.sizes[v]
    return peak


def _carry(eqn: Any, body: Jaxpr) -> range:
    """Which operands of a ``scan`` it carries: what is not sliced, behind what stays the same."""

    def stacked(outer: Any, inner: Any) -> int:
        return sum(v.aval.ndim > own.aval.ndim for v, own in zip(outer, inner, strict=True))

    collected, sliced = stacked(eqn.outvars, body.outvars), stacked(eqn.invars, body.invars)
    end = len(eqn.invars) - sliced
    return range(end - (len(eqn.outvars) - collected), end)


def _inner(eqn: Any) -> Iterator[Jaxpr]:
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one
