"""The outer memory without erase from raw phases: what a mixer's maps give, to what it retrieves.

One kernel convolves raw phases, and hands write and read phases on in units of 2^-16 turns (angles are off by
at most 4.8e-5, far less than a 16-bit feature, for half of its bytes). The kernels of ``outer`` make
features of them, multiply keys by their gates, and give the gradients of phases, which the convolution's
backward kernel reads.
"""

from functools import partial
from typing import Any

import jax

from holo_jax.array_types import Array, Float, Int
from holo_jax.functional.segments import run_index
from holo_jax.kernels.block import triton_phases
from holo_jax.kernels.block.triton_phases import Walk
from holo_jax.kernels.capability import compute_capability
from holo_jax.kernels.outer import backend as triton_outer
from holo_jax.kernels.outer.program import Plan, Tiling

# Positions; of phases in fewer bytes smaller blocks are as fast, and faster without a gradient.
_LARGEST_BLOCK = 512


def convolved_sum(
    raw: Float[Array, "b t w"],
    taps: Float[Array, "2 k f"],
    bias: Float[Array, "1 h"],
    values: Float[Array, "b t h d"],
    inside: Int[Array, "b t"] | None,
    segment_ids: Int[Array, "b t"] | None,
    *,
    tiling: Tiling | None = None,
    walk: Walk | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
    """(what an empty memory retrieves in the dtype of the values, write gates in float32).

    Args:
      raw: float32 raw phases of all heads, then a raw gate a head: ``w = f + h``, or more, and columns behind
        those are ignored.
      taps: float32 of the write and of the read convolution.
      bias: float32, added to the raw gates.
      values: bfloat16 or float16; the gradient of ``raw`` is rounded to their dtype.
      inside: positions inside segments, ``[b or 1, t]``; None where every row is one segment.
      segment_ids: of packed rows; None where every row is one segment.
      tiling, walk: shapes of the programs; measured defaults if None.
      interpret: run in Pallas' interpreter; where there is no GPU if None.
    """
    _, t, h, d = values.shape
    m = taps.shape[-1] // h
    interpret = compute_capability() is None if interpret is None else interpret
    if walk is None:
        # The interpreter compiles every position of a run on its own.
        walk = Walk(m, taps.shape[1], rows=max(1, 256 // m))
        walk = walk._replace(rows=2, steps=3, ahead=2) if interpret else walk
    walk = walk._replace(gated=False, turns=True, interpret=interpret)
    plan = Plan(tiling or triton_outer.tiling_of(values, m, _LARGEST_BLOCK), t, m, d, interpret)
    runs = None if segment_ids is None else run_index(segment_ids)
    return _convolved_sum((walk, plan), raw, taps, bias, values, inside, runs)


def _inputs(
    static: Any, raw: Array, taps: Array, bias: Array, values: Array, inside: Any
) -> dict[str, Array]:
    walk, plan = static
    *phases, gates = triton_phases.forward(walk, raw, taps, bias, inside, values.dtype)
    write, read = (x.reshape(*values.shape[:3], plan.m) for x in phases)
    return {"write": write, "read": read, "values": values, "gates": gates[0]}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolved_sum(
    static: Any, raw: Array, taps: Array, bias: Array, values: Array, inside: Any, runs: Any
) -> tuple[Array, Array]:
    inputs = _inputs(static, raw, taps, bias, values, inside)
    return triton_outer.forward(static[1], inputs, runs, final=False)[0], inputs["gates"]


def _forward(static: Any, raw: Array, taps: Array, bias: Array, values: Array, inside: Any, runs: Any) -> Any:
    inputs = _inputs(static, raw, taps, bias, values, inside)
    outputs, _, states = triton_outer.forward(static[1], inputs, runs, final=False)
    return (outputs, inputs["gates"]), (inputs, states, raw, taps, bias, inside, runs)


def _backward(static: Any, saved: Any, cotangents: tuple[Array, Array]) -> Any:
    walk, plan = static
    inputs, states, raw, taps, bias, inside, runs = saved
    d_outputs, d_gates = cotangents
    dtype = inputs["values"].dtype
    found = triton_outer.backward(plan, inputs, runs, states, d_outputs, None, dtype)
    d_write, d_read = (found[f"d_{name}"].reshape(*raw.shape[:2], -1) for name in ("write", "read"))
    d_raw, d_taps, d_bias = triton_phases.backward(
        walk, raw, taps, bias, inside, d_write, d_read, (d_gates + found["d_gates"],)
    )
    return d_raw.astype(raw.dtype), d_taps, d_bias, found["d_values"], None, None


_convolved_sum.defvjp(_forward, _backward)
