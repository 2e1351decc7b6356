"""Kernels of ``1 / sqrt(sum of g^2)`` over a segment so far, by which retrievals are multiplied.

A program walks a piece of one head of one row in tiles of ``_ROWS`` runs of ``_STEPS`` positions, forwards
for the sums and backwards for their gradient. A run is summed position by position; what runs, tiles and
pieces before it leave is added where it belongs to the same segment, so nothing is a difference of longer
sums. What pieces leave is found by a kernel before (Pallas, lowered to Triton).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array

# A tile of 1,024 positions takes a program of two warps about as long as one small kernel takes to start.
_ROWS, _STEPS = 64, 16
# A piece of as many tiles, or more where a row would have more pieces than a program looks back on at once.
_TILES, _MOST_PIECES = 2, 256


class _Cut:
    """How a row is cut into pieces; ``rows`` and ``steps`` are the shape of a tile."""

    def __init__(self, time: int, interpret: bool) -> None:
        # The interpreter compiles every position of a run on its own.
        self.rows, self.steps = (4, 4) if interpret else (_ROWS, _STEPS)
        tiles = -(-time // (self.rows * self.steps))
        self.tiles = max(_TILES, -(-tiles // _MOST_PIECES))
        self.pieces = -(-tiles // self.tiles)
        self.length = self.tiles * self.rows * self.steps


class _Walk:
    """A piece of one head of one row, in either direction."""

    def __init__(self, time: int, inside: Any, cut: _Cut, *, backwards: bool) -> None:
        self.time, self.inside, self.backwards, self.cut = time, inside, backwards, cut
        self.rows, self.steps = cut.rows, cut.steps
        self.head, self.piece, self.row = (pl.program_id(axis) for axis in range(3))
        self.slots = jax.lax.iota(jnp.int32, self.rows)

    def positions(self, places: Array) -> Array:
        return self.time - 1 - places if self.backwards else places

    def _load(self, view: Any, positions: Array, other: Any) -> Array:
        return plgpu.load(view, mask=(positions >= 0) & (positions < self.time), other=other)

    def gates(self, ref: Any, positions: Array) -> Array:
        """``[rows]`` of ``[b, h, t]``."""
        return self._load(ref.at[self.row, self.head, positions], positions, 0.0)

    def factors(self, ref: Any, positions: Array) -> Array:
        """``[rows]`` of ``[b, t, h]``."""
        return self._load(ref.at[self.row, positions, self.head], positions, 0.0)

    def begin(self, positions: Array) -> Array | None:
        """Where the segments of positions begin; None where every row is one."""
        if self.inside is None:
            return None
        row = 0 if self.inside.shape[0] == 1 else self.row
        return positions - self._load(self.inside.at[row, positions], positions, 0)

    def before(self, totals: Any) -> tuple[Array, Array]:
        """(sum, segment) in which this piece finds the walk; pieces leave ``totals``, ``[b, h, n]``."""
        if totals is None:
            return jnp.float32(0), jnp.int32(-1)
        pieces = jax.lax.iota(jnp.int32, pl.next_power_of_2(self.cut.pieces - 1))
        there = pieces < jnp.minimum(self.piece, self.cut.pieces - 1)
        left = plgpu.load(totals.at[self.row, self.head, pieces], mask=there, other=0.0)
        ends = self.begin(self.positions((pieces + 1) * self.cut.length - 1))
        if ends is None:
            return jnp.sum(left), jnp.int32(-1)
        own = jnp.sum(jnp.where(pieces == self.piece - 1, ends, 0))
        return jnp.sum(jnp.where(ends == own, left, 0.0)), jnp.where(self.piece > 0, own, -1)

    def run(
        self,
        added: Callable[[Array], Array],
        before: tuple[Array, Array],
        store: Callable[[Array, Array], None] | None,
    ) -> Array:
        """Stores sums of what positions have ``added``, from where the walk came into their segment.

        Returns what the piece leaves to the next: the sum in the segment of its last position.
        """
        tile = self.rows * self.steps

        def visit(index: Array, before: tuple[Array, Array]) -> tuple[Array, Array]:
            carried, segment = before
            places = index * tile + self.slots * self.steps
            previous = self.begin(self.positions(places - 1))
            begins: list[Array | None] = []
            sums: list[Array] = []
            for step in range(self.steps):
                positions = self.positions(places + step)
                begins.append(self.begin(positions))
                total = added(positions)
                if step:
                    total = total + _where(_same(begins[-1], begins[-2]), sums[-1])
                sums.append(total)
            earlier = self.slots[None, :] < self.slots[:, None]
            if previous is not None and begins[-1] is not None:
                earlier = earlier & (begins[-1][None, :] == previous[:, None])
            left = jnp.sum(jnp.where(earlier, sums[-1][None, :], 0.0), axis=1)
            left = left + _where(None if previous is None else previous == segment, carried)
            for step, begin in enumerate(begins):
                sums[step] = sums[step] + _where(_same(begin, previous), left)
                if store is not None:
                    store(self.positions(places + step), sums[step])
            last = self.slots == self.rows - 1
            after = segment if begins[-1] is None else jnp.sum(jnp.where(last, begins[-1], 0))
            return jnp.sum(jnp.where(last, sums[-1], 0.0)), after

        first = self.piece * self.cut.tiles
        carried, _ = jax.lax.fori_loop(first, first + self.cut.tiles, visit, before)
        return carried


def _same(x: Array | None, y: Array | None) -> Array | None:
    return None if x is None or y is None else x == y


def _where(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, 0.0)


def forward(gates: Array, inside: Array | None, *, eps: float, interpret: bool) -> Array:
    """``1 / sqrt(sum of g^2 + eps)``, float32 ``[b, t, h]``.

    Args:
      gates: float32 ``[b, h, t]``.
      inside: int32 positions inside segments, ``[b or 1, t]``; None where every row is one segment.
      eps: added under the root.
      interpret: run in Pallas' interpreter, anywhere.
    """

    def added(walk: _Walk, ins: dict[str, Any], positions: Array) -> Array:
        return jnp.square(walk.gates(ins["gates"], positions))

    def store(walk: _Walk, ins: dict[str, Any], out: Any, positions: Array, total: Array) -> None:
        view = out.at[walk.row, positions, walk.head]
        plgpu.store(view, jax.lax.rsqrt(total + eps), mask=positions < walk.time)

    b, h, t = gates.shape
    shape = jax.ShapeDtypeStruct((b, t, h), jnp.float32)
    return _walked("write_factors_forward", {"gates": gates}, inside, shape, added, store, interpret)


def backward(
    gates: Array, factors: Array, inside: Array | None, cotangent: Array, *, interpret: bool
) -> Array:
    """The gradient of the gates, ``[b, h, t]``."""

    def added(walk: _Walk, ins: dict[str, Any], positions: Array) -> Array:
        factor = walk.factors(ins["factors"], positions)
        return -factor * factor * factor * walk.factors(ins["cotangent"], positions)

    def store(walk: _Walk, ins: dict[str, Any], out: Any, positions: Array, total: Array) -> None:
        view = out.at[walk.row, walk.head, positions]
        plgpu.store(view, total * walk.gates(ins["gates"], positions), mask=positions >= 0)

    inputs = {"gates": gates, "factors": factors, "cotangent": cotangent}
    shape = jax.ShapeDtypeStruct(gates.shape, jnp.float32)
    return _walked("write_factors_backward", inputs, inside, shape, added, store, interpret, backwards=True)


def _walked(
    name: str,
    inputs: dict[str, Array],
    inside: Array | None,
    shape: jax.ShapeDtypeStruct,
    added: Callable[..., Array],
    store: Callable[..., None],
    interpret: bool,
    backwards: bool = False,
) -> Array:
    """What ``store`` makes of the sums of ``added``; both are given the walk and the arrays."""
    b, h, t = inputs["gates"].shape
    cut = _Cut(t, interpret)
    inputs = inputs if inside is None else {**inputs, "inside": inside}

    def launch(
        kernel: Callable[..., None], given: dict[str, Array], out: jax.ShapeDtypeStruct, pieces: int
    ) -> Array:
        return pl.pallas_call(
            kernel,
            out_shape=out,
            grid=(h, pieces, b),
            compiler_params=None if interpret else plgpu.CompilerParams(num_warps=2, num_stages=1),
            interpret=interpret,
            name=name,
        )(given)

    def leave(ins: dict[str, Any], out: Any) -> None:
        walk = _Walk(t, ins.get("inside"), cut, backwards=backwards)
        left = walk.run(partial(added, walk, ins), walk.before(None), None)
        plgpu.store(out.at[walk.row, walk.head, walk.piece], left)

    def sums(ins: dict[str, Any], out: Any) -> None:
        walk = _Walk(t, ins.get("inside"), cut, backwards=backwards)
        before = walk.before(ins.get("totals"))
        walk.run(partial(added, walk, ins), before, partial(store, walk, ins, out))

    if cut.pieces > 1:
        last = cut.pieces - 1
        inputs["totals"] = launch(leave, inputs, jax.ShapeDtypeStruct((b, h, last), jnp.float32), last)
    return launch(sums, inputs, shape, cut.pieces)
