"""One token through one layer's memory by a kernel, for any number of rows (Pallas, lowered to Triton).

It does what ``generate.pending`` defines: writes of a group are held back, and the memory is only read. A
program is one head of one row. Few programs ask for everything at once and wait once. Where more are to run
than fit the multiprocessors, registers decide how many wait side by side, and instructions that all warps
repeat decide how fast they end: then a program is one warp that has a part of the memory at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array
from holo_jax.functional.memory.state import compensated_add
from holo_jax.kernels.decode.gate import inverse_rms
from holo_jax.kernels.decode.shape import Shape
from holo_jax.kernels.instructions import fma
from holo_jax.kernels.phasor_features import sin_cos_reduced

Refs = dict[str, Any]
_WARPS = 4
# Programs from which they do not all run at once; numbers of a plane of the memory that a warp has at a time.
_MANY = 512
_PLANE = 2048
_EPS = 1e-6
# Rows of a part of the memory where programs are many, and where the group joins; how often many wait for
# parts. So 128 registers are enough.
_ROWS_MANY, _ROWS_JOINED, _WAITS = 8, 16, 4
# Arrays that the kernel changes in place, the last two where the group joins.
_PENDING = ("phases", "keys", "written", "squares")
_JOINED = ("memory", "residue")


def _many(shape: Shape, joins: int) -> bool:
    return shape.rows * shape.heads >= _MANY and not joins


def _warps(shape: Shape, joins: int) -> int:
    return min(_WARPS, max(1, shape.m * shape.d // _PLANE)) if _many(shape, joins) else _WARPS


def _part(shape: Shape, joins: int) -> tuple[int, bool]:
    """Rows of a part of the memory, and whether what is pending comes in such parts too.

    Then all are added up before the sum over rows.
    """
    part = _ROWS_MANY if _many(shape, joins) else _ROWS_JOINED if joins else shape.m
    alike = shape.m % part == 0 and shape.size % part == 0
    return part if alike else shape.m, alike


def _part_of(vector: Array, n: int, size: int) -> Array:
    """``vector[n * size : (n + 1) * size]``."""
    if size == vector.shape[0]:
        return vector
    apart = vector.reshape(vector.shape[0] // size, size)
    here = jax.lax.broadcasted_iota(jnp.int32, apart.shape, 0) == n
    return jnp.sum(jnp.where(here, apart, 0.0), axis=0)


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

    many = _many(shape, joins)
    part, alike = _part(shape, joins)
    parts = [(plane, n) for plane in (0, 1) for n in range(m // part)]

    def rows_of(plane: int, n: int) -> Array:
        return plane * m + n * part + jax.lax.iota(jnp.int32, part)

    def memory_of(plane: int, n: int, after: Array | None = None) -> Array:
        """A part of the memory, asked for once ``after`` is known."""
        at, across = block(rows_of(plane, n), d)
        view = refs["memory"].at[layer, row, head, at, across]
        if after is None:
            return plgpu.load(view)
        # True whatever it is: if it is not a number, nor is what it belongs to.
        return plgpu.load(view, mask=(at >= 0) & (after == after), other=0.0)

    def added_to(sums: list[Any], vectors: list[Array], n: int, x: Array) -> list[Any]:
        """Part ``n`` of vectors times the rows of ``x``, and the sums before, if there are any."""
        keyed = [_part_of(vector, n, x.shape[0])[:, None] for vector in vectors]
        if not sums:
            return [key * x for key in keyed]
        return [fma(key, x, total, not shape.interpret) for key, total in zip(keyed, sums, strict=True)]

    # Loads stand before the first use of one: a program waits once. The memory is most of the bytes.
    memory: dict[Any, Array] = {} if many else {at: memory_of(*at) for at in parts}
    held = []
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
    bound, most = [], part if alike else shape.size
    for first in range(0, shape.size, most):
        at, across = block(first + jax.lax.iota(jnp.int32, most), d)
        view = refs["written"].at[layer, row, head, at, across]
        bound.append(plgpu.load(view, mask=at < index, other=0.0))
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
    scores = [
        jnp.sum(fma(key[1][None, :], held[1], key[0][None, :] * held[0], not shape.interpret), axis=1)
        for key in keys
    ]
    sums: list[Any] = []
    for n, x in enumerate(bound):
        sums = added_to(sums, scores, n, x)
    before: list[Any] = [0.0, 0.0]
    if not alike:
        before, sums = [jnp.sum(x, axis=0) for x in sums], []
    after = jnp.sum(scores[0] + scores[1], axis=0)
    once = max(1, len(parts) // _WAITS) if many else len(parts)
    for first in range(0, len(parts), once):
        if first:
            after = jnp.sum(jnp.sum(sums[0] + sums[1], axis=0), axis=0)
        places = parts[first : first + once]
        for (plane, n), x in [(at, memory[at] if memory else memory_of(*at, after)) for at in places]:
            sums = added_to(sums, [key[plane] for key in keys], n, x)
    before = [x + jnp.sum(total, axis=0) for x, total in zip(before, sums, strict=True)]

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
    if joins:
        added = [_part_of(keys[0][plane], n, part)[:, None] * written[None, :] for plane, n in parts]
        for slot in range(joins - 1):
            what = plgpu.load(refs["written"].at[layer, row, head, slot + zero, channels])[None, :]
            for count, (plane, n) in enumerate(parts):
                key = plgpu.load(refs["keys"].at[layer, row, head, slot + zero, rows_of(plane, n)])
                added[count] = fma(key[:, None], what, added[count], not shape.interpret)
        for place, addend in zip(parts, added, strict=True):
            where = (layer, row, head, *block(rows_of(*place), d))
            joined = compensated_add(memory[place], plgpu.load(refs["residue"].at[where]), addend)
            for name, array in zip(_JOINED, joined, strict=True):
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
