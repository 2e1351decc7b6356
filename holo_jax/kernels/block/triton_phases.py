"""Kernels from raw phases and gates to features: two short convolutions, sine and cosine, in one pass.

Or to phases in units of 2^-16 turns, a quarter of the bytes of features, for kernels that make their own.

A program owns one head of one row and walks a stretch of time in ``rows`` runs of ``steps`` positions. A run
is walked position by position with the last few phases in registers, so a convolution costs no further reads
but a few positions at the border of a run. What a position needs is asked for a few positions earlier: reads
do not pass stores, and each would be waited for alone. The gates of a head stand in columns of their own
behind all phases; the first of them, the write gate, may multiply the keys. Columns behind those are ignored
(Pallas, lowered to Triton).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array
from holo_jax.kernels.instructions import sin_cos, turn_units


class Walk(NamedTuple):
    """What is static about a call.

    Attributes:
      m: phasors of a head, a power of two.
      taps: taps of a convolution.
      rows: runs of a program.
      steps: positions of a run.
      ahead: positions for which reads are under way.
      gated: whether the first gate multiplies the features of write phases.
      turns: whether phases are given in units of 2^-16 turns, not as features.
      interpret: run in Pallas' interpreter, anywhere.
    """

    m: int
    taps: int
    rows: int = 8
    steps: int = 32
    ahead: int = 4
    gated: bool = False
    turns: bool = False
    interpret: bool = False


class _Place:
    """Where one program is in the arrays."""

    def __init__(self, walk: Walk, time: int, inside: Any) -> None:
        self.walk, self.time, self.inside = walk, time, inside
        self.row, self.piece, self.head = pl.program_id(2), pl.program_id(1), pl.program_id(0)
        self.columns = self.head * walk.m + jax.lax.iota(jnp.int32, walk.m)
        self.cosines = self.head * (2 * walk.m) + jax.lax.iota(jnp.int32, walk.m)
        # The first position of every run.
        self.start = (self.piece * walk.rows + jax.lax.iota(jnp.int32, walk.rows)) * walk.steps

    def _view(self, ref: Any, times: Array, columns: Array) -> tuple[Any, Array]:
        shape = (self.walk.rows, self.walk.m)
        here = (times >= 0) & (times < self.time)
        at = (self.row, jnp.broadcast_to(times[:, None], shape), jnp.broadcast_to(columns[None, :], shape))
        return ref.at[at], jnp.broadcast_to(here[:, None], shape)

    def load(self, ref: Any, times: Array, columns: Array) -> Array:
        """``[rows, m]``, 0 outside of the row."""
        view, here = self._view(ref, times, columns)
        return plgpu.load(view, mask=here, other=0.0)

    def store(self, ref: Any, times: Array, columns: Array, x: Array, wanted: Any = True) -> None:
        """Stores ``[rows, m]`` in the dtype of the array, where it is ``wanted``."""
        view, here = self._view(ref, times, columns)
        plgpu.store(view, x.astype(ref.dtype), mask=here & wanted)

    def load_column(self, ref: Any, times: Array, column: Array) -> Array:
        """``[rows]`` of one column, 0 outside of the row."""
        here = (times >= 0) & (times < self.time)
        return plgpu.load(ref.at[self.row, times, column], mask=here, other=0.0).astype(jnp.float32)

    def store_column(self, ref: Any, times: Array, column: Array, x: Array, wanted: Array) -> None:
        """Stores ``[rows]`` in one column, where it is ``wanted``."""
        here = (times >= 0) & (times < self.time) & wanted
        plgpu.store(ref.at[self.row, times, column], x.astype(ref.dtype), mask=here)

    def clear_columns(self, ref: Any, first: int) -> None:
        """Stores 0 in the columns from ``first`` on, of all positions; one head's programs do."""
        count = ref.shape[-1] - first
        if not count:
            return
        columns = first + jax.lax.iota(jnp.int32, pl.next_power_of_2(count))

        def clear(step: Array, _: None) -> None:
            at = jnp.broadcast_arrays((self.start + step)[:, None], columns[None])
            here = (at[0] < self.time) & (at[1] < ref.shape[-1])
            plgpu.store(ref.at[self.row, *at], jnp.zeros(here.shape, ref.dtype), mask=here)

        @pl.when(self.head == 0)
        def every() -> None:
            jax.lax.fori_loop(0, self.walk.steps, clear, None)

    def load_gate(self, ref: Any, times: Array) -> Array:
        """``[rows]`` of the head of ``[b, h, t]``, 0 outside of the row."""
        here = (times >= 0) & (times < self.time)
        return plgpu.load(ref.at[self.row, self.head, times], mask=here, other=0.0)

    def store_gate(self, ref: Any, times: Array, x: Array) -> None:
        """Stores ``[rows]`` in the head of ``[b, h, t]``."""
        here = (times >= 0) & (times < self.time)
        plgpu.store(ref.at[self.row, self.head, times], x, mask=here)

    def reach(self, times: Array) -> Array | None:
        """Positions inside their segments, ``[rows, 1]``; None where every row is one segment."""
        if self.inside is None:
            return None
        row = 0 if self.inside.shape[0] == 1 else self.row
        here = (times >= 0) & (times < self.time)
        return plgpu.load(self.inside.at[row, times], mask=here, other=0)[:, None]


