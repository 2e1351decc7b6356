"""One token through one layer's memory by a kernel, for any number of rows (Pallas, lowered to Triton).

It does what ``generate.pending`` defines: writes of a group are held back, and the memory is only read. A
program is one head of one row. Few programs ask for everything at once and wait once. Where more are to run
than fit the multiprocessors, registers decide how many wait side by side, and instructions that all warps
repeat decide how fast they end: then a program is one warp that has one plane of the memory at a time.
"""

import operator
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array
from holo_jax.functional.memory.state import compensated_add
from holo_jax.kernels.decode.gate import inverse_rms
from holo_jax.kernels.decode.shape import Shape
from holo_jax.kernels.phasor_features import sin_cos_reduced

Refs = dict[str, Any]
_WARPS = 4
# Programs from which they do not all run at once; numbers of a plane of the memory that a warp has at a time.
_MANY = 512
_PLANE = 2048
_EPS = 1e-6
# Arrays that the kernel changes in place, the last two where the group joins.
_PENDING = ("phases", "keys", "written", "squares")
_JOINED = ("memory", "residue")


def _many(shape: Shape, joins: int) -> bool:
    return shape.rows * shape.heads >= _MANY and not joins


def _warps(shape: Shape, joins: int) -> int:
    return min(_WARPS, max(1, shape.m * shape.d // _PLANE)) if _many(shape, joins) else _WARPS


def decode_heads(shape: Shape, refs: Refs, joins: int = 0) -> None:
    """One head of one row: read, hold the write back, normalise, gate.

    With ``joins``, the tokens of a group whose last one this is, the memory that was read is written back
    with the group's writes, as ``join`` does: it is not read again for that.
    """
    # Indices are arrays throughout: the interpreter takes no plain numbers beside them.
    head, row = pl.program_id(0), pl.program_id(1)
    layer = zero = head * 0
    m, d, taps, storage = shape.m, shape.d, shape.taps, refs["z"].dtype
    phasors, channels = jax.lax.iota(jnp.int32, m), jax.lax.iota(jnp.int32, d)
    slots = jax.lax.iota(jnp.int32, shape.size)
    columns = head * m + phasors

    def block(rows: Array, width: int) -> tuple[Array, Array]:
        columns = jax.lax.iota(jnp.int32, width)
        size = (rows.shape[0], width)
        return jnp.broadcast_to(rows[:, None], size), jnp.broadcast_to(columns[None, :], size)

    inverse: Any = 1.0

    def map_of(name: str, column: Array) -> Array:
        return plgpu.load(refs["y"].at[row, shape.offsets[name] + column])

    def plane_of(number: int, after: Array | None = None) -> Array:
        """A plane of the memory, asked for once ``after`` is known."""
        at, across = block(number * m + phasors, d)
        view = refs["memory"].at[layer, row, head, at, across]
        if after is None:
            return plgpu.load(view)
        # True whatever it is: if it is not a number, nor is what it belongs to.
        return plgpu.load(view, mask=(at >= 0) & (after == after), other=0.0)

    # Loads stand before the first use of one: a program waits once. The memory is most of the bytes.
    many = _many(shape, joins)
    memory, held = [] if many else [plane_of(n) for n in (0, 1)], []
    vectors = {"phases": map_of("phases", columns)}
    for name in ("values", "gate") if shape.gate else ("values",):
        vectors[name] = map_of(name, head * d + channels)
    gates = {}
    for name, present in (("write", shape.write), ("erase", shape.erase)):
        if present:
            gates[name] = (map_of(name, head), plgpu.load(refs[f"{name}_bias"].at[layer, head]))
    weights = [
        [plgpu.load(refs[name].at[layer, tap + zero, columns]) for tap in range(taps)]
        for name in ("write_taps", "read_taps")
    ]
    index, active, position = (plgpu.load(refs["numbers"].at[zero + n, row]) for n in range(3))
    active = active.astype(jnp.float32)
    norm: Any = plgpu.load(refs["head_norm"].at[layer, head, channels]) if shape.head_norm else None
    phases = [plgpu.load(refs["phases"].at[layer, row, index + tap, columns]) for tap in range(taps - 1)]
    # What this group has not yet written is the last one's, and no byte of it is moved.
    for plane in (0, 1):
        at, across = block(slots, m)
        view = refs["keys"].at[layer, row, head, at, plane * m + across]
        held.append(plgpu.load(view, mask=at < index, other=0.0))
    at, across = block(slots, d)
    bound = plgpu.load(refs["written"].at[layer, row, head, at, across], mask=at < index, other=0.0)
    if shape.scale == "sqrt_writes":
        view = refs["squares"].at[layer, row, head, slots]
        squares = plgpu.load(view, mask=slots < index, other=0.0)
        writes = plgpu.load(refs["writes"].at[layer, row, head])

    if "stream" in refs:
        inverse = inverse_rms(refs["stream"], row, shape.width, shape.eps)

    def stored(name: str) -> Array:
        return (vectors[name] * inverse).astype(storage).astype(jnp.float32)

    def gate(name: str) -> Array:
        x, bias = gates[name]
        return jax.nn.sigmoid(x * inverse + bias)

    raw = shape.phase_scale * (vectors["phases"] * inverse)
    phases.append(raw)
    keys = []
    for own in weights:
        angle: Any = sum(weight * phase for weight, phase in zip(own, phases, strict=True))
        sine, cosine = sin_cos_reduced(angle, jnp.floor(angle * (0.5 / jnp.pi) + 0.5))
        keys.append((cosine * m**-0.5, sine * m**-0.5))
    before = []
    for key in keys:
        scores = [part[None, :] * plane for part, plane in zip(key, held, strict=True)]
        score = jnp.sum(scores[0] + scores[1], axis=1)
        before.append(jnp.sum(score[:, None] * bound, axis=0))
    for planes in [(0,), (1,)] if many else [(0, 1)]:
        own = memory or [plane_of(n, jnp.sum(before[0] + before[1], axis=0)) for n in planes]
        for place, key in enumerate(keys):
            terms = [key[n][:, None] * plane for n, plane in zip(planes, own, strict=True)]
            before[place] += jnp.sum(reduce(operator.add, terms), axis=0)

    opened = active * gate("write") if shape.write else active
    written = opened * stored("values")
    if shape.erase:
        written -= opened * gate("erase") * before[0]
    overlap = jnp.sum(sum(a * b for a, b in zip(*keys, strict=True)), axis=0)
    read = before[1] + overlap * written
    plgpu.store(refs["phases"].at[layer, row, index + (taps - 1), columns], raw)
    plgpu.store(refs["written"].at[layer, row, head, index, channels], written)
    for plane in (0, 1):
        plgpu.store(refs["keys"].at[layer, row, head, index, plane * m + phasors], keys[0][plane])
    for plane in (0, 1) if joins else ():
        added = keys[0][plane][:, None] * written[None, :]
        for slot in range(joins - 1):
            bound_to = plgpu.load(refs["keys"].at[layer, row, head, slot + zero, plane * m + phasors])
            what = plgpu.load(refs["written"].at[layer, row, head, slot + zero, channels])
            added += bound_to[:, None] * what[None, :]
        where = (layer, row, head, *block(plane * m + phasors, d))
        after = compensated_add(memory[plane], plgpu.load(refs["residue"].at[where]), added)
        for name, array in zip(_JOINED, after, strict=True):
            plgpu.store(refs[name].at[where], array)
    plgpu.store(refs["squares"].at[layer, row, head, index], opened * opened)
    if shape.scale == "sqrt_time":
        read *= jax.lax.rsqrt(position.astype(jnp.uint32).astype(jnp.float32) + 1.0)
    elif shape.scale == "sqrt_writes":
        total = jnp.sum(squares, axis=0) + opened * opened
        read *= jax.lax.rsqrt(writes + total + _EPS)
    if shape.head_norm:
        mean = jnp.sum(read * read, axis=0) * (1.0 / d)
        read = read * jax.lax.rsqrt(mean + shape.eps) * norm
    if shape.gate:
        opening = stored("gate")
        read = read.astype(storage).astype(jnp.float32) * (opening * jax.nn.sigmoid(opening))
    plgpu.store(refs["z"].at[row, head * d + channels], read.astype(storage))


def run_heads(shape: Shape, arrays: dict[str, Array], storage: Any, *, joins: int = 0) -> dict[str, Array]:
    """The memory of one layer, for any number of rows: from the maps ``y`` of a token to ``z``.

    Args:
      shape: with ``layers`` 1.
      arrays: by name, over one layer, float32 ``head_norm``, ``read_taps``, ``write_taps``, ``write_bias``,
        ``erase_bias``; the memory ``memory``, ``writes`` and what is pending: ``phases``, ``keys``,
        ``written``, ``squares``. ``numbers``: int32 ``[n, rows]``, its first rows: pending writes, 1 for
        rows that read and 0 for others, positions as the bits of unsigned numbers; ``y``: the joined maps in
        float32. ``stream``, if the maps are of the residual stream times the norm's weight: what is still to
        be normed.
      storage: dtype of the result.
      joins: for the last token of a group, how many it has; ``residue`` is given too, as the memory is.

    Returns:
      ``z`` ``[rows, values]``, what the output map is applied to, and what is pending; memory and residue if
      the group joins.
    """
    changed = (*_PENDING, *_JOINED) if joins else _PENDING
    given = {name: array for name, array in arrays.items() if name in changed}
    fixed = {name: array for name, array in arrays.items() if name not in changed}
    outputs = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in given.items()}
    outputs["z"] = jax.ShapeDtypeStruct((shape.rows, shape.values), storage)

    def kernel(inputs: tuple[Refs, Refs], outputs: Refs) -> None:
        # Arrays changed in place are the outputs; their inputs are the same memory.
        decode_heads(shape, {**inputs[1], **outputs}, joins)

    names = sorted(outputs)
    return pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=(shape.heads, shape.rows),
        input_output_aliases={n: names.index(name) for n, name in enumerate(sorted(given))},
        compiler_params=None
        if shape.interpret
        else plgpu.CompilerParams(num_warps=_warps(shape, joins), num_stages=1),
        interpret=shape.interpret,
        name="decode_heads_joined" if joins else "decode_heads",
    )((given, fixed))
