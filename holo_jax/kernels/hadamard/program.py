"""What the Triton kernels share: how a call is cut; loads, stores, sines and sums of one program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array
from holo_jax.functional.memory.state import compensated_add

Pair = tuple[Array, Array]
State = tuple[Array, Array, Array, Array]


class Tiling(NamedTuple):
    """Shape of a program; the results differ by rounding only.

    Attributes:
      rows: runs of consecutive positions in a tile.
      steps: positions of a run.
      channels: channels of a program; divides the channels of a head.
      warps: warps of a program.
      stages: depth of the compiler's own load pipeline.
      approximate: the hardware's sine and cosine (error 7e-7 after the reduction) in place of polynomials.
    """

    rows: int = 8
    steps: int = 8
    channels: int = 64
    warps: int = 4
    stages: int = 1
    approximate: bool = True

    @property
    def length(self) -> int:
        """Positions of a tile."""
        return self.rows * self.steps


class Plan(NamedTuple):
    """Everything static about a call.

    Attributes:
      tiling: shape of a program.
      time: positions of a row.
      tiles: tiles of a piece.
      pieces: pieces of a row.
      heads: heads, over which the channels are spread.
      interpret: run in Pallas' interpreter (any platform, slow).
      skipped: pieces at the beginning of a row that no program takes.
      taken: pieces that programs take; all if None.
    """

    tiling: Tiling
    time: int
    tiles: int
    pieces: int
    heads: int
    interpret: bool
    skipped: int = 0
    taken: int | None = None

    @property
    def padded(self) -> int:
        """Positions of all pieces together."""
        return self.pieces * self.tiles * self.tiling.length


def combine(mask: Array, totals: Array) -> Array:
    """``mask @ totals`` as a sum: a product's layout of registers would spread to everything around it."""
    return jnp.sum(jnp.where(mask[:, :, None], totals[None], 0.0), axis=1)


class Runs:
    """The runs (segments) that a tile of a forward walk meets; nothing but order where there are none.

    Attributes:
      same: step by step, which rows go on with the run of the position before, ``[rows, 1]`` or None.
      sees: the same for the position before the row.
      allowed: ``[to, from]``, rows whose totals belong to what is before a later row.
      reached: rows before which the state still holds, or None.
      last: rows that end in the tile's last run, or None.
      survives: whether the state's run is that one, or None.
    """

    def __init__(self, program: "Program", ref: Any, start: Array, times: list[Array]) -> None:
        steps = len(times)
        self.same: list[Any] = [None] * steps
        self.sees: list[Any] = [None] * steps
        self.reached = self.last = self.survives = None
        self.allowed = program.slots[:, None] > program.slots[None, :]
        if ref is None:
            return
        before = program.run(ref, times[0] - 1)
        here = [program.run(ref, t) for t in times]
        came, last = program.run(ref, start - 1), program.run(ref, start + program.plan.tiling.length - 1)
        self.same = [equal(x, y) for x, y in zip(here, [before, *here[:-1]], strict=True)]
        self.sees = [equal(x, before) for x in here]
        self.allowed = self.allowed & (before[:, None] == here[-1][None, :])
        self.reached, self.last = equal(before, came), equal(here[-1], last)
        self.survives = came == last


def before_rows(state: State, totals: Pair, runs: Runs) -> Pair:
    """What the rows of a tile find, by part: the totals of earlier rows of their runs, and the state."""
    found = []
    for part, total in enumerate(totals):
        held = (state[2 * part] + state[2 * part + 1])[None, :]
        found.append(combine(runs.allowed, total) + where(runs.reached, held))
    return found[0], found[1]


def after_tile(state: State, totals: Pair, runs: Runs) -> State:
    """The state, a compensated sum by part, after a tile with these totals of its rows."""
    after: list[Array] = []
    for part, total in enumerate(totals):
        added = jnp.sum(where(runs.last, total), axis=0)
        high, low = compensated_add(state[2 * part], state[2 * part + 1], added)
        if runs.survives is not None:
            high, low = jnp.where(runs.survives, high, added), jnp.where(runs.survives, low, 0.0)
        after += [high, low]
    return after[0], after[1], after[2], after[3]