def _begin(place: _Place, raw: Any, read: Callable[[Any], Any]) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    """(phases of the positions before each run, what is read for its first)."""
    walk = place.walk
    earlier = tuple(place.load(raw, place.start - delay, place.columns) for delay in range(1, walk.taps))
    return earlier, tuple(read(step) for step in range(walk.ahead))


def _within(reach: Array | None, delay: int, x: Array) -> Array:
    return x if reach is None or delay == 0 else jnp.where(reach >= delay, x, 0.0)


def _convolved(weights: list[Array], shifted: list[Array]) -> Array:
    total = weights[0] * shifted[0]
    for weight, x in zip(weights[1:], shifted[1:], strict=True):
        total = total + weight * x
    return total


def _weights(place: _Place, taps: Any) -> list[list[Array]]:
    """Of the write and the read convolution, the weight of every delay, ``[1, m]``."""
    k = place.walk.taps
    load = lambda which, delay: plgpu.load(taps.at[which, k - 1 - delay, place.columns])[None]  # noqa: E731
    return [[load(which, delay) for delay in range(k)] for which in (0, 1)]


class _Gates:
    """The gates of a program's head: sigmoids of the columns behind the phases, with a bias a head."""

    def __init__(self, place: _Place, raw: Any, bias: Any) -> None:
        count, heads = bias.shape
        self.place, self.raw = place, raw
        self.columns = [heads * place.walk.m + kind * heads + place.head for kind in range(count)]
        self.bias = [bias[kind, place.head] for kind in range(count)]

    def load(self, times: Array) -> tuple[Array, ...]:
        """The raw columns, ``[rows]`` each."""
        return tuple(self.place.load_column(self.raw, times, column) for column in self.columns)

    def opened(self, loaded: tuple[Array, ...]) -> list[Array]:
        """Of what ``load`` returned."""
        return [jax.nn.sigmoid(x + bias) for x, bias in zip(loaded, self.bias, strict=True)]


