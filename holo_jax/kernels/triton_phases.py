"""Kernels from raw phases to the features of keys: two short convolutions, sine and cosine, in one pass.

A program owns one head of one row and walks a stretch of time in tiles of ``rows`` runs of ``steps``
positions. A run is walked position by position with the last few phases in registers, so a convolution costs
no further reads but a few positions at the border of a run (Pallas, lowered to Triton).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array
from holo_jax.kernels.triton_program import sin_cos


class Walk(NamedTuple):
    """What is static about a call.

    Attributes:
      m: phasors of a head, a power of two.
      taps: taps of a convolution.
      rows: runs of a tile.
      steps: positions of a run.
      tiles: tiles of a program.
      interpret: run in Pallas' interpreter, anywhere.
    """

    m: int
    taps: int
    rows: int = 8
    steps: int = 16
    tiles: int = 2
    interpret: bool = False


class _Place:
    """Where one program is in the arrays."""

    def __init__(self, walk: Walk, time: int, inside: Any) -> None:
        self.walk, self.time, self.inside = walk, time, inside
        self.row, self.piece = pl.program_id(2), pl.program_id(1)
        self.columns = pl.program_id(0) * walk.m + jax.lax.iota(jnp.int32, walk.m)
        self.cosines = pl.program_id(0) * (2 * walk.m) + jax.lax.iota(jnp.int32, walk.m)
        self.slots = jax.lax.iota(jnp.int32, walk.rows) * walk.steps

    def start(self, tile: Array) -> Array:
        """The first position of every run of a tile."""
        walk = self.walk
        first = (self.piece * walk.tiles + tile) * (walk.rows * walk.steps)
        return first + self.slots

    def _view(self, ref: Any, times: Array, columns: Array) -> tuple[Any, Array]:
        shape = (self.walk.rows, self.walk.m)
        here = (times >= 0) & (times < self.time)
        at = (self.row, jnp.broadcast_to(times[:, None], shape), jnp.broadcast_to(columns[None, :], shape))
        return ref.at[at], jnp.broadcast_to(here[:, None], shape)

    def load(self, ref: Any, times: Array, columns: Array) -> Array:
        """``[rows, m]`` in float32, 0 outside of the row."""
        view, here = self._view(ref, times, columns)
        return plgpu.load(view, mask=here, other=0.0).astype(jnp.float32)

    def store(self, ref: Any, times: Array, columns: Array, x: Array) -> None:
        """Stores ``[rows, m]`` in the dtype of the array."""
        view, here = self._view(ref, times, columns)
        plgpu.store(view, x.astype(ref.dtype), mask=here)

    def reach(self, times: Array) -> Array | None:
        """Positions inside their segments, ``[rows, 1]``; None where every row is one segment."""
        if self.inside is None:
            return None
        row = 0 if self.inside.shape[0] == 1 else self.row
        here = (times >= 0) & (times < self.time)
        return plgpu.load(self.inside.at[row, times], mask=here, other=0)[:, None]


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


def forward(walk: Walk, raw: Array, taps: Array, inside: Array | None, dtype: Any) -> tuple[Array, Array]:
    """Features of write and read phases, ``[b, t, 2 w]`` in ``dtype``, heads side by side.

    Args:
      walk: shape of a program.
      raw: float32 raw phases ``[b, t, w or more]``; columns from w on are not read.
      taps: float32 ``[2, k, w]`` of the write and the read convolution.
      inside: int32 positions inside segments, ``[b or 1, t]``; None where every row is one segment.
      dtype: of the results.
    """
    b, t, _ = raw.shape
    width = taps.shape[-1]
    scale = 1.0 / math.sqrt(walk.m)
    k = walk.taps
    inputs = {"raw": raw, "taps": taps} | ({} if inside is None else {"inside": inside})

    def kernel(ins: dict[str, Any], outs: dict[str, Any]) -> None:
        place = _Place(walk, t, ins.get("inside"))
        weights = _weights(place, ins["taps"])

        def tile(index: Array, _: None) -> None:
            start = place.start(index)
            seen = [place.load(ins["raw"], start - delay, place.columns) for delay in range(k - 1, 0, -1)]
            for step in range(walk.steps):
                times = start + step
                seen.append(place.load(ins["raw"], times, place.columns))
                reach = place.reach(times)
                shifted = [_within(reach, delay, seen[-1 - delay]) for delay in range(k)]
                for own, out in zip(weights, (outs["keys"], outs["queries"]), strict=True):
                    phase = _convolved(own, shifted)
                    sine, cosine = sin_cos(phase, not walk.interpret)
                    place.store(out, times, place.cosines, scale * cosine)
                    place.store(out, times, place.cosines + walk.m, scale * sine)

        jax.lax.fori_loop(0, walk.tiles, tile, None)

    shape = jax.ShapeDtypeStruct((b, t, 2 * width), dtype)
    found = pl.pallas_call(
        kernel,
        out_shape={"keys": shape, "queries": shape},
        grid=_grid(walk, b, t, width),
        compiler_params=_parameters(walk),
        interpret=walk.interpret,
        name="phase_features_forward",
    )(inputs)
    return found["keys"], found["queries"]


def backward(
    walk: Walk, raw: Array, taps: Array, inside: Array | None, d_keys: Array, d_queries: Array
) -> tuple[Array, Array]:
    """(gradient of the raw phases ``[b, t, w]`` in the dtype of ``d_keys``, float32 one of the taps)."""
    b, t, _ = raw.shape
    width = taps.shape[-1]
    scale = 1.0 / math.sqrt(walk.m)
    k = walk.taps
    grid = _grid(walk, b, t, width)
    inputs = {"raw": raw, "taps": taps, "d_features": (d_keys, d_queries)}
    inputs |= {} if inside is None else {"inside": inside}

    def kernel(ins: dict[str, Any], outs: dict[str, Any]) -> None:
        place = _Place(walk, t, ins.get("inside"))
        weights = _weights(place, ins["taps"])
        zero = jnp.zeros((walk.rows, walk.m), jnp.float32)

        def tile(index: Array, before: tuple[Array, ...]) -> tuple[Array, ...]:
            start, sums = place.start(index), list(before)
            seen = [place.load(ins["raw"], start - delay, place.columns) for delay in range(k - 1, 0, -1)]
            open_: list[Array] = []  # gradients of the last k - 1 positions, which later ones add to
            for step in range(walk.steps + k - 1):
                times = start + step
                seen.append(place.load(ins["raw"], times, place.columns))
                reach = place.reach(times)
                shifted = [_within(reach, delay, seen[-1 - delay]) for delay in range(k)]
                open_.append(zero)
                for which, (own, source) in enumerate(zip(weights, ins["d_features"], strict=True)):
                    phase = _convolved(own, shifted)
                    sine, cosine = sin_cos(phase, not walk.interpret)
                    d_cosine = place.load(source, times, place.cosines)
                    d_sine = place.load(source, times, place.cosines + walk.m)
                    pull = scale * (cosine * d_sine - sine * d_cosine)
                    if step < walk.steps:
                        for delay in range(k):
                            at = which * k + k - 1 - delay
                            sums[at] = sums[at] + shifted[delay] * pull
                    for delay in range(min(k, len(open_))):
                        open_[-1 - delay] = open_[-1 - delay] + _within(reach, delay, own[delay] * pull)
                if step >= k - 1:
                    place.store(outs["d_raw"], times - (k - 1), place.columns, open_[step - (k - 1)])
            return tuple(sums)

        sums = jax.lax.fori_loop(0, walk.tiles, tile, (zero,) * (2 * k))
        for at, total in enumerate(sums):
            view = outs["d_taps"].at[place.row, place.piece, at, place.columns]
            plgpu.store(view, jnp.sum(total, axis=0))

    found = pl.pallas_call(
        kernel,
        out_shape={
            "d_raw": jax.ShapeDtypeStruct((b, t, width), d_keys.dtype),
            "d_taps": jax.ShapeDtypeStruct((b, grid[1], 2 * k, width), jnp.float32),
        },
        grid=grid,
        compiler_params=_parameters(walk),
        interpret=walk.interpret,
        name="phase_features_backward",
    )(inputs)
    return found["d_raw"], jnp.sum(found["d_taps"], axis=(0, 1)).reshape(2, k, width)


def _grid(walk: Walk, b: int, t: int, width: int) -> tuple[int, int, int]:
    return width // walk.m, -(-t // (walk.tiles * walk.rows * walk.steps)), b


def _parameters(walk: Walk) -> Any:
    return None if walk.interpret else plgpu.CompilerParams(num_warps=4, num_stages=1)
