"""Sine, cosine, reciprocal, power of two and fused product in kernels, by the hardware or without its help.

``approximate`` is for kernels that Triton compiles; the interpreter has no such instructions.
"""

import math
import struct

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array
from holo_jax.kernels.capability import compute_capability
from holo_jax.kernels.phasor_features import HIGH, LOW, sin_cos_reduced

_TURNS = 1.0 / (2.0 * math.pi)


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


def sin_cos(phases: Array, approximate: bool) -> tuple[Array, Array]:
    """Sine and cosine of float32 phases, within 7e-7 for |phase| up to 1e4."""
    if not approximate:
        return sin_cos_reduced(phases, jnp.floor(phases * _TURNS + 0.5))
    return sin_cos_near(_instruction(_REDUCE, phases), approximate)


def sin_cos_near(phases: Array, approximate: bool) -> tuple[Array, Array]:
    """``sin_cos`` of phases between -pi and pi."""
    if not approximate:
        return sin_cos_reduced(phases, jnp.zeros_like(phases))
    return _instruction("sin.approx.f32 $0, $1;", phases), _instruction("cos.approx.f32 $0, $1;", phases)


def turn_units(phases: Array, approximate: bool) -> Array:
    """float32 phases modulo a turn in units of 2^-16 turns, int16, rounded to the nearest."""
    if approximate:
        reduced = _instruction(_REDUCE, phases) * _TURNS
    else:
        reduced = phases * _TURNS
        reduced = reduced - jnp.floor(reduced + 0.5)
    # Half a turn is 2^15, which wraps around to -2^15: the same phase.
    return jnp.floor(reduced * 2.0**16 + 0.5).astype(jnp.int32).astype(jnp.int16)


def reciprocal(x: Array, approximate: bool) -> Array:
    """``1 / x`` of float32 away from 0 and infinity; the hardware's is off by one in the last place."""
    return _instruction("rcp.approx.ftz.f32 $0, $1;", x) if approximate else 1.0 / x


def exp2(x: Array, approximate: bool) -> Array:
    """``2^x`` of float32; the hardware's is off by two in the last place, and 0 below 2^-126."""
    return _instruction("ex2.approx.ftz.f32 $0, $1;", x) if approximate else jnp.exp2(x)


def fma(x: Array, y: Array, z: Array, approximate: bool) -> Array:
    """``x * y + z`` of float32, rounded once, where the compiler would make two instructions of it."""
    if not approximate:
        return x * y + z
    size = jnp.broadcast_shapes(x.shape, y.shape, z.shape)
    [found] = plgpu.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[jnp.broadcast_to(a, size) for a in (x, y, z)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(size, jnp.float32)],
    )
    return found


def released(x: Array, approximate: bool) -> Array:
    """``x``; once it is known, the next kernel may begin, up to where it waits for this one's end.

    Before compute capability 9.0 it begins then.
    """
    if not approximate or (compute_capability() or (0, 0)) < (9, 0):
        return x
    return _instruction("{ griddepcontrol.launch_dependents; mov.b32 $0, $1; }", x)


def _instruction(text: str, x: Array) -> Array:
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    (result,) = plgpu.elementwise_inline_asm(
        text, args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[shape]
    )
    return result
