"""Where a program of the outer memory's kernels is: head, row and block; what it loads and stores there."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array
from holo_jax.kernels.instructions import sin_cos, sin_cos_near

Pair = tuple[Array, Array]
# Radians of a unit of int16 phases.
_UNIT = 2.0 * math.pi / 2**16


class Shape(NamedTuple):
    """How a kernel walks its block.

    Attributes:
      chunk: positions whose products with each other are matrices of their own; divides the block.
      warps: warps of a program.
      stages: depth of the compiler's load pipeline.
    """

    chunk: int = 64
    warps: int = 4
    stages: int = 1


class Tiling(NamedTuple):
    """Shapes of the programs; the results differ by rounding only.

    Attributes:
      block: positions of a program, between which states are kept.
      totals, outputs: of the forward kernels.
      reads, writes: of the backward kernels.
    """

    block: int = 512
    totals: Shape = Shape()
    outputs: Shape = Shape()
    reads: Shape = Shape()
    writes: Shape = Shape()


class Plan(NamedTuple):
    """Everything static about a call.

    Attributes:
      tiling: shapes of the programs.
      time: positions of a row.
      m, d: phasors and channels of a head.
      interpret: run in Pallas' interpreter (any platform, slow).
    """

    tiling: Tiling
    time: int
    m: int
    d: int
    interpret: bool

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.time // self.tiling.block)

    @property
    def padded(self) -> int:
        """Positions of all blocks together."""
        return self.blocks * self.tiling.block


class Chunk(NamedTuple):
    """The positions of one step of a walk.

    Attributes:
      start: the first.
      inside: which rows of ``[chunk]`` are positions of the row; None if all are.
      causal: which positions (rows) see which: earlier ones of the same segment, or later ones.
      reached: rows that see what is before the chunk; None if all do.
      last: rows that what comes after the chunk sees; None if all are.
      survives: whether what is before the chunk is seen behind it; None if it is.
    """

    start: Array
    inside: Array | None
    causal: Array
    reached: Array | None
    last: Array | None
    survives: Array | None


class Program:
    """One program: a block of one head of one row."""

    def __init__(self, plan: Plan, shape: Shape, refs: dict[str, Any]) -> None:
        self.plan, self.shape, self.refs = plan, shape, refs
        self.head, self.block, self.row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        self.first = self.block * plan.tiling.block
        self.count = plan.tiling.block // shape.chunk
        self.scale = 1.0 / math.sqrt(plan.m)

    def run(self, time: Array) -> Array:
        """Run index of a position from -1 to ``padded``, or of several."""
        return plgpu.load(self.refs["runs"].at[self.row, time + 1])

    def among(self, chunk: Chunk, time: Array) -> Array | None:
        """Which rows of a chunk are of the segment of a position; None if all are."""
        if "runs" not in self.refs:
            return None
        return self.run(chunk.start + jax.lax.iota(jnp.int32, self.shape.chunk)) == self.run(time)

    def chunk(self, number: Array, *, later: bool = False) -> Chunk:
        """The chunk of a number, whose rows see earlier positions, or later ones."""
        size = self.shape.chunk
        start = self.first + number * size
        slots = jax.lax.iota(jnp.int32, size)
        inside = None if self.plan.padded == self.plan.time else start + slots < self.plan.time
        causal = slots[:, None] <= slots[None, :] if later else slots[:, None] >= slots[None, :]
        if "runs" not in self.refs:
            return Chunk(start, inside, causal, None, None, None)
        here = self.run(start + slots)
        causal = causal & (here[:, None] == here[None, :])
        before, last = self.run(start - 1), self.run(start + size - 1)
        return Chunk(start, inside, causal, here == before, here == last, before == last)

    def load(self, name: str, chunk: Chunk) -> Array:
        """``[chunk, width]`` of the head, 0 past the end of the row."""
        ref = self.refs[name]
        row = jnp.int32(0) if ref.shape[0] == 1 else self.row
        view = ref.at[row, pl.ds(chunk.start, self.shape.chunk), self.head, :]
        if chunk.inside is None:
            return plgpu.load(view)
        return plgpu.load(view, mask=jnp.broadcast_to(chunk.inside[:, None], view.shape), other=0)

    def gates(self, chunk: Chunk) -> Array | None:
        """``[chunk, 1]`` of ``[b, h, t]``, or None without gates."""
        if "gates" not in self.refs:
            return None
        view = self.refs["gates"].at[self.row, self.head, pl.ds(chunk.start, self.shape.chunk)]
        found = plgpu.load(view) if chunk.inside is None else plgpu.load(view, mask=chunk.inside, other=0)
        return found[:, None]

    def store(self, ref: Any, chunk: Chunk, x: Array) -> None:
        """Stores ``[chunk, width]`` of the head; nothing past the end of the row."""
        mask = None if chunk.inside is None else jnp.broadcast_to(chunk.inside[:, None], x.shape)
        view = ref.at[self.row, pl.ds(chunk.start, self.shape.chunk), self.head, :]
        plgpu.store(view, x.astype(ref.dtype), mask=mask)

    def store_gates(self, ref: Any, chunk: Chunk, x: Array) -> None:
        """Stores ``[chunk]`` of ``[b, h, t]``; nothing past the end of the row."""
        view = ref.at[self.row, self.head, pl.ds(chunk.start, self.shape.chunk)]
        plgpu.store(view, x, mask=chunk.inside)

    def features(self, phases: Array, gates: Array | None, dtype: Any) -> Pair:
        """``cos`` and ``sin`` of phases over ``sqrt(m)``, times gates, rounded once.

        Phases are float32 radians or int16 units of 2^-16 turns.
        """
        factor = self.scale if gates is None else self.scale * gates

        def turned(_: Any, __: Any) -> Pair:
            if phases.dtype == jnp.float32:
                sine, cosine = sin_cos(phases, not self.plan.interpret)
            else:
                sine, cosine = sin_cos_near(_UNIT * phases.astype(jnp.float32), not self.plan.interpret)
            return (factor * cosine).astype(dtype), (factor * sine).astype(dtype)

        # In a loop of one turn: a transposed operand would be worked out once more, from transposed phases.
        zero = jnp.zeros(phases.shape, dtype)
        return jax.lax.fori_loop(0, 1, turned, (zero, zero))

    def state(self, ref: Any) -> Pair:
        """``[d, m]`` of cosines and of sines before (or after) the block, float32."""
        cosine, sine = (
            plgpu.load(ref.at[self.row, self.head, self.block, jnp.int32(part)]) for part in (0, 1)
        )
        return cosine.astype(jnp.float32), sine.astype(jnp.float32)

    def put_state(self, ref: Any, state: Pair) -> None:
        """Stores what ``state`` loads."""
        for part, x in enumerate(state):
            plgpu.store(ref.at[self.row, self.head, self.block, jnp.int32(part)], x.astype(ref.dtype))

    def zero_state(self) -> Pair:
        """An empty state."""
        zero = jnp.zeros((self.plan.d, self.plan.m), jnp.float32)
        return zero, zero


def selected(mask: Array | None, x: Array) -> Array:
    """Rows of x that a mask ``[chunk]`` selects, others 0; x itself without a mask."""
    return x if mask is None else jnp.where(mask[:, None], x, jnp.zeros_like(x))


def survived(chunk: Chunk, state: Pair) -> Pair:
    """What of a state is seen on the chunk's other side."""
    if chunk.survives is None:
        return state
    return jnp.where(chunk.survives, state[0], 0.0), jnp.where(chunk.survives, state[1], 0.0)


def product(x: Array, y: Array, x_axis: int = 1, y_axis: int = 0) -> Array:
    """A product summed over one axis of each, in float32."""
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)
