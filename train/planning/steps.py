"""The steps of a traced function and its arrays: calls taken apart, arrays that are one counted once.

Reshaped arrays are the same array, and so is a piece of one that products and kernels read where it lies.
Updates of a slice, and what a loop carries, happen in place.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

LOOPS = frozenset(("scan", "while", "cond"))
# Their operands are read from memory, their results written to it.
STORED = LOOPS | frozenset(
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
MADE = frozenset(
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
AGAIN = frozenset(("broadcast_in_dim", "iota", "convert_element_type"))
# The same bytes under another shape; one result for each operand.
_SAME = frozenset(
    ("reshape", "squeeze", "expand_dims", "transpose", "optimization_barrier", "name", "reduce_precision")
)
IN_PLACE = frozenset(("dynamic_update_slice",))
# Read where they lie, if they are one piece of what they are cut from.
_CUT = frozenset(("slice", "dynamic_slice"))


class Step(NamedTuple):
    """One equation of the function with its calls taken apart; arrays are numbers."""

    name: str
    reads: tuple[int, ...] = ()
    makes: tuple[int, ...] = ()
    inside: tuple[Jaxpr, ...] = ()
    carried: tuple[int, ...] = ()  # operands that a loop updates
    filled: tuple[int, ...] = ()  # results that a loop fills, which begin as a constant
    turns: range = range(0)  # which arguments of its body a loop hands from turn to turn
    joins: tuple[int, ...] = ()  # arrays of which none is read before all are there


class Walk:
    """The steps of a function, and the bytes of every array in it.

    Attributes:
      sizes: bytes by array; the function's arguments come first.
      arguments: how many of them.
      given: arrays that are there before the function runs.
      results: arrays that it returns.
      constants: of arrays that begin as one number, what makes two of them equal.
      kinds: of every other array that a step makes, the step's name and the shape.
    """

    def __init__(self, jaxpr: Jaxpr) -> None:
        self.sizes: list[int] = []
        self.steps: list[Step] = []
        self.constants: dict[int, Any] = {}
        self.kinds: dict[int, Any] = {}
        self.arguments = len(jaxpr.invars)
        known: dict[Any, int] = {v: self._new(v.aval) for v in (*jaxpr.invars, *jaxpr.constvars)}
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
            inside = tuple(inner(eqn))
            read: list[Any] = [None if isinstance(v, Literal) else known[v] for v in eqn.invars]
            reads = tuple(at for at in read if at is not None)
            if name not in STORED | MADE and len(inside) == 1 and len(inside[0].invars) == len(read):
                self._call(eqn, inside[0], read, known)
            elif name in _SAME and len(reads) == len(eqn.outvars):
                known |= dict(zip(eqn.outvars, reads, strict=True))
                if name == "optimization_barrier":
                    self.steps.append(Step(name, joins=reads))
            elif name in _CUT and reads and _in_one_piece(eqn):
                known[eqn.outvars[0]] = reads[0]
            elif name in IN_PLACE and read[0] is not None:
                known[eqn.outvars[0]] = read[0]
                self.steps.append(Step(name, reads, (read[0],)))
            else:
                known |= {v: self._new(v.aval) for v in eqn.outvars}
                makes = tuple(known[v] for v in eqn.outvars)
                self.kinds |= {known[v]: (name, v.aval) for v in eqn.outvars}
                if name == "scan":
                    self.steps.append(self._loop(eqn, inside[0], read, makes))
                    continue
                if name == "broadcast_in_dim" and isinstance(eqn.invars[0], Literal):
                    self.constants[makes[0]] = _constant(eqn.outvars[0], eqn.invars[0].val)
                self.steps.append(Step(name, reads, makes, inside if name in LOOPS else ()))

    def _call(self, eqn: Any, called: Jaxpr, read: list[Any], known: dict[Any, int]) -> None:
        own = {v: self._new(v.aval) for v in called.constvars}
        for v, at, given in zip(called.invars, read, eqn.invars, strict=True):
            own[v] = self._new(given.aval) if at is None else at
        self._add(called, own)
        for v, result in zip(eqn.outvars, called.outvars, strict=True):
            known[v] = self._new(v.aval) if isinstance(result, Literal) else own[result]

    def _loop(self, eqn: Any, body: Jaxpr, read: list[Any], makes: tuple[int, ...]) -> Step:
        turns = _carry(eqn, body)
        filled = makes[len(turns) :]
        self.constants |= {
            at: _constant(v, 0) for at, v in zip(filled, eqn.outvars[len(turns) :], strict=True)
        }
        wanted = {*turns, *Walk(body).wanted()}
        reads, carried = (
            tuple(read[i] for i in which if read[i] is not None) for which in (sorted(wanted), turns)
        )
        return Step("scan", reads, makes, (body,), carried, filled, turns)

    def used(self) -> list[Step]:
        """The steps that results depend on."""
        wanted, found = set(self.results), []
        for step in reversed(self.steps):
            if step.joins or wanted.intersection(step.makes):
                wanted.update(step.reads)
                found.append(step)
        return found[::-1]

    def wanted(self) -> set[int]:
        """Which of the function's arguments its results depend on, by position."""
        read = self.results.union(*(step.reads for step in self.used()))
        return read.intersection(range(self.arguments))


def _constant(v: Any, value: Any) -> tuple[Any, ...]:
    return v.aval.shape, v.aval.dtype, complex(value)


def _in_one_piece(eqn: Any) -> bool:
    whole, part = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if any(one != 1 for one in eqn.params.get("strides") or ()):
        return False
    cut = [i for i, (size, of) in enumerate(zip(part, whole, strict=True)) if size != of]
    return not cut or all(size == 1 for size in part[: cut[-1]])


def _carry(eqn: Any, body: Jaxpr) -> range:
    """Which operands of a ``scan`` it carries: what is not sliced, behind what stays the same."""

    def stacked(outer: Any, inner: Any) -> int:
        return sum(v.aval.ndim > own.aval.ndim for v, own in zip(outer, inner, strict=True))

    collected, sliced = stacked(eqn.outvars, body.outvars), stacked(eqn.invars, body.invars)
    end = len(eqn.invars) - sliced
    return range(end - (len(eqn.outvars) - collected), end)


def inner(eqn: Any) -> Iterator[Jaxpr]:
    """The functions inside of an equation: of a call, a loop, a branch."""
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one
