"""The memory of one head inside the kernel over all layers (``decode_stream``), by one warpgroup."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.array_types import Array
from holo_jax.kernels import decode_mail, mosaic
from holo_jax.kernels.decode_worker import Worker, rounded, silu
from holo_jax.kernels.phasor_features import sin_cos_reduced

_EPS = 1e-6


def of_head(worker: Worker, layer: Array, head: Array) -> Any:
    """Begins the small loads of the memory of a head; of the last one if there is none of this number."""
    shape, refs, lanes = worker.shape, worker.refs, worker.layouts.lanes
    head = jnp.minimum(head, shape.heads - 1)
    own = pl.ds(head * shape.m, shape.m)
    before = shape.taps - 1
    phases = [
        worker.load(refs["phases"].at[layer, 0, worker.numbers.before + tap, own], lanes)
        for tap in range(before)
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


def head(worker: Worker, layer: Array, turn: int, number: Array, loaded: Any) -> None:
    """The memory of one head: read, hold the write back, normalise, gate.

    What ``decode_heads`` does in one program, with sums over phasors where they stay in a warp.
    """
    plgpu = mosaic.pallas()

    shape, refs, stage = worker.shape, worker.refs, worker.refs["stage"]
    load, spread, interpret = worker.load, worker.spread, worker.interpret
    m, d, size, taps = shape.m, shape.d, shape.size, shape.taps
    _, lines, slabs, lanes, _ = worker.layouts
    line, channel = lines.reduce(0), slabs.reduce(0)
    head = worker.program + turn * shape.programs
    index, own = worker.numbers.before, pl.ds(head * m, m)
    phases, weights, norm, biases = loaded
    total: Any = 0.0
    if shape.scale == "sqrt_writes":
        total = refs["writes"][layer, 0, head]
        for slot in range(size):
            total += jnp.where(slot < index, refs["squares"][layer, 0, head, slot], 0.0)

    def filled(name: str, width: int, layout: Any) -> Array:
        """What is pending, zero in slots without a write."""
        x = load(refs[f"{name}_room"], layout)
        return jnp.where(worker.slots((size, width), layout) < index, x, 0.0)

    # Places in shared memory: the maps, two keys, what is read, two scores.
    of_keys = [pl.ds(256 + 2 * m * n, 2 * m) for n in range(2)]
    of_read = pl.ds(256 + 4 * m, d)
    of_scores = [pl.ds(256 + 4 * m + d + size * n, size) for n in range(2)]
    stage[pl.ds(0, decode_mail.PAIR_WORDS // 2)] = decode_mail.take_pairs(
        refs["y"].at[head], worker.plan.per_head, number, interpret=interpret
    )
    worker.meet()
    raw = shape.phase_scale * load(stage.at[pl.ds(d, m)], lanes)
    refs["phases"].at[layer, 0, index + (taps - 1), own][...] = raw
    for place, kernel in zip(of_keys, weights, strict=True):
        angle: Any = sum(weight * phase for weight, phase in zip(kernel, [*phases, raw], strict=True))
        sine, cosine = sin_cos_reduced(angle, jnp.round(angle * (0.5 / math.pi)))
        stage[pl.ds(place.start, m)] = cosine * m**-0.5
        stage[pl.ds(place.start + m, m)] = sine * m**-0.5
    worker.meet()
    write, read_key = (load(stage.at[place], line) for place in of_keys)
    for n in range(3):
        plgpu.barrier_wait(refs["head_come"].at[3 * turn + n])
    keys = filled("keys", 2 * m, lines)
    refs["keys"].at[layer, 0, head, index][...] = write
    for place, key in zip(of_scores, (write, read_key), strict=True):
        stage[place] = jnp.sum(keys * spread(key, (size, 2 * m), 1, lines), axis=1)
    worker.meet()
    memory, bound = load(refs["memory_room"], slabs), filled("written", d, slabs)
    plgpu.barrier_arrive(refs["head_free"])
    before = []
    for of_key, of_score in zip(of_keys, of_scores, strict=True):
        key = spread(load(stage.at[of_key], slabs.reduce(1)), (2 * m, d), 0, slabs)
        score = spread(load(stage.at[of_score], slabs.reduce(1)), (size, d), 0, slabs)
        before.append(jnp.sum(memory * key, axis=0) + jnp.sum(bound * score, axis=0))

    def gate(name: str, at: int) -> Array:
        return 1.0 / (1.0 + jnp.exp(-(stage[at] + biases[name])))

    of_gates = d + m + d * shape.gate
    opened = worker.numbers.active.astype(jnp.float32)
    if shape.write:
        opened = opened * gate("write", of_gates)
    written = opened * rounded(load(stage.at[pl.ds(0, d)], channel))
    if shape.erase:
        written -= opened * gate("erase", of_gates + shape.write) * before[0]
    refs["written"].at[layer, 0, head, index][...] = written
    refs["squares"][layer, 0, head, index] = opened * opened
    read = before[1] + jnp.sum(write * read_key, axis=0) * written
    if shape.scale == "sqrt_time":
        read = read * jax.lax.rsqrt(worker.numbers.position.astype(jnp.uint32).astype(jnp.float32) + 1.0)
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
    first = head * d
    rows = decode_mail.Rows(first, first, first + d)
    decode_mail.put(refs["z"], rounded(read), rows, number, line, interpret=interpret)
