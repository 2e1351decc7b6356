"""The outer memory without erase on NVIDIA GPUs from Ampere on, by kernels of our own (Pallas, to Triton).

Phases become features where they are read, so features are never in memory, nor are gated values. Time is cut
in blocks, which programs take at once: a kernel sums each block's writes, a small one the blocks, and a third
reads outputs. The backward pass does the same from the other end; it reads the inputs anew and keeps one
state a block from the forward pass. Operands of products, states before blocks among them, have the dtype of
the values; sums are float32, not compensated, so the returned residue is zero.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from holo_jax.array_types import Array
from holo_jax.functional import MemoryState
from holo_jax.functional.segments import run_index
from holo_jax.kernels.call import READ_NAME, Call, total_writes
from holo_jax.kernels.capability import compute_capability, partitioned, triton_missing
from holo_jax.kernels.outer import kernels
from holo_jax.kernels.outer.program import Plan, Shape, Tiling

missing = triton_missing
COVERS = "outer memory without erase on NVIDIA GPUs of compute capability 8.0 or higher, 16-bit values"
_WIDTHS = (16, 32, 64, 128)
_LARGEST = 8192
# m d of the heads that were timed; larger states leave registers.
MEASURED_STATE = 2048
# Positions of a block, and programs that fill a large device (measured on an H100: docs/log.md, 2026-11-28).
_BLOCKS = (1024, 512, 256)
_PROGRAMS = 448


def unsupported(call: Call) -> str | None:
    """Why this call cannot run here, or None. Expects a well-formed call."""
    reason = missing()
    if reason is not None:
        return reason
    b, t, h, d = call.values.shape
    m = call.write_phases.shape[-1]
    if call.binding != "outer":
        return f"binding is {call.binding!r}; it must be 'outer'"
    if call.erase is not None:
        return "erase is given; it must be None"
    if call.method != "chunked":
        return f"method is {call.method!r}; it must be 'chunked'"
    if call.chunk_size is not None:
        return f"chunk_size is {call.chunk_size}; it must be None"
    if call.values.dtype not in (jnp.bfloat16, jnp.float16):
        return f"values has dtype {call.values.dtype}; it must be bfloat16 or float16"
    for name, width in (("m", m), ("d", d)):
        if width not in _WIDTHS:
            return f"{name} is {width}; it must be one of {', '.join(map(str, _WIDTHS))}"
    if m * d > _LARGEST:
        return f"m is {m} and d is {d}; m times d must be at most {_LARGEST}"
    if b * t * h * max(m, d) >= 2**31:
        return f"values or phases have {b * t * h * max(m, d)} elements; they must have fewer than 2^31"
    if partitioned():
        return "the computation spans several devices; call it inside jax.shard_map"
    return None


def measured(call: Call) -> bool:
    """Whether heads are of a size that was timed. Expects a well-formed call."""
    return call.write_phases.shape[-1] * call.values.shape[-1] <= MEASURED_STATE


def accumulate(
    call: Call, *, tiling: Tiling | None = None, interpret: bool = False
) -> tuple[Array, MemoryState]:
    """The same as ``holo_jax.functional.accumulate``, for a call that ``unsupported`` accepts.

    Args:
      call: the arguments.
      tiling: shapes of the programs; a measured default if None.
      interpret: run in Pallas' interpreter, anywhere; then with polynomial sines only.
    """
    t, d = call.values.shape[1], call.values.shape[-1]
    m = call.write_phases.shape[-1]
    plan = Plan(tiling or tiling_of(call.values, m), t, m, d, interpret)
    inputs: dict[str, Array] = {"write": call.write_phases, "read": call.read_phases, "values": call.values}
    if call.gates is not None:
        inputs["gates"] = jnp.swapaxes(call.gates.astype(jnp.float32), 1, 2)
    if call.initial_state is not None:
        held = call.initial_state.memory + call.initial_state.residue
        inputs["start"] = jnp.swapaxes(jnp.stack([held.real, held.imag], axis=2), -1, -2)
    runs = None if call.segment_ids is None else run_index(call.segment_ids)
    outputs, end = _memory(plan, inputs, runs)
    real, imag = jnp.moveaxis(jnp.swapaxes(end, -1, -2), 2, 0)
    memory = jax.lax.complex(real, imag)
    return outputs.astype(jnp.float32), MemoryState(memory, jnp.zeros_like(memory), total_writes(call))


def tiling_of(values: Array, m: int, largest: int = _BLOCKS[0]) -> Tiling:
    """Shapes of the programs for values ``[b, t, h, d]`` and heads of m phasors, blocks up to ``largest``."""
    b, t, h, d = values.shape
    blocks = [block for block in _BLOCKS if block <= largest]
    filling = (block for block in blocks if b * h * -(-t // block) >= _PROGRAMS)
    if m * d > MEASURED_STATE:
        shape = Shape(32, 8, 1)
    else:
        # Other devices have registers and shared memory for less at a time.
        shape = Shape(64, 4, 3) if compute_capability() == (9, 0) else Shape(32, 4, 1)
    return Tiling(next(filling, blocks[-1]), shape, shape, shape, shape)


def _segments(plan: Plan, runs: Array | None) -> tuple[dict[str, Array], Array | None]:
    """(run indices from position -1 to ``padded``, by name; which blocks the state before them survives)."""
    if runs is None:
        return {}, None
    edge = jnp.pad(runs, [(0, 0), (0, plan.padded - plan.time)], mode="edge")
    padded = jnp.pad(edge, [(0, 0), (1, 0)])
    length = plan.tiling.block
    survives = padded[:, : plan.padded : length] == padded[:, length::length]
    return {"runs": padded}, survives.astype(jnp.int32)


def _states(plan: Plan, values: Array) -> jax.ShapeDtypeStruct:
    batch, _, heads, _ = values.shape
    return jax.ShapeDtypeStruct((batch, heads, plan.blocks, 2, plan.d, plan.m), jnp.float32)


def forward(
    plan: Plan, inputs: dict[str, Array], runs: Array | None, *, final: bool = True
) -> tuple[Array, Array | None, Array]:
    """(outputs, float32 state after the row ``[b, h, 2, d, m]``, states before blocks for ``backward``).

    Args:
      plan: how the call is cut.
      inputs: ``write`` and ``read`` phases ``[b or 1, t, h, m]``, float32 radians or int16 units of 2^-16
        turns; ``values``; if any, float32 ``gates`` ``[b, h, t]``, and ``start``, the first state.
      runs: run indices of packed rows, or None.
      final: whether the state after the row is wanted; None without.
    """
    segments, survives = _segments(plan, runs)
    given = {name: x for name, x in inputs.items() if name != "start"} | segments
    values = inputs["values"]
    first = {name: x for name, x in given.items() if name != "read"}
    counted = plan.blocks if final else plan.blocks - 1
    total = kernels.totals_of(plan, first, _states(plan, values), counted)
    states, end = kernels.launch_prefix(
        plan, total, inputs.get("start"), survives, values.dtype, counted=counted
    )
    wanted = {"outputs": jax.ShapeDtypeStruct(values.shape, values.dtype)}
    read = kernels.launch(kernels.outputs, plan, plan.tiling.outputs, {**given, "states": states}, wanted)
    # Named while narrow, so that a rematerialised block keeps them instead of running the kernels twice.
    kept = partial(checkpoint_name, name=READ_NAME)
    return kept(read["outputs"]), kept(end) if final else None, kept(states)


def backward(
    plan: Plan,
    inputs: dict[str, Array],
    runs: Array | None,
    states: Array,
    d_outputs: Array,
    d_end: Array | None,
    dtype: Any = jnp.float32,
) -> dict[str, Array]:
    """Gradients ``d_...`` of the inputs of ``forward``, those of phases by radians and in ``dtype``."""
    values = inputs["values"]
    segments, survives = _segments(plan, runs)
    given = {name: x for name, x in inputs.items() if name != "start"} | segments | {"d_outputs": d_outputs}
    phases = jax.ShapeDtypeStruct((*values.shape[:3], plan.m), dtype)
    reads = kernels.launch(
        kernels.reads,
        plan,
        plan.tiling.reads,
        {**given, "states": states},
        {"d_read": phases, "totals": _states(plan, values)},
    )
    behind, d_start = kernels.launch_prefix(
        plan, reads["totals"], d_end, survives, values.dtype, backwards=True
    )
    wanted = {"d_values": jax.ShapeDtypeStruct(values.shape, values.dtype), "d_write": phases}
    if "gates" in inputs:
        wanted["d_gates"] = jax.ShapeDtypeStruct(inputs["gates"].shape, jnp.float32)
    found = kernels.launch(kernels.writes, plan, plan.tiling.writes, {**given, "states": behind}, wanted)
    found["d_read"], found["d_start"] = reads["d_read"], d_start
    for name in ("write", "read"):
        if len(inputs[name]) < len(values):
            found[f"d_{name}"] = jnp.sum(found[f"d_{name}"], axis=0, keepdims=True)
    return {f"d_{name}": found[f"d_{name}"] for name in inputs}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _memory(plan: Plan, inputs: dict[str, Array], runs: Array | None) -> tuple[Array, Array]:
    outputs, end, _ = forward(plan, inputs, runs)
    assert end is not None
    return outputs, end


def _memory_forward(plan: Plan, inputs: dict[str, Array], runs: Array | None) -> tuple[Any, Any]:
    outputs, end, states = forward(plan, inputs, runs)
    return (outputs, end), (inputs, runs, states)


def _memory_backward(plan: Plan, saved: Any, cotangents: Any) -> tuple[dict[str, Array], None]:
    inputs, runs, states = saved
    found = backward(plan, inputs, runs, states, *cotangents)
    return {name: found[f"d_{name}"] for name in inputs}, None


_memory.defvjp(_memory_forward, _memory_backward)
