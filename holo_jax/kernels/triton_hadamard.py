"""Kernels of the elementwise memory: one pass over time, sums in registers (Pallas, lowered to Triton).

A program owns ``channels`` channels of one row and walks one piece of time in tiles of ``rows * steps``
positions. A tile is ``rows`` runs of ``steps`` consecutive positions: the steps are taken one after the other
by all rows at once, so a prefix sum costs one addition a position, and only the totals of the rows are
combined across threads, once a tile, by a sum over the earlier rows that a mask selects. That sum is exactly
causal (shifted, not a difference), and the mask also makes it reset between segments.
"""

import math
import struct
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array
from holo_jax.functional.memory.state import compensated_add
from holo_jax.kernels.phasor_features import HIGH, LOW, sin_cos_reduced

Refs = dict[str, Any]
Pair = tuple[Array, Array]
_TURNS = 1.0 / (2.0 * math.pi)
_TF32_BITS = 0xFFFFE000


def _literal(x: float) -> str:
    return "0f" + struct.pack(">f", x).hex().upper()


# The reduction of phasor_features; adding and taking away 1.5 * 2^23 rounds to the nearest integer.
_REDUCE = f"""{{
    .reg .f32 n, r;
    fma.rn.f32 n, $1, {_literal(_TURNS)}, {_literal(12582912.0)};
    sub.rn.f32 n, n, {_literal(12582912.0)};
    fma.rn.f32 r, n, {_literal(-HIGH)}, $1;
    fma.rn.f32 $0, n, {_literal(-LOW)}, r;
}}"""


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


def _sin_cos(phases: Array, approximate: bool) -> tuple[Array, Array]:
    if not approximate:
        return sin_cos_reduced(phases, jnp.floor(phases * _TURNS + 0.5))
    reduced = _instruction(_REDUCE, phases)
    return _instruction("sin.approx.f32 $0, $1;", reduced), _instruction("cos.approx.f32 $0, $1;", reduced)


def _instruction(text: str, x: Array) -> Array:
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    (result,) = plgpu.elementwise_inline_asm(
        text, args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[shape]
    )
    return result


def _combine(mask: Array, totals: Array) -> Array:
    """``mask @ totals`` as a sum: a product's layout of registers would spread to everything around it."""
    return jnp.sum(jnp.where(mask[:, :, None], totals[None], 0.0), axis=1)


class _Program:
    """What the kernels share: positions, masks, loads and stores of one program."""

    def __init__(self, plan: Plan, packed: bool) -> None:
        self.plan, self.packed = plan, packed
        tiling = plan.tiling
        self.piece, self.row = pl.program_id(1) + plan.skipped, pl.program_id(2)
        self.column = pl.program_id(0)
        self.first = self.column * tiling.channels
        # Indices are arrays throughout: masked loads take either slices or arrays, and rows need masks.
        self.columns = self.first + jax.lax.iota(jnp.int32, tiling.channels)
        self.slots = jax.lax.iota(jnp.int32, tiling.rows)
        self.masked = plan.padded != plan.time

    def times(self, start: Array, step: int) -> Array:
        return start + self.slots * self.plan.tiling.steps + step

    def block(self, times: Array) -> tuple[Array, Array]:
        """Indices of ``[rows, channels]``."""
        shape = (self.plan.tiling.rows, self.plan.tiling.channels)
        return jnp.broadcast_to(times[:, None], shape), jnp.broadcast_to(self.columns[None, :], shape)

    def load(self, ref: Any, times: Array) -> Array:
        """``[rows, channels]`` in float32, 0 past the end."""
        row = 0 if ref.shape[0] == 1 else self.row
        return self._masked(ref.at[row, *self.block(times)], times, 2)

    def gate(self, ref: Any, times: Array, width: int) -> Array:
        """``[rows, 1]``: the gate of the program's head."""
        head = self.first // width
        return self._masked(ref.at[self.row, times, head], times, 1)[:, None]

    def _masked(self, view: Any, times: Array, ndim: int) -> Array:
        if not self.masked:
            return plgpu.load(view).astype(jnp.float32)
        inside = times < self.plan.time
        inside = jnp.broadcast_to(inside[:, None], view.shape) if ndim == 2 else inside
        return plgpu.load(view, mask=inside, other=0.0).astype(jnp.float32)

    def store(self, ref: Any, times: Array, values: Array) -> None:
        inside = None
        if self.masked:
            inside = jnp.broadcast_to((times < self.plan.time)[:, None], values.shape)
        plgpu.store(ref.at[self.row, *self.block(times)], values.astype(ref.dtype), mask=inside)

    def store_rows(self, ref: Any, times: Array, values: Array) -> None:
        """One number a row, in the column of this program."""
        inside = times < self.plan.time if self.masked else None
        plgpu.store(ref.at[self.row, times, self.column], values, mask=inside)

    def run(self, ref: Any, times: Array) -> Array:
        """Run indices at positions -1 to ``padded``, where the array starts at position -1."""
        return plgpu.load(ref.at[self.row, times + 1])

    def vector(self, ref: Any, index: Array) -> Array:
        return plgpu.load(ref.at[self.row, index, self.columns])

    def put_vector(self, ref: Any, index: Array, values: Array) -> None:
        plgpu.store(ref.at[self.row, index, self.columns], values)


