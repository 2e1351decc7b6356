"""The text of a product of the kernel over all layers, from the wait to the results.

A product is ``mma.sync.m16n8k16``: rows of the batch by eight rows of a weight. The order of columns is the
same for both and else free, so a lane has eight in a row of either, 16 bytes, for two of the instruction.
What can be done before the vector has come stands before the wait.
"""

import struct
from functools import partial
from typing import Any, NamedTuple

from holo_jax.kernels.decode.rows_plan import STEP, TILE, WARPS
from holo_jax.kernels.decode.rows_ptx import NAN, NONE, PATIENCE


class Operands(NamedTuple):
    """Of a text, after the number of the thread.

    Attributes:
      refs: ``weights`` and ``sums`` in shared memory, where weights are and parts of the sums go; ``mail``;
        ``array``, the vector of the first layer; ``stream``, each thread's two columns of the residual stream
        in shared memory; ``hidden``, where it goes after the last layer; ``numbers`` of the tokens.
      numbers: ``slot`` of the vector and ``target`` of the results in the mail, ``waits``, whether this
        program has any, its ``first`` one, and ``flag``: whether the layer is the first (maps) or the last.
    """

    refs: tuple[str, ...]
    numbers: tuple[str, ...]


OPERANDS = {
    "maps": Operands(("weights", "mail", "sums", "array"), ("slot", "waits", "first", "target", "flag")),
    "out": Operands(("weights", "mail", "sums", "stream"), ("slot", "waits", "first", "target")),
    "up": Operands(("weights", "mail", "sums"), ("slot", "waits", "first", "target")),
    "down": Operands(
        ("weights", "mail", "sums", "stream", "hidden", "numbers"),
        ("slot", "waits", "first", "target", "flag"),
    ),
}


class Source(NamedTuple):
    """Where a vector of all rows lies, in bytes.

    Attributes:
      row, lane, step: from one row to the next, from eight columns to the next, from 32 to the next.
    """

    row: int
    lane: int
    step: int


class Multiply(NamedTuple):
    """A product's first half.

    Attributes:
      rows, padded: of the batch, and with those that there is only room for.
      tiles: rows of each tile of the weight.
      depth: columns.
      at: of the vector in a slot, in bytes.
      slot: bytes of a slot.
      source: the vector's.
      plain: another source, for the first layer, or None.
      squares: whether the sum of squares of each row is wanted too.
      early: loads of weights before the vector is waited for.
    """

    rows: int
    padded: int
    tiles: tuple[int, ...]
    depth: int
    at: int
    slot: int
    source: Source
    plain: Source | None
    squares: bool
    early: int


class Finish(NamedTuple):
    """A product's second half: two columns of a row a thread.

    Attributes:
      rows, padded: as in ``Multiply``.
      tiles: number of tiles.
      own: results that a program makes.
      outputs: that all make.
      at: of the vector that is stored, in a slot, in bytes.
      slot: bytes of a slot.
      depth, eps: of the norm before the product.
      heads, per_head: of the maps.
    """

    rows: int
    padded: int
    tiles: int
    own: int
    outputs: int
    at: int
    slot: int
    depth: int
    eps: float
    heads: int
    per_head: int


def product(kind: str, call: Multiply, finish: Finish) -> str:
    """Waits for a vector, multiplies, adds up the warps' parts, and stores results.

    Args:
      kind: ``maps`` stores float32 head by head; ``up`` stores ``silu(gate) * up``; ``out`` and ``down`` add
        to the residual stream.
      call, finish: see there.

    Returns:
      Of operands: the thread, then as of ``OPERANDS``. A warp's parts are ``[warps, tiles, padded, 8]``, then
      its sums of squares ``[warps, padded]``.
    """
    before, after = _FINISHES[kind](finish)
    lines = ["{", *before, *_multiplied(call), "bar.sync 15, 256;", *after, "}"]
    text = "\n".join(lines)
    for n, name in enumerate(("thread", *OPERANDS[kind].refs, *OPERANDS[kind].numbers)):
        text = text.replace(f"<{name}>", f"${n}")
    return text


