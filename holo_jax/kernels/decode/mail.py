"""Vectors that resident programs hand each other inside one kernel (Pallas, Mosaic GPU).

A vector lies in device memory as words of 32 bits: 16 bits of data, a bfloat16, and the number of the layer
and token that they belong to. A reader loads the words it wants, past the first cache, until all carry the
number that it waits for. So data say themselves that they have come: nobody waits for stores to be over,
for a counter and then for the data. A float32 is two such words, its upper and its lower half.

A reader gives up after a bounded number of loads, and what it returns then is not a number.

In Pallas' interpreter there is one worker, which finds what it wrote itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from holo_jax.array_types import Array
from holo_jax.kernels import mosaic

# Loads before a reader gives up: a few milliseconds.
PATIENCE = 1 << 13
# Words of a vector of pairs; a warpgroup loads four a thread.
PAIR_WORDS = 512
_THREADS, _LANES = 128, 32
_NAN = 0x7FC00000
_HIGH = -(1 << 16)


def numbered(x: Array, number: Array) -> Array:
    """A vector in bfloat16 as words."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32)
    return jax.lax.shift_left(bits, 16) | number


def data(words: Array) -> Array:
    """Inverse of ``numbered``."""
    bits = jax.lax.shift_right_logical(words, 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def take(ref: Any, count: int, number: Array, waits: Array, *, interpret: bool) -> Array:
    """Waits for a vector of ``count`` words, a multiple of 256; float32, spread over a warpgroup.

    Who does not wait gets what is there: nobody waits for what it makes of it.
    """
    if interpret:
        return jax.lax.bitcast_convert_type(ref[...] & _HIGH, jnp.float32)
    return _polled(ref, count, number, waits, active=_THREADS, pairs=False)


def take_pairs(ref: Any, count: int, number: Array, *, interpret: bool) -> Array:
    """Waits for ``count`` pairs, an even number, of ``PAIR_WORDS`` words; float32 ``[256]``, then zeros."""
    if interpret:
        pairs = ref[...].reshape(-1, 2)
        bits = (pairs[:, 0] & _HIGH) | jax.lax.shift_right_logical(pairs[:, 1], 16)
        found = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.where(jnp.arange(found.shape[0]) < count, found, 0.0)
    return _polled(ref, PAIR_WORDS // 2, number, jnp.bool_(True), active=count // 2, pairs=True)


class Rows(NamedTuple):
    """Of a vector, those that are stored.

    Attributes:
      first: that of the first value given.
      begin, end: what is stored.
    """

    first: Any
    begin: Any
    end: Any


def put(ref: Any, values: Array, rows: Rows, number: Array, layout: Any, *, interpret: bool) -> None:
    """Stores rows of a vector.

    Words that lie side by side are stored side by side, by one instruction of a warp: a line that is written
    word by word while many load it took thousands of clocks.

    Args:
      ref: its words.
      values: float32 that bfloat16 can hold, in ``layout``.
      rows: which they are.
      number: of the words.
      layout: a row a thread, or two rows a lane, the same in every warp ``[64]``.
      interpret: see above.
    """
    if interpret:
        bits = jax.lax.bitcast_convert_type(values, jnp.int32)
        ref[pl.ds(rows.first, values.shape[0])] = (bits & _HIGH) | number
        return
    _stored(ref, values, rows, number, layout, 0)


def put_plain(ref: Any, values: Array, rows: Rows, layout: Any, *, interpret: bool) -> None:
    """``put`` without numbers, to a vector in bfloat16: for who reads it after the kernel."""
    if interpret:
        ref[pl.ds(rows.first, values.shape[0])] = values.astype(jnp.bfloat16)
        return
    _stored(ref, values, rows, None, layout, 0)


def put_pairs(
    ref: Any, values: Array, rows: Rows, number: Array, layout: Any, per: int, *, interpret: bool
) -> None:
    """``put`` of float32 as pairs; ``ref`` is ``[n, PAIR_WORDS]``, each of its rows holds ``per`` of them."""
    if interpret:
        bits = jax.lax.bitcast_convert_type(values, jnp.int32)
        pairs = jnp.stack([bits & _HIGH, jax.lax.shift_left(bits, 16)], axis=1) | number
        ref[:, pl.ds(0, 2 * per)] = pairs.reshape(-1, 2 * per)
        return
    _stored(ref, values, rows, number, layout, per)


def _thread() -> Any:
    """Thread in its warpgroup."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    return arith.remui(
        mosaic.utils().thread_idx(), mosaic.utils().c(_THREADS, ir.IntegerType.get_signless(32))
    )


def _polling(loads: int, width: int, active: int) -> str:
    """Loads until the lower halves of all words are the number; operands: words, base, number, thread, mask.

    A warp loads one word until it has come, and only then all of its own, of which only those that have not
    come are loaded again: many warps that load whole vectors over and over are in the way of the stores they
    wait for.
    """
    n = loads * width
    lines = ["{ .reg .pred p; .reg .b32 d, t, n; .reg .b64 a, f;", "mov.b32 n, 0;"]
    lines += [f"mov.b32 ${k}, 0;" for k in range(n)]
    lines += [f"mul.wide.u32 a, ${n + 2}, {4 * width}; add.s64 a, a, ${n};"]
    lines += [f"setp.ge.u32 p, ${n + 2}, {active};", "@p bra DONE;"]
    lines += [f"and.b32 t, ${n + 2}, {-_LANES}; mul.wide.u32 f, t, {4 * width}; add.s64 f, f, ${n};"]
    lines += ["FIRST:", f"ld.relaxed.gpu.global.b32 d, [f]; xor.b32 d, d, ${n + 1}; and.b32 d, d, ${n + 3};"]
    lines += [f"add.u32 n, n, 1; setp.ne.u32 p, d, 0; @p setp.lt.u32 p, n, {PATIENCE};", "@p bra FIRST;"]
    missing = [f"m{k}" for k in range(loads)]
    lines += [f".reg .pred {', '.join(missing)};"]
    lines += [f"setp.eq.u32 {own}, n, n;" for own in missing]
    lines += ["AGAIN:"]
    for k, own in enumerate(missing):
        words = ", ".join(f"${k * width + j}" for j in range(width))
        at = k * _THREADS * width * 4
        lines.append(f"@{own} ld.relaxed.gpu.global.v{width}.b32 {{{words}}}, [a+{at}];")
    for k, own in enumerate(missing):
        lines += ["mov.b32 d, 0;"]
        lines += [f"xor.b32 t, ${j}, ${n + 1}; or.b32 d, d, t;" for j in range(k * width, (k + 1) * width)]
        lines += [f"and.b32 d, d, ${n + 3}; setp.ne.u32 {own}, d, 0;"]
    lines += [f"mov.pred p, {missing[0]};", *(f"or.pred p, p, {own};" for own in missing[1:])]
    lines += ["@!p bra DONE;", f"add.u32 n, n, 1; setp.lt.u32 p, n, {PATIENCE};", "@p bra AGAIN;"]
    return "\n".join([*lines, f"mov.b32 $0, {_NAN};", "DONE: }"])


def _polled(ref: Any, length: int, number: Array, waits: Array, *, active: int, pairs: bool) -> Array:
    plgpu = mosaic.pallas()

    layout = plgpu.Layout.WG_STRIDED((length,), vec_size=2)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(()), plgpu.Layout.WG_SPLAT(())),
        return_type=plgpu.ShapeDtypeStruct((length,), jnp.float32, layout=layout),
    )
    def poll(context: Any, words: Any, number: Any, mask: Any) -> Any:
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, vector

        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        loads, width = length // (2 * _THREADS), 4 if pairs else 2
        found = mosaic.utils().inline_ptx(
            _polling(loads, width, active),
            mosaic.utils().memref_ptr(words),
            number.registers.item(),
            _thread(),
            mask.registers.item(),
            result_types=[i32] * (loads * width),
            has_side_effects=True,
        )
        upper = [arith.andi(word, mosaic.utils().c(_HIGH, i32)) for word in found]
        if pairs:
            lower = [arith.shrui(word, mosaic.utils().c(16, i32)) for word in found]
            upper = [arith.ori(upper[k], lower[k + 1]) for k in range(0, len(found), 2)]
        numbers = [arith.bitcast(f32, bits) for bits in upper]
        registers = np.empty(loads, dtype=object)
        for k in range(loads):
            both = numbers[2 * k : 2 * k + 2]
            registers[k] = vector.from_elements(ir.VectorType.get((2,), f32), both)
        return mosaic.fragments().FragmentedArray(
            _registers=registers, _layout=layout.to_mgpu(), _is_signed=None
        )

    return poll(ref, number, jnp.where(waits, 0xFFFF, 0))


def _stored(ref: Any, values: Array, rows: Rows, number: Array | None, layout: Any, per: int) -> None:
    plgpu = mosaic.pallas()

    scalar = plgpu.Layout.WG_SPLAT(())

    given = [jnp.asarray(n, jnp.int32) for n in (*rows, *([] if number is None else [number]))]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, *[scalar] * len(given)))
    def store(context: Any, words: Any, values: Any, *scalars: Any) -> None:
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, vector

        i32 = ir.IntegerType.get_signless(32)
        c = lambda value: mosaic.utils().c(value, i32)  # noqa: E731
        below = arith.CmpIPredicate.slt
        first, begin, end, *number = (scalar.registers.item() for scalar in scalars)
        thread, base = _thread(), mosaic.utils().memref_ptr(words)
        for n, register in enumerate(values.registers.flat):
            [width] = ir.VectorType(register.type).shape
            if width == 1:
                row = arith.addi(first, arith.addi(thread, c(n * _THREADS)))
                chosen = arith.andi(
                    arith.cmpi(below, row, end), arith.cmpi(arith.CmpIPredicate.sge, row, begin)
                )
            else:
                row = arith.addi(first, arith.muli(arith.remui(thread, c(_LANES)), c(width)))
                chosen = arith.cmpi(below, thread, c(_LANES))
            own = []
            for j in range(width):
                value = vector.extract(register, dynamic_position=[], static_position=[j])
                bits = arith.bitcast(i32, value)
                if not number:
                    own.append(arith.shrui(bits, c(16)))
                    continue
                own.append(arith.ori(arith.andi(bits, c(_HIGH)), *number))
                if per:
                    own.append(arith.ori(arith.shli(bits, c(16)), *number))
            at = row
            if per:
                within = arith.muli(arith.remui(row, c(per)), c(2))
                at = arith.addi(arith.muli(arith.divui(row, c(per)), c(PAIR_WORDS)), within)
            stored = "st.relaxed.gpu.global.b32 [a], $3"
            if len(own) == 2:
                stored = "st.relaxed.gpu.global.v2.b32 [a], {$3, $4}"
            elif not number:
                stored = "st.global.b16 [a], h"
            mosaic.utils().inline_ptx(
                "{ .reg .pred p; .reg .b64 a; .reg .b16 h; cvt.u16.u32 h, $3; setp.ne.u32 p, $2, 0;"
                f" mul.wide.u32 a, $1, {4 if number else 2}; add.s64 a, a, $0; @p {stored}; }}",
                base,
                at,
                arith.extui(i32, chosen),
                *own,
                has_side_effects=True,
            )

    store(ref, values, *given)