def _where(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, 0.0)


def _scan(keys: list[Pair], written: list[Array], same: list[Any]) -> list[Pair]:
    """Sums of ``written * key`` along the steps of every row; ``same[u]``: step u continues step u - 1."""
    sums: list[Pair] = []
    for step, ((sine, cosine), value) in enumerate(zip(keys, written, strict=True)):
        real, imag = value * cosine, value * sine
        if step:
            real += _where(same[step], sums[-1][0])
            imag += _where(same[step], sums[-1][1])
        sums.append((real, imag))
    return sums


def _equal(x: Array, y: Array) -> Array:
    return (x == y)[:, None]


def forward_kernel(plan: Plan, inputs: Refs, outputs: Refs) -> None:
    """One program of the forward pass.

    Inputs, by name: ``write`` and ``values``; ``read`` (absent: the same as ``write``), ``gates``, ``runs``;
    ``start``: the state before every piece. Outputs, each where wanted: ``outputs``, ``states`` (before every
    tile) and ``end`` (after every piece).
    """
    program = _Program(plan, "runs" in inputs)
    tiling = plan.tiling
    runs, reads = inputs.get("runs"), "outputs" in outputs
    width = inputs["values"].shape[-1] // plan.heads

    def tile(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        number = program.piece * plan.tiles + index
        start = number * tiling.length
        if "states" in outputs:
            for part in (0, 1):
                program.put_vector(outputs["states"][part], number, state[2 * part] + state[2 * part + 1])
        times = [program.times(start, step) for step in range(tiling.steps)]
        phases = [program.load(inputs["write"], t) for t in times]
        queries = [program.load(inputs["read"], t) for t in times] if "read" in inputs and reads else None
        values = [program.load(inputs["values"], t) for t in times]
        if "gates" in inputs:
            values = [v * program.gate(inputs["gates"], t, width) for v, t in zip(values, times, strict=True)]
        here: Any = None
        before: Any = None
        same: list[Any] = [None] * tiling.steps
        if runs is not None:
            before = program.run(runs, times[0] - 1)
            here = [program.run(runs, t) for t in times]
            same = [None, *(_equal(x, y) for x, y in zip(here[1:], here[:-1], strict=True))]
        keys = [_sin_cos(p, tiling.approximate) for p in phases]
        sums = _scan(keys, values, same)
        allowed = program.slots[:, None] > program.slots[None, :]
        last: Any = None
        came: Any = None
        survives: Any = None
        if here is not None:
            came, last = program.run(runs, start - 1), program.run(runs, start + tiling.length - 1)
            allowed &= before[:, None] == here[-1][None, :]
            survives = came == last
        if reads:
            read_keys = keys if queries is None else [_sin_cos(q, tiling.approximate) for q in queries]
            prefix = []
            for part in (0, 1):
                held = (state[2 * part] + state[2 * part + 1])[None, :]
                if here is not None:
                    held = jnp.where(_equal(before, came), held, 0.0)
                prefix.append(_combine(allowed, sums[-1][part]) + held)
            for step, (sine, cosine) in enumerate(read_keys):
                sees = None if here is None else _equal(here[step], before)
                real, imag = (s + _where(sees, p) for s, p in zip(sums[step], prefix, strict=True))
                program.store(outputs["outputs"], times[step], cosine * real + sine * imag)
        after: list[Array] = []
        for part in (0, 1):
            total = sums[-1][part]
            if here is not None:
                total = jnp.where(_equal(here[-1], last), total, 0.0)
            added = jnp.sum(total, axis=0)
            high, low = compensated_add(state[2 * part], state[2 * part + 1], added)
            if survives is not None:
                high, low = jnp.where(survives, high, added), jnp.where(survives, low, 0.0)
            after += [high, low]
        return tuple(after)

    state = tuple(program.vector(ref, program.piece) for ref in inputs["start"])
    state = jax.lax.fori_loop(0, plan.tiles, tile, state)
    for ref, part in zip(outputs["end"], state, strict=True):
        program.put_vector(ref, program.piece, part)


def backward_kernel(plan: Plan, inputs: Refs, outputs: Refs) -> None:
    """One program of the backward pass, from the last tile of its piece to the first.

    Inputs as in the forward pass, further ``d_outputs``, ``d_end``: the cotangent of the state after every
    piece, and ``states`` if the gradients of the phases are wanted. Outputs, each where wanted: ``d_values``,
    ``d_write``, ``d_read`` (of equal phases only ``d_write``, the sum), ``d_gates`` (one number a program),
    ``d_start``.

    With ``G_t = dy_t e^{i b_t} + G_{t+1}``: ``dv = g Re(e^{-ia} G)``, ``dg = sum v Re(e^{-ia} G)``,
    ``da = g v Im(e^{-ia} G)``, ``db = dy Im(e^{-ib} M)``; M is summed again from the state before the tile.
    """
    program = _Program(plan, "runs" in inputs)
    tiling, runs = plan.tiling, inputs.get("runs")
    steps = range(tiling.steps)
    width = inputs["d_outputs"].shape[-1] // plan.heads
    turned = "d_write" in outputs
    full = "d_values" in outputs
    valued = turned or "d_gates" in outputs

    def tile(index: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        number = program.piece * plan.tiles + (plan.tiles - 1 - index)
        start = number * tiling.length
        times = [program.times(start, step) for step in steps]
        apart = "read" in inputs
        queries = [program.load(inputs["read" if apart else "write"], t) for t in times]
        phases = [program.load(inputs["write"], t) for t in times] if apart and full else queries
        cotangents = [program.load(inputs["d_outputs"], t) for t in times]
        values: Any = [program.load(inputs["values"], t) for t in times] if valued else None
        gates = (
            [program.gate(inputs["gates"], t, width) for t in times] if full and "gates" in inputs else None
        )
        here: Any = None
        before: Any = None
        same: list[Any] = [None] * tiling.steps
        if runs is not None:
            before = program.run(runs, times[0] - 1)
            here = [program.run(runs, t) for t in times]
            same = [None, *(_equal(x, y) for x, y in zip(here[1:], here[:-1], strict=True))]
        read_keys = [_sin_cos(q, tiling.approximate) for q in queries]
        keys = [_sin_cos(p, tiling.approximate) for p in phases] if apart and full else read_keys
        written: Any = values
        if values is not None and gates is not None:
            written = [v * g for v, g in zip(values, gates, strict=True)]
        pulls = []
        if turned:
            sums = _scan(keys, written, same)
            allowed = program.slots[:, None] > program.slots[None, :]
            if here is not None:
                allowed &= before[:, None] == here[-1][None, :]
            prefix = []
            for part in (0, 1):
                held = program.vector(inputs["states"][part], number)[None, :]
                if here is not None:
                    held = jnp.where(_equal(before, program.run(runs, start - 1)), held, 0.0)
                prefix.append(_combine(allowed, sums[-1][part]) + held)
            for step, (sine, cosine) in enumerate(read_keys):
                sees = None if here is None else _equal(here[step], before)
                real, imag = (s + _where(sees, p) for s, p in zip(sums[step], prefix, strict=True))
                pull = cotangents[step] * (cosine * imag - sine * real)
                if apart:
                    program.store(outputs["d_read"], times[step], pull)
                else:
                    pulls.append(pull)
        backwards = [None, *reversed(same[1:])]
        later = _scan(read_keys[::-1], cotangents[::-1], backwards)[::-1]
        came: Any = None
        if here is not None:
            came = program.run(runs, start + tiling.length)
        if full:
            allowed = program.slots[:, None] < program.slots[None, :]
            if here is not None:
                allowed &= here[-1][:, None] == here[0][None, :]
            suffix = []
            for part in (0, 1):
                held = state[part][None, :]
                if here is not None:
                    held = jnp.where(_equal(here[-1], came), held, 0.0)
                suffix.append(_combine(allowed, later[0][part]) + held)
            for step, (sine, cosine) in enumerate(keys):
                sees = None if here is None else _equal(here[step], here[-1])
                real, imag = (s + _where(sees, p) for s, p in zip(later[step], suffix, strict=True))
                along = cosine * real + sine * imag
                if "d_gates" in outputs:
                    program.store_rows(outputs["d_gates"], times[step], jnp.sum(values[step] * along, axis=1))
                if turned:
                    pull = written[step] * (cosine * imag - sine * real)
                    pull = pull if apart else pull + pulls[step]
                    program.store(outputs["d_write"], times[step], pull)
                along = along if gates is None else gates[step] * along
                program.store(outputs["d_values"], times[step], along)
        after = []
        for part in (0, 1):
            total, held = later[0][part], state[part]
            if here is not None:
                first = program.run(runs, start)
                total = jnp.where(_equal(here[0], first), total, 0.0)
                held = jnp.where(first == came, held, 0.0)
            after.append(held + jnp.sum(total, axis=0))
        return after[0], after[1]

    state = tuple(program.vector(ref, program.piece) for ref in inputs["d_end"])
    state = jax.lax.fori_loop(0, plan.tiles, tile, state)
    for ref, part in zip(outputs["d_start"], state, strict=True):
        program.put_vector(ref, program.piece, part)


def launch(kernel: Any, plan: Plan, inputs: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    """Runs a kernel over all channels, pieces and rows; ``outputs`` holds shapes and dtypes."""
    tiling = plan.tiling
    batch, _, width = outputs["end" if "end" in outputs else "d_start"][0].shape

    def body(ins: Refs, outs: Refs) -> None:
        kernel(plan, ins, outs)

    return pl.pallas_call(
        body,
        out_shape=outputs,
        grid=(width // tiling.channels, plan.pieces if plan.taken is None else plan.taken, batch),
        compiler_params=None
        if plan.interpret
        else plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=plan.interpret,
        name=kernel.__name__,
    )(inputs)