def _registers(kind: str, names: list[str]) -> str:
    return f".reg .{kind} {', '.join(names)};"


def _multiplied(call: Multiply) -> list[str]:
    """Up to where a warp's sums are in shared memory."""
    halves = call.padded // 8
    steps = call.depth // (STEP * WARPS)
    count = len(call.tiles)
    chains = max(1, 4 // (count + 2 * call.squares))
    b = lambda t, i: [f"b{t}_{i}_{j}" for j in range(4)]  # noqa: E731
    x = lambda h, i: [f"x{h}_{i}_{j}" for j in range(4)] if h < halves else ["none"] * 4  # noqa: E731
    c = lambda t, k: [f"c{t}_{k}_{j}" for j in range(4)]  # noqa: E731
    vectors = [(h, i) for i in range(steps) for h in range(halves)]
    sums: list[tuple[Any, int]] = [(t, k) for t in range(count) for k in range(chains)]
    sums += [(f"s{h}", 0) for h in range(halves if call.squares else 0)]
    lines = [".reg .pred p, h0, h1;", ".reg .b32 lane, g, q, w, s, n, t, d, none, rs, qs, ks;"]
    lines += [".reg .b64 a, f, e;", ".reg .f32 v;"]
    lines += [_registers("pred", [f"m{h}_{i}" for h, i in vectors])]
    for t in range(count):
        for i in range(steps):
            lines += [_registers("b32", b(t, i))]
    lines += [_registers("b32", x(h, i)) for h, i in vectors]
    lines += [_registers("f32", c(t, k)) for t, k in sums]
    lines += ["mov.b32 none, 0; and.b32 lane, <thread>, 31; shr.u32 w, <thread>, 5;"]
    lines += ["shr.u32 g, lane, 2; and.b32 q, lane, 3;"]

    places = [f"s{t}" for t in range(count)]
    lines += [_registers("b32", places)]
    for t, rows in enumerate(call.tiles):
        lines += [f"min.u32 t, g, {rows - 1}; mad.lo.u32 s, w, {steps * rows}, t;"]
        lines += [f"mad.lo.u32 t, q, 16, {2 * t * TILE * call.depth}; mad.lo.u32 s, s, 64, t;"]
        lines += [f"add.u32 s{t}, s, <weights>;"]
    weights = [
        f"ld.shared.v4.b32 {{{', '.join(b(t, i))}}}, [s{t}+{i * rows * 64}];"
        for i in range(steps)
        for t, rows in enumerate(call.tiles)
    ]
    lines += weights[: call.early]

    # Where the warp's part begins, and the lane's.
    source = call.source
    lines += [f"mad.wide.u32 f, <slot>, {call.slot}, <mail>; add.s64 f, f, {call.at};"]
    lines += [f"mov.b32 rs, {source.row}; mov.b32 qs, {source.lane}; mov.b32 ks, {source.step};"]
    if call.plain is not None:
        lines += ["setp.ne.u32 p, <flag>, 0; selp.b64 f, <array>, f, p;"]
        for name, value in zip(("rs", "qs", "ks"), call.plain, strict=True):
            lines += [f"selp.b32 {name}, {value}, {name}, p;"]
    lines += [f"mul.lo.u32 t, w, {steps}; mad.wide.u32 f, t, ks, f;"]
    lines += ["mad.wide.u32 a, g, rs, f; mad.wide.u32 a, q, qs, a;"]

    lines += [f"mov.b32 {name}, 0;" for h, i in vectors for name in x(h, i)]
    lines += ["mov.b32 n, 0; setp.ne.u32 p, <waits>, 0;"]
    lines += [f"setp.lt.u32 h0, g, {call.rows}; add.u32 t, g, 8; setp.lt.u32 h1, t, {call.rows};"]
    lines += ["@!p bra DONE;"]
    lines += [f"mov.pred m{h}_{i}, h{h};" for h, i in vectors]
    lines += ["AGAIN:"]
    for h, i in vectors:
        at = f"a+{i * source.step + h * 8 * source.row}"
        if call.plain is not None:
            lines += [f"mov.b64 e, a; {f'mad.wide.u32 e, rs, {8 * h}, e;' if h else ''}"]
            lines += [f"mad.wide.u32 e, ks, {i}, e;" if i else ""]
            at = "e"
        lines += [f"@m{h}_{i} ld.relaxed.gpu.global.v4.b32 {{{', '.join(x(h, i))}}}, [{at}];"]
    lines += ["setp.ne.u32 p, n, n;"]
    for h, i in vectors:
        w = x(h, i)
        lines += [f"max.u32 d, {w[0]}, {w[1]}; max.u32 t, {w[2]}, {w[3]}; max.u32 d, d, t;"]
        lines += [f"setp.eq.u32 m{h}_{i}, d, {NONE}; or.pred p, p, m{h}_{i};"]
    lines += ["vote.sync.any.pred p, p, 0xffffffff;", "@!p bra DONE;"]
    lines += [f"add.u32 n, n, 1; setp.lt.u32 p, n, {PATIENCE};", "@p bra AGAIN;"]
    lines += [f"mov.b32 {x(0, 0)[0]}, {NAN};", "DONE:", "bar.warp.sync 0xffffffff;"]

    lines += weights[call.early :]
    lines += [f"mov.f32 {name}, 0f00000000;" for t, k in sums for name in c(t, k)]
    for i in range(steps):
        for half in range(2):
            here, there = x(0, i)[2 * half : 2 * half + 2], x(1, i)[2 * half : 2 * half + 2]
            first = f"{{{here[0]}, {there[0]}, {here[1]}, {there[1]}}}"
            pairs: list[Any] = [
                ((t, (2 * i + half) % chains), b(t, i)[2 * half : 2 * half + 2]) for t in range(count)
            ]
            if call.squares:
                pairs += [((f"s{h}", 0), (here, there)[h]) for h in range(halves)]
            for (t, k), second in pairs:
                total = f"{{{', '.join(c(t, k))}}}"
                lines += ["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"]
                lines += [f" {total}, {first}, {{{', '.join(second)}}}, {total};"]
    for t in range(count):
        for k in range(1, chains):
            lines += [f"add.f32 {y}, {y}, {z};" for y, z in zip(c(t, 0), c(t, k), strict=True)]
    lines += [f"mul.lo.u32 s, w, {count * call.padded * 32}; mad.lo.u32 s, g, 32, s;"]
    lines += ["mad.lo.u32 s, q, 8, s; add.u32 s, s, <sums>;"]
    for t in range(count):
        for h in range(halves):
            place = t * call.padded * 32 + h * 256
            lines += [f"st.shared.v2.f32 [s+{place}], {{{', '.join(c(t, 0)[2 * h : 2 * h + 2])}}};"]
    if call.squares:
        # The diagonal of all rows' products with each other.
        lines += [f"mad.lo.u32 s, w, {call.padded}, g; mad.lo.u32 s, s, 4, <sums>;"]
        lines += ["shr.u32 t, g, 1; setp.eq.u32 h0, t, q; and.b32 t, g, 1; setp.ne.u32 p, t, 0;"]
        for h in range(halves):
            low, high = c(f"s{h}", 0)[2 * h : 2 * h + 2]
            place = WARPS * count * call.padded * 32 + 32 * h
            lines += [f"selp.f32 v, {high}, {low}, p; @h0 st.shared.f32 [s+{place}], v;"]
    return lines


def _place(call: Finish, *, aligned: bool = True) -> list[str]:
    """Sets ``row``, ``col``, ``local``, whether the thread has a result, ``own``, and its warp, ``any``."""
    bits = 4 if call.padded == 16 else 3
    begin = f"and.b32 col, <first>, {-8};" if aligned else "mov.b32 col, <first>;"
    return [
        ".reg .pred own, any; .reg .b32 row, col, local, t0, t1; .reg .b64 to, to1;",
        f"shr.u32 row, <thread>, 2; and.b32 row, row, {call.padded - 1};",
        f"shr.u32 t0, <thread>, {2 + bits}; {begin} mad.lo.u32 col, t0, 8, col;",
        "and.b32 t0, <thread>, 3; mad.lo.u32 col, t0, 2, col; sub.u32 local, col, <first>;",
        f"setp.lt.u32 own, local, {call.own}; setp.lt.u32 any, col, {call.outputs}; and.pred own, own, any;",
        f"setp.lt.u32 any, row, {call.rows}; and.pred own, own, any; selp.b32 local, local, 0, own;",
        "vote.sync.any.pred any, own, 0xffffffff;",
    ]


def _from(call: Finish, name: str, local: str) -> list[str]:
    """Sets a register to where a thread's columns are in the first warp's parts."""
    return [
        f".reg .b32 {name}; shr.u32 t0, {local}, 3; mul.lo.u32 t0, t0, {call.padded * 32};",
        f"mad.lo.u32 t0, row, 32, t0; and.b32 t1, {local}, 7; mad.lo.u32 t0, t1, 4, t0;",
        f"add.u32 {name}, t0, <sums>;",
    ]


def _sums(call: Finish, place: str, names: tuple[str, str]) -> list[str]:
    """Of both columns over warps."""
    lines = [f".reg .f32 {', '.join(f'{name}_{w}' for name in names for w in range(WARPS))};"]
    for w in range(WARPS):
        at = w * call.tiles * call.padded * 32
        lines += [f"ld.shared.v2.f32 {{{names[0]}_{w}, {names[1]}_{w}}}, [{place}+{at}];"]
    return lines + [_added(name) for name in names]


def _added(name: str) -> str:
    """``name_0`` over warps, by halves."""
    lines, apart = [], WARPS // 2
    while apart:
        lines += [f"add.f32 {name}_{w}, {name}_{w}, {name}_{w + apart};" for w in range(apart)]
        apart //= 2
    return " ".join(lines)


def _inverse(call: Finish) -> list[str]:
    """``r``: one over the root mean square of the row."""
    lines = [f".reg .f32 r, {', '.join(f'r_{w}' for w in range(WARPS))};", "mad.lo.u32 t0, row, 4, <sums>;"]
    for w in range(WARPS):
        at = WARPS * call.tiles * call.padded * 32 + w * call.padded * 4
        lines += [f"ld.shared.f32 r_{w}, [t0+{at}];"]
    mean = f"fma.rn.f32 r, r_0, {_f32(1.0 / call.depth)}, {_f32(call.eps)};"
    return [*lines, _added("r"), mean, "rsqrt.approx.f32 r, r;"]


def _f32(value: float) -> str:
    return "0f" + struct.pack(">f", value).hex().upper()


def _eights(call: Finish) -> list[str]:
    """Sets ``to``: where a pair of columns lies in the mail, by eights of columns."""
    return [
        f"mad.wide.u32 to, <target>, {call.slot}, <mail>; shr.u32 t0, col, 3;",
        f"mad.lo.u32 t0, t0, {call.padded}, row; and.b32 t1, col, 7; shl.b32 t1, t1, 1;",
        f"mad.lo.u32 t0, t0, 16, t1; cvt.u64.u32 to1, t0; add.s64 to, to, to1; add.s64 to, to, {call.at};",
    ]


def _halves(word: str, names: tuple[str, str]) -> list[str]:
    """Two float32 of two bfloat16."""
    low, high = names
    return [
        f"{{ .reg .b32 h; shl.b32 h, {word}, 16; mov.b32 {low}, h;"
        f" and.b32 h, {word}, 0xffff0000; mov.b32 {high}, h; }}"
    ]


def _maps(call: Finish) -> tuple[list[str], list[str]]:
    """Before the warps' parts have met, and after."""
    before = [*_place(call, aligned=False), *_from(call, "from", "local")]
    before += [f"mad.wide.u32 to, <target>, {call.slot}, <mail>;"]
    # The maps of a head lie side by side, so head and column need not be parted.
    before += [f"mad.lo.u32 t0, row, {call.heads * call.per_head}, col; mul.wide.u32 to1, t0, 4;"]
    before += [f"add.s64 to, to, to1; add.s64 to, to, {call.at};"]
    after = ["@!any bra STORED;", *_sums(call, "from", ("y", "z")), *_inverse(call)]
    after += ["mul.f32 y_0, y_0, r; mul.f32 z_0, z_0, r;"]
    after += ["@own st.relaxed.gpu.global.v2.f32 [to], {y_0, z_0};", "STORED:"]
    return before, after


def _gated(call: Finish) -> tuple[list[str], list[str]]:
    """As ``_maps``."""
    before = [".reg .b32 up, gate, other; .reg .f32 e0, e1, f0, f1;", *_place(call)]
    before += [*_from(call, "from", "local"), f"add.u32 other, local, {call.own};"]
    before += [*_from(call, "beside", "other"), *_eights(call)]
    after = ["@!any bra STORED;", *_sums(call, "from", ("y", "z")), *_sums(call, "beside", ("v", "w"))]
    after += _inverse(call)
    after += [f"mul.f32 {name}_0, {name}_0, r;" for name in "yzvw"]
    after += ["cvt.rn.bf16x2.f32 up, z_0, y_0; cvt.rn.bf16x2.f32 gate, w_0, v_0;"]
    after += _halves("up", ("y_0", "z_0")) + _halves("gate", ("v_0", "w_0"))
    for name, e, f in (("v_0", "e0", "f0"), ("w_0", "e1", "f1")):
        after += [f"mul.f32 {e}, {name}, {_f32(-1.4426950408889634)}; ex2.approx.f32 {e}, {e};"]
        after += [f"add.f32 {e}, {e}, {_f32(1.0)}; rcp.approx.f32 {e}, {e}; mul.f32 {f}, {name}, {e};"]
    after += ["mul.f32 y_0, y_0, f0; mul.f32 z_0, z_0, f1; cvt.rn.bf16x2.f32 up, z_0, y_0;"]
    return before, [*after, "@own st.relaxed.gpu.global.b32 [to], up;", "STORED:"]


def _stream(call: Finish, *, last: bool) -> tuple[list[str], list[str]]:
    """As ``_maps``; ``last`` if the last layer's results go to rows that read a token."""
    before = [".reg .b32 now, at; .reg .f32 o0, o1; .reg .pred l;", *_place(call)]
    before += [*_from(call, "from", "local"), *_eights(call)]
    before += [
        "mad.lo.u32 at, <thread>, 4, <stream>; ld.shared.b32 now, [at];",
        *_halves("now", ("o0", "o1")),
    ]
    after = ["@!any bra STORED;", *_sums(call, "from", ("y", "z"))]
    after += ["cvt.rn.bf16x2.f32 now, z_0, y_0;", *_halves("now", ("y_0", "z_0"))]
    after += ["add.f32 y_0, y_0, o0; add.f32 z_0, z_0, o1; cvt.rn.bf16x2.f32 now, z_0, y_0;"]
    after += ["setp.ne.u32 l, <flag>, 0;", "@l bra LAST;"] if last else []
    after += ["@own st.relaxed.gpu.global.b32 [to], now; st.shared.b32 [at], now;"]
    if last:
        after += ["bra STORED;", "LAST:", "@!own bra STORED;"]
        after += [f"mad.wide.u32 to, row, 4, <numbers>; ld.global.b32 t0, [to+{4 * call.rows}];"]
        after += [f"mad.lo.u32 t1, row, {call.outputs}, col; mad.wide.u32 to, t1, 2, <hidden>;"]
        after += ["setp.ne.u32 l, t0, 0; @l st.global.b32 [to], now;"]
    return before, [*after, "STORED:"]


_FINISHES: dict[str, Any] = {
    "maps": _maps,
    "up": _gated,
    "out": partial(_stream, last=False),
    "down": partial(_stream, last=True),
}


def begun(call: Finish) -> str:
    """The residual stream before the first layer. Operands: thread, ``stream``, ``array``, ``first``."""
    lines = ["{", ".reg .b32 now, at; mov.b32 now, 0;", *_place(call)]
    lines += [f"mad.lo.u32 t1, row, {call.outputs}, col; mad.wide.u32 to, t1, 2, $2;"]
    lines += ["@own ld.global.b32 now, [to]; mad.lo.u32 at, $0, 4, $1; st.shared.b32 [at], now;", "}"]
    return "\n".join(lines).replace("<thread>", "$0").replace("<first>", "$3")
