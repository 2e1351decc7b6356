"""The memory of one head inside the kernel over all layers (``rows``), by one warpgroup."""

import math
import operator
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.array_types import Array
from holo_jax.kernels.decode.plan import MAPS
from holo_jax.kernels.decode.worker import Numbers, Worker, rounded, silu
from holo_jax.kernels.phasor_features import sin_cos_reduced

_EPS = 1e-6


class Place(NamedTuple):
    """One head of one row in one layer.

    Attributes:
      layer, row, head: which.
      numbers: of the row.
    """

    layer: Any
    row: Any
    head: Any
    numbers: Numbers


class Exchange(NamedTuple):
    """What the memory of a head is given and gives.

    Attributes:
      maps: waits for the head's maps, float32 ``[256]``, then zeros.
      keys: waits for the head's state; pending keys, in lines.
      memory: the memory in parts of as many rows as there are pending keys, and what these bind, in slabs.
      put: stores what is read, in a line, float32 that bfloat16 can hold.
    """

    maps: Any
    keys: Any
    memory: Any
    put: Any


def of_head(worker: Worker, at: Place) -> Any:
    """Begins the small loads of the memory of a head."""
    shape, refs, lanes = worker.shape, worker.refs, worker.layouts.lanes
    layer, row, head, numbers = at
    own = pl.ds(head * shape.m, shape.m)
    before = shape.taps - 1
    phases = [
        worker.load(refs["phases"].at[layer, row, numbers.before + tap, own], lanes) for tap in range(before)
    ]
    weights = [
        [worker.load(refs[name].at[layer, tap, own], lanes) for tap in range(shape.taps)]
        for name in ("write_taps", "read_taps")
    ]
    norm: Any = None
    if shape.head_norm:
        norm = worker.load(refs["head_norm"].at[layer, head], worker.layouts.lines.reduce(0))
    biases = {name: refs[f"{name}_bias"][layer, head] for name in ("write", "erase") if getattr(shape, name)}
    return phases, weights, norm, biases


def of_keys_layout(worker: Worker) -> Any:
    """Of pending keys: fewer sums cross lanes where a row is in few of them."""
    return worker.layouts.quads if worker.shape.size % 16 == 0 else worker.layouts.lines


def head(worker: Worker, at: Place, stage: Any, loaded: Any, exchange: Exchange) -> None:
    """The memory of one head: read, hold the write back, normalise, gate.

    What ``heads`` does in one program, with sums over phasors where they stay in a warp.

    Args:
      worker: the warpgroup.
      at: which head.
      stage: float32 in shared memory, ``decode_plan.stage`` of them.
      loaded: of ``of_head``.
      exchange: see there.
    """
    shape, refs = worker.shape, worker.refs
    load, spread = worker.load, worker.spread
    m, d, size, taps = shape.m, shape.d, shape.size, shape.taps
    lines, slabs, lanes, _ = worker.layouts
    rows = of_keys_layout(worker)
    line, channel = lines.reduce(0), slabs.reduce(0)
    layer, row, head, numbers = at
    index, own = numbers.before, pl.ds(head * m, m)
    phases, weights, norm, biases = loaded
    total: Any = 0.0
    if shape.scale == "sqrt_writes":
        total = refs["writes"][layer, row, head]
        for slot in range(size):
            total += jnp.where(slot < index, refs["squares"][layer, row, head, slot], 0.0)

    def filled(x: Array, width: int, layout: Any) -> Array:
        """What is pending, zero in slots without a write."""
        return jnp.where(worker.slots((size, width), layout) < index, x, 0.0)

    # Places in shared memory: the maps, two keys, what is read, two scores.
    of_keys = [pl.ds(MAPS + 2 * m * n, 2 * m) for n in range(2)]
    of_read = pl.ds(MAPS + 4 * m, d)
    of_scores = [pl.ds(MAPS + 4 * m + d + size * n, size) for n in range(2)]
    stage[pl.ds(0, MAPS)] = exchange.maps()
    worker.meet()
    raw = shape.phase_scale * load(stage.at[pl.ds(d, m)], lanes)
    refs["phases"].at[layer, row, index + (taps - 1), own][...] = raw
    for place, kernel in zip(of_keys, weights, strict=True):
        angle: Any = sum(weight * phase for weight, phase in zip(kernel, [*phases, raw], strict=True))
        sine, cosine = sin_cos_reduced(angle, jnp.round(angle * (0.5 / math.pi)))
        stage[pl.ds(place.start, m)] = cosine * m**-0.5
        stage[pl.ds(place.start + m, m)] = sine * m**-0.5
    worker.meet()
    write, read_key = (load(stage.at[place], line) for place in of_keys)
    keys = filled(exchange.keys(), 2 * m, rows)
    refs["keys"].at[layer, row, head, index][...] = write
    for place, of_key in zip(of_scores, of_keys, strict=True):
        key = load(stage.at[of_key], rows.reduce(0))
        stage[place] = jnp.sum(keys * spread(key, (size, 2 * m), 1, rows), axis=1)

    def times(part: Array, place: Any) -> Array:
        return part * spread(load(stage.at[place], slabs.reduce(1)), (size, d), 0, slabs)

    memory, bound = exchange.memory()
    bound = filled(bound, d, slabs)
    # Added up before the sum over rows, which crosses lanes: that once for all.
    terms = [
        reduce(operator.add, (times(x, pl.ds(key.start + size * n, size)) for n, x in enumerate(memory)))
        for key in of_keys
    ]
    worker.meet()
    before = [
        jnp.sum(term + times(bound, score), axis=0) for term, score in zip(terms, of_scores, strict=True)
    ]

    def gate(name: str, at: int) -> Array:
        return 1.0 / (1.0 + jnp.exp(-(stage[at] + biases[name])))

    of_gates = d + m + d * shape.gate
    opened = numbers.active.astype(jnp.float32)
    if shape.write:
        opened = opened * gate("write", of_gates)
    written = opened * rounded(load(stage.at[pl.ds(0, d)], channel))
    if shape.erase:
        written -= opened * gate("erase", of_gates + shape.write) * before[0]
    refs["written"].at[layer, row, head, index][...] = written
    refs["squares"][layer, row, head, index] = opened * opened
    read = before[1] + jnp.sum(write * read_key, axis=0) * written
    if shape.scale == "sqrt_time":
        read = read * jax.lax.rsqrt(numbers.position.astype(jnp.uint32).astype(jnp.float32) + 1.0)
    elif shape.scale == "sqrt_writes":
        read = read * jax.lax.rsqrt(total + opened * opened + _EPS)
    stage[of_read] = read
    worker.meet()
    read = load(stage.at[of_read], line)
    if shape.head_norm:
        mean = jnp.sum(read * read, axis=0) * (1.0 / d)
        read = read * jax.lax.rsqrt(mean + shape.eps) * norm
    if shape.gate:
        read = rounded(read) * silu(rounded(load(stage.at[pl.ds(d + m, d)], line)))
    exchange.put(rounded(read))