def forward(
    walk: Walk, raw: Array, taps: Array, bias: Array, inside: Array | None, dtype: Any
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Features of write and read phases, ``[b, t, 2 w]``, heads side by side, and gates ``[b, h, t]``.

    Of a walk with ``turns``, int16 phases ``[b, t, w]`` in place of features.

    Args:
      walk: shape of a program.
      raw: float32 ``[b, t, w + g h]`` or wider: raw phases, then g raw gates a head, those of one kind side
        by side.
      taps: float32 ``[2, k, w]`` of the write and the read convolution.
      bias: float32 ``[g, h]``, added to the raw gates.
      inside: int32 positions inside segments, ``[b or 1, t]``; None where every row is one segment.
      dtype: of the features; gates are float32.
    """
    b, t, _ = raw.shape
    width, (count, heads) = taps.shape[-1], bias.shape
    scale = 1.0 / math.sqrt(walk.m)
    k = walk.taps
    inputs = {"raw": raw, "taps": taps, "bias": bias} | ({} if inside is None else {"inside": inside})

    def kernel(ins: dict[str, Any], outs: dict[str, Any]) -> None:
        place = _Place(walk, t, ins.get("inside"))
        weights = _weights(place, ins["taps"])
        gates = _Gates(place, ins["raw"], ins["bias"])

        def read(step: Any) -> Any:
            times = place.start + step
            return place.load(ins["raw"], times, place.columns), gates.load(times), place.reach(times)

        def visit(step: Array, carry: Any) -> Any:
            earlier, (here, *later) = carry
            later = (*later, read(step + walk.ahead))
            phases, opened, reach = here[0], gates.opened(here[1]), here[2]
            times = place.start + step
            seen = (phases, *earlier)
            shifted = [_within(reach, delay, seen[delay]) for delay in range(k)]
            for kind, gate in enumerate(opened):
                place.store_gate(outs["gates"][kind], times, gate)
            scales = (scale * opened[0][:, None] if walk.gated else scale, scale)
            for own, size, out in zip(weights, scales, (outs["keys"], outs["queries"]), strict=True):
                convolved = _convolved(own, shifted)
                if walk.turns:
                    place.store(out, times, place.columns, turn_units(convolved, not walk.interpret))
                    continue
                sine, cosine = sin_cos(convolved, not walk.interpret)
                place.store(out, times, place.cosines, size * cosine)
                place.store(out, times, place.cosines + walk.m, size * sine)
            return seen[: k - 1], later

        jax.lax.fori_loop(0, walk.steps, visit, _begin(place, ins["raw"], read))

    shape = jax.ShapeDtypeStruct((b, t, width), jnp.int16)
    if not walk.turns:
        shape = jax.ShapeDtypeStruct((b, t, 2 * width), dtype)
    gate = jax.ShapeDtypeStruct((b, heads, t), jnp.float32)
    found = pl.pallas_call(
        kernel,
        out_shape={"keys": shape, "queries": shape, "gates": (gate,) * count},
        grid=_grid(walk, b, t, width),
        compiler_params=_parameters(walk),
        interpret=walk.interpret,
        name="phase_features_forward",
    )(inputs)
    return found["keys"], found["queries"], tuple(found["gates"])


def backward(
    walk: Walk,
    raw: Array,
    taps: Array,
    bias: Array,
    inside: Array | None,
    d_keys: Array,
    d_queries: Array,
    d_gates: tuple[Array, ...],
) -> tuple[Array, Array, Array]:
    """Gradients of ``raw`` in the dtype of ``d_keys``, and of ``taps`` and ``bias`` in float32.

    That of the columns that are ignored is 0. Of a walk with ``turns``, ``d_keys`` and ``d_queries`` are
    gradients of phases, by radians.
    """
    b, t, _ = raw.shape
    width, (count, heads) = taps.shape[-1], bias.shape
    scale = 1.0 / math.sqrt(walk.m)
    k = walk.taps
    grid = _grid(walk, b, t, width)
    inputs = {"raw": raw, "taps": taps, "bias": bias, "d_features": (d_keys, d_queries), "d_gates": d_gates}
    inputs |= {} if inside is None else {"inside": inside}

    def kernel(ins: dict[str, Any], outs: dict[str, Any]) -> None:
        place = _Place(walk, t, ins.get("inside"))
        weights = _weights(place, ins["taps"])
        gates = _Gates(place, ins["raw"], ins["bias"])
        zero = jnp.zeros((walk.rows, walk.m), jnp.float32)

        def read(step: Any) -> Any:
            times = place.start + step
            starts = (place.columns,) if walk.turns else (place.cosines, place.cosines + walk.m)
            d_features = tuple(
                tuple(place.load(source, times, start) for start in starts) for source in ins["d_features"]
            )
            d_opened = tuple(place.load_gate(ref, times) for ref in ins["d_gates"])
            phases = place.load(ins["raw"], times, place.columns)
            return phases, gates.load(times), place.reach(times), d_features, d_opened

        def visit(step: Array, carry: Any) -> Any:
            (earlier, (here, *later)), open_, sums, biases = carry
            later = (*later, read(step + walk.ahead))
            phases, loaded, reach, d_features, d_opened = here
            # Positions behind a run only add to the gradients of its last ones.
            own_step = step < walk.steps
            times = place.start + step
            seen = (phases, *earlier)
            shifted = [_within(reach, delay, seen[delay]) for delay in range(k)]
            opened, d_opened = gates.opened(loaded), list(d_opened)
            # Gradients of this position and of the k - 1 before it.
            adding, sums = [zero, *open_], list(sums)
            for which, (own, pulls) in enumerate(zip(weights, d_features, strict=True)):
                if walk.turns:
                    pull = pulls[0].astype(jnp.float32)
                else:
                    d_cosine, d_sine = (x.astype(jnp.float32) for x in pulls)
                    sine, cosine = sin_cos(_convolved(own, shifted), not walk.interpret)
                    pull = scale * (cosine * d_sine - sine * d_cosine)
                if walk.gated and which == 0:
                    pull = opened[0][:, None] * pull
                    along = jnp.sum(cosine * d_cosine + sine * d_sine, axis=1)
                    d_opened[0] = d_opened[0] + scale * along
                counted = jnp.where(own_step, pull, 0.0)
                for delay in range(k):
                    at = which * k + k - 1 - delay
                    sums[at] = sums[at] + shifted[delay] * counted
                    adding[delay] = adding[delay] + _within(reach, delay, own[delay] * pull)
            added = []
            for kind, (gate, d_gate) in enumerate(zip(opened, d_opened, strict=True)):
                # 0 outside of the row, where both parts of the gradient are.
                d_raw = jnp.where(own_step, d_gate * gate * (1.0 - gate), 0.0)
                place.store_column(outs["d_raw"], times, gates.columns[kind], d_raw, own_step)
                added.append(biases[kind] + d_raw)
            place.store(outs["d_raw"], times - (k - 1), place.columns, adding[-1], step >= k - 1)
            return (seen[: k - 1], later), tuple(adding[:-1]), tuple(sums), tuple(added)

        none = (zero,) * (2 * k), (jnp.zeros((walk.rows,), jnp.float32),) * count
        begin = _begin(place, ins["raw"], read), (zero,) * (k - 1), *none
        _, _, sums, biases = jax.lax.fori_loop(0, walk.steps + k - 1, visit, begin)
        place.clear_columns(outs["d_raw"], width + count * heads)
        for at, total in enumerate(sums):
            view = outs["sums"].at[place.row, place.piece, at * width + place.columns]
            plgpu.store(view, jnp.sum(total, axis=0))
        for kind, total in enumerate(biases):
            view = outs["sums"].at[place.row, place.piece, 2 * k * width + kind * heads + place.head]
            plgpu.store(view, jnp.sum(total))

    found = pl.pallas_call(
        kernel,
        out_shape={
            "d_raw": jax.ShapeDtypeStruct(raw.shape, d_keys.dtype),
            "sums": jax.ShapeDtypeStruct((b, grid[1], 2 * k * width + count * heads), jnp.float32),
        },
        grid=grid,
        compiler_params=_parameters(walk),
        interpret=walk.interpret,
        name="phase_features_backward",
    )(inputs)
    d_taps, d_bias = jnp.split(jnp.sum(found["sums"], axis=(0, 1)), (2 * k * width,))
    return found["d_raw"], d_taps.reshape(taps.shape), d_bias.reshape(bias.shape)


def _grid(walk: Walk, b: int, t: int, width: int) -> tuple[int, int, int]:
    return width // walk.m, -(-t // (walk.rows * walk.steps)), b


def _parameters(walk: Walk) -> Any:
    return None if walk.interpret else plgpu.CompilerParams(num_warps=4, num_stages=1)
