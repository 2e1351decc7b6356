"""Texts of the kernel over all layers: its mail.

Vectors of all rows lie in the mail (``rows_plan``) as plain numbers. A word of ones stands where
nothing has come: rounding to bfloat16 makes no such pair, arithmetic no such float32, whatever they are
given. So a reader loads what it wants, past the first cache, until no word is all ones. It gives up after a
bounded number of loads, and what it has then is not a number.
"""

# Loads before a reader gives up: a few milliseconds.
PATIENCE = 1 << 13
NONE = "0xffffffff"
NAN = "0x7fc07fc0"


def cleared(programs: int, slot: int) -> str:
    """Fills a slot with words of ones, and lets nothing be stored before it.

    Operands: thread of 128, mail, slot, program.
    """
    threads = 128
    lines = ["{", ".reg .pred s; .reg .b32 n; .reg .b64 a;", f"mad.lo.u32 n, $3, {threads}, $0;"]
    lines += [f"mad.wide.u32 a, $2, {slot}, $1; mad.wide.u32 a, n, 16, a;"]
    for begin in range(0, slot // 16, programs * threads):
        lines += [f"setp.lt.u32 s, n, {slot // 16 - begin};"]
        lines += [f"@s st.relaxed.gpu.global.v4.b32 [a+{16 * begin}], {{{', '.join([NONE] * 4)}}};"]
    return "\n".join([*lines, "fence.acq_rel.gpu;", "}"])


def asked(count: int, step: int) -> str:
    """Has so many lines in the second cache. Operands: thread of 128, array, where the first is in bytes."""
    lines = ["{", ".reg .pred p; .reg .b64 a, b;", "cvt.u64.u32 a, $2; add.s64 a, a, $1;"]
    lines += [f"mad.wide.u32 a, $0, {step}, a; setp.lt.u32 p, $0, {count}; @p prefetch.global.L2 [a];", "}"]
    return "\n".join(lines)


def pairs(active: int) -> str:
    """Waits for two float32 a thread. Results: both. Operands: array, where in it in bytes, thread."""
    lines = ["{", ".reg .pred p; .reg .b32 d, n; .reg .b64 a;", "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 n, 0;"]
    lines += [f"cvt.u64.u32 a, $3; add.s64 a, a, $2; mad.wide.u32 a, $4, 8, a; setp.ge.u32 p, $4, {active};"]
    lines += ["@p bra DONE;", "AGAIN:", "ld.relaxed.gpu.global.v2.b32 {$0, $1}, [a];"]
    lines += [f"max.u32 d, $0, $1; add.u32 n, n, 1; setp.eq.u32 p, d, {NONE};", "@!p bra DONE;"]
    lines += [f"setp.lt.u32 p, n, {PATIENCE};", "@p bra AGAIN;", "mov.b32 $0, 0x7fc00000;"]
    return "\n".join([*lines, "DONE:", "}"])


def line(step: int) -> str:
    """Stores two channels a lane by the first warp. Operands: array, where in it in bytes, thread, both."""
    lines = ["{", ".reg .pred p; .reg .b32 d, t; .reg .b64 a;", "setp.lt.u32 p, $2, 32;"]
    lines += [f"shr.u32 t, $2, 4; mul.lo.u32 t, t, {step}; and.b32 d, $2, 15; mad.lo.u32 t, d, 4, t;"]
    lines += ["add.u32 t, t, $1; cvt.u64.u32 a, t; add.s64 a, a, $0; cvt.rn.bf16x2.f32 d, $4, $3;"]
    return "\n".join([*lines, "@p st.relaxed.gpu.global.b32 [a], d;", "}"])