class Program:
    """Where one program is in the arrays: its row, piece and channels; loads and stores there.

    Times count along the walk; ``backwards`` the walk begins at the last position of the row.
    """

    def __init__(self, plan: Plan, *, backwards: bool = False) -> None:
        self.plan, self.backwards = plan, backwards
        tiling = plan.tiling
        self.piece, self.row = pl.program_id(1) + plan.skipped, pl.program_id(2)
        self.column = pl.program_id(0)
        self.first = self.column * tiling.channels
        # Indices are arrays throughout: masked loads take either slices or arrays, and rows need masks.
        self.columns = self.first + jax.lax.iota(jnp.int32, tiling.channels)
        self.slots = jax.lax.iota(jnp.int32, tiling.rows)
        self.masked = plan.padded != plan.time

    def times(self, start: Array, step: int) -> Array:
        """Positions of all rows at one step of the tile that begins at ``start``."""
        return start + self.slots * self.plan.tiling.steps + step

    def place(self, times: Array) -> Array:
        """Where in the arrays a time is."""
        return self.plan.time - 1 - times if self.backwards else times

    def block(self, times: Array) -> tuple[Array, Array]:
        """Indices of ``[rows, channels]``."""
        shape = (self.plan.tiling.rows, self.plan.tiling.channels)
        places = self.place(times)
        return jnp.broadcast_to(places[:, None], shape), jnp.broadcast_to(self.columns[None, :], shape)

    def load(self, ref: Any, times: Array) -> Array:
        """``[rows, channels]`` in float32, 0 past the end."""
        row = 0 if ref.shape[0] == 1 else self.row
        return self._masked(ref.at[row, *self.block(times)], times, 2)

    def gate(self, ref: Any, times: Array, width: int) -> Array:
        """``[rows, 1]``: the gate of the program's head."""
        head = self.first // width
        return self._masked(ref.at[self.row, self.place(times), head], times, 1)[:, None]

    def factor(self, ref: Any, times: Array) -> Array:
        """``[rows, 1]``: what positions are multiplied by."""
        row = 0 if ref.shape[0] == 1 else self.row
        return self._masked(ref.at[row, self.place(times)], times, 1)[:, None]

    def _masked(self, view: Any, times: Array, ndim: int) -> Array:
        if not self.masked:
            return plgpu.load(view).astype(jnp.float32)
        inside = times < self.plan.time
        inside = jnp.broadcast_to(inside[:, None], view.shape) if ndim == 2 else inside
        return plgpu.load(view, mask=inside, other=0.0).astype(jnp.float32)

    def store(self, ref: Any, times: Array, values: Array) -> None:
        """``[rows, channels]`` in the dtype of the array; nothing past the end."""
        inside = None
        if self.masked:
            inside = jnp.broadcast_to((times < self.plan.time)[:, None], values.shape)
        plgpu.store(ref.at[self.row, *self.block(times)], values.astype(ref.dtype), mask=inside)

    def store_rows(self, ref: Any, times: Array, values: Array) -> None:
        """One number a row, in the column of this program."""
        inside = times < self.plan.time if self.masked else None
        plgpu.store(ref.at[self.row, self.place(times), self.column], values, mask=inside)

    def run(self, ref: Any, times: Array) -> Array:
        """Run indices at times -1 to ``padded``, where the array, in the order of the walk, starts at -1."""
        return plgpu.load(ref.at[self.row, times + 1])

    def constants(self, ref: Any) -> Array:
        """``[channels]`` of ``[1 or b, width]``."""
        return plgpu.load(ref.at[0 if ref.shape[0] == 1 else self.row, self.columns])

    def vector(self, ref: Any, index: Array) -> Array:
        """``[channels]`` at one index."""
        return plgpu.load(ref.at[self.row, index, self.columns])

    def put_vector(self, ref: Any, index: Array, values: Array) -> None:
        """Stores ``[channels]`` at one index."""
        plgpu.store(ref.at[self.row, index, self.columns], values)


def where(mask: Array | None, x: Array) -> Array:
    """``x`` where the mask holds, else 0; ``x`` itself without a mask."""
    return x if mask is None else jnp.where(mask, x, 0.0)


def scan(keys: list[Pair], written: list[Array], same: list[Any]) -> list[Pair]:
    """Sums of ``written * key`` along the steps of every row; ``same[u]``: step u continues step u - 1."""
    sums: list[Pair] = []
    for step, ((sine, cosine), value) in enumerate(zip(keys, written, strict=True)):
        real, imag = value * cosine, value * sine
        if step:
            real += where(same[step], sums[-1][0])
            imag += where(same[step], sums[-1][1])
        sums.append((real, imag))
    return sums


def equal(x: Array, y: Array) -> Array:
    """``x == y`` by row, to select from ``[rows, channels]``."""
    return (x == y)[:, None]
