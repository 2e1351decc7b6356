"""The elementwise memory on NVIDIA GPUs from Ampere on, by kernels of our own (Pallas, lowered to Triton).

Phases, values and gates are read once and outputs written once, in the dtype of the values; sine, cosine,
sums and states are float32, the state between tiles with a compensation term. The backward pass reads the
inputs once more and sums again, from one state a tile that the forward pass keeps (a quarter of a byte an
element); without gradients of phases nothing is kept. Where rows and channels are too few to fill the device,
time is split in pieces, whose totals a first pass over phases and values finds.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from holo_jax.array_types import Array
from holo_jax.functional import MemoryState
from holo_jax.functional.segments import run_index
from holo_jax.kernels.call import READ_NAME, Call, total_writes
from holo_jax.kernels.capability import partitioned, triton_missing
from holo_jax.kernels.hadamard.content import backward_kernel, forward_kernel, launch
from holo_jax.kernels.hadamard.program import Plan, Tiling

missing = triton_missing
COVERS = "hadamard memory on NVIDIA GPUs of compute capability 8.0 or higher"
_CHANNELS = (64, 32)
# Programs that fill a large device about twice.
_PROGRAMS = 256
_LEAST_TILES = 8


class _Static(NamedTuple):
    plain: Plan
    turning: Plan


def unsupported(call: Call) -> str | None:
    """Why this call cannot run here, or None. Expects a well-formed call."""
    reason = missing()
    if reason is not None:
        return reason
    b, t, h, d = call.values.shape
    if call.binding != "hadamard":
        return f"binding is {call.binding!r}; it must be 'hadamard'"
    if call.method != "chunked":
        return f"method is {call.method!r}; it must be 'chunked'"
    if call.chunk_size is not None:
        return f"chunk_size is {call.chunk_size}; it must be None"
    if call.values.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"values has dtype {call.values.dtype}; it must be bfloat16, float16 or float32"
    if d % _CHANNELS[-1]:
        return f"d is {d}; it must be a multiple of {_CHANNELS[-1]}"
    if b * t * h * d >= 2**31:
        return f"values has {b * t * h * d} elements; it must have fewer than 2^31"
    if partitioned():
        return "the computation spans several devices; call it inside jax.shard_map"
    return None


def accumulate(
    call: Call,
    *,
    factors: Array | None = None,
    plain: Tiling | None = None,
    turning: Tiling | None = None,
    pieces: int | None = None,
    interpret: bool = False,
) -> tuple[Array, MemoryState]:
    """The same as ``holo_jax.functional.accumulate``, for a call that ``unsupported`` accepts.

    Args:
      call: the arguments.
      factors: float32 ``[1 or b, t]``, constants that outputs are multiplied by before they are rounded.
      plain, turning: shapes of the programs without and with gradients of phases; defaults if None.
      pieces: pieces of time; chosen by the number of rows and channels if None.
      interpret: run in Pallas' interpreter, anywhere; then with polynomial sines only.
    """
    b, t, h, d = call.values.shape
    channels = next(c for c in _CHANNELS if d % c == 0)
    default = Tiling(rows=8, steps=8, channels=channels, warps=channels // 16)
    tilings = (plain or default, turning or default._replace(steps=4))
    if interpret:
        tilings = (tilings[0]._replace(approximate=False), tilings[1]._replace(approximate=False))
    static = _Static(*(plan(call, tiling, pieces, interpret) for tiling in tilings))
    inputs: dict[str, Any] = {"write": call.write_phases, "values": call.values}
    if call.read_phases is not call.write_phases:
        inputs["read"] = call.read_phases
    inputs = {name: x.reshape(*x.shape[:2], h * d) for name, x in inputs.items()}
    if call.gates is not None:
        inputs["gates"] = call.gates.astype(jnp.float32)
    if factors is not None:
        inputs["factors"] = factors
    state = call.initial_state
    if state is None:
        inputs["start"] = (jnp.zeros((b, h * d), jnp.float32),) * 4
    else:
        parts = (state.memory.real, state.residue.real, state.memory.imag, state.residue.imag)
        inputs["start"] = tuple(part.reshape(b, h * d) for part in parts)
    runs = None if call.segment_ids is None else run_index(call.segment_ids)
    outputs, end = _memory(static, inputs, runs)
    real, real_rest, imag, imag_rest = (part.reshape(b, h, d) for part in end)
    after = MemoryState(
        jax.lax.complex(real, imag), jax.lax.complex(real_rest, imag_rest), total_writes(call)
    )
    return outputs.astype(jnp.float32).reshape(b, t, h, d), after


def plan(call: Call, tiling: Tiling, pieces: int | None, interpret: bool, programs: int = _PROGRAMS) -> Plan:
    """How a call is cut: its tiles, and pieces of time where rows and channels make too few ``programs``."""
    b, t, h, d = call.values.shape
    tiles = -(-t // tiling.length)
    if pieces is None:
        wanted = -(-programs * tiling.channels // (b * h * d))
        pieces = max(1, min(wanted, tiles // _LEAST_TILES))
    each = -(-tiles // pieces)
    return Plan(tiling, t, each, -(-tiles // each), h, interpret)


def padded_runs(plan: Plan, runs: Array | None) -> dict[str, Array]:
    """Run indices from position -1 to ``padded``: 0 before the row, the last run after it."""
    if runs is None:
        return {}
    edge = jnp.pad(runs, [(0, 0), (0, plan.padded + 1 - plan.time)], mode="edge")
    return {"runs": jnp.pad(edge, [(0, 0), (1, 0)])}


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """An array's shape and dtype."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _borders(plan: Plan, runs: dict[str, Array]) -> tuple[Array, Array, Array] | None:
    """Run indices before, at the first and at the last position of every piece, ``[b, pieces]``."""
    if not runs:
        return None
    length = plan.tiles * plan.tiling.length
    index = runs["runs"]
    return index[:, : plan.padded : length], index[:, 1 : plan.padded : length], index[:, length::length]


def _gather(mask: Array, totals: Array) -> Array:
    """Sums over pieces that a mask ``[(b,) to, from]`` selects; totals ``[b, pieces, width]``."""
    spec = "ts,bsd->btd" if mask.ndim == 2 else "bts,bsd->btd"
    return jnp.einsum(spec, mask.astype(jnp.float32), totals, precision=jax.lax.Precision.HIGHEST)


def starts(
    kernel: Any, plan: Plan, inputs: dict[str, Any], runs: dict[str, Array], given: tuple[Array, ...]
) -> tuple[Array, ...]:
    """The state before every piece, ``[b, pieces, width]`` by part, by a kernel that walks forwards.

    Args:
      kernel: a pass of sums alone over ``inputs``.
      plan: how the call is cut.
      inputs: of the kernel.
      runs: what ``padded_runs`` returns.
      given: the state before the first piece, ``[b, width]`` by part.
    """
    if plan.pieces == 1:
        return tuple(part[:, None] for part in given)
    b, width = given[0].shape
    shape = (b, plan.pieces, width)
    zeros = (jnp.zeros(shape, jnp.float32),) * 4
    found = launch(
        kernel,
        plan._replace(taken=plan.pieces - 1),
        {**inputs, **runs, "start": zeros},
        {"end": (float32(*shape),) * 4},
    )["end"]
    earlier = jnp.tril(jnp.ones((plan.pieces, plan.pieces - 1), bool), -1)
    reached = None
    borders = _borders(plan, runs)
    if borders is not None:
        before, _, last = borders
        earlier = earlier[None] & (before[:, :, None] == last[:, None, :-1])
        reached = (before == 0)[..., None]
    parts: list[Array] = []
    for part in (0, 2):
        total = _gather(earlier, found[part][:, :-1] + found[part + 1][:, :-1])
        held = [jnp.broadcast_to(x[:, None], shape) for x in given[part : part + 2]]
        if reached is not None:
            held = [jnp.where(reached, x, 0.0) for x in held]
        parts += [held[0] + total, held[1]]
    return tuple(parts)


def _ends(
    plan: Plan, inputs: dict[str, Any], runs: dict[str, Array], d_end: tuple[Array, Array]
) -> tuple[Array, ...]:
    """The cotangent of the state after every piece, ``[b, pieces, width]`` by part."""
    if plan.pieces == 1:
        return tuple(part[:, None] for part in d_end)
    b, width = d_end[0].shape
    shape = (b, plan.pieces, width)
    zeros = (jnp.zeros(shape, jnp.float32),) * 2
    first = {name: x for name, x in inputs.items() if name in ("write", "read", "factors", "d_outputs")}
    if "read" in first:
        first["write"] = first.pop("read")
    found = launch(
        backward_kernel,
        plan._replace(skipped=1, taken=plan.pieces - 1),
        {**first, **runs, "d_end": zeros},
        {"d_start": (float32(*shape),) * 2},
    )["d_start"]
    later = jnp.triu(jnp.ones((plan.pieces, plan.pieces), bool), 1)[:, 1:]
    reached = None
    borders = _borders(plan, runs)
    if borders is not None:
        _, here, last = borders
        later = later[None] & (last[:, :, None] == here[:, None, 1:])
        reached = (last == last[:, -1:])[..., None]
    parts = []
    for part in (0, 1):
        held = jnp.broadcast_to(d_end[part][:, None], shape)
        held = held if reached is None else jnp.where(reached, held, 0.0)
        parts.append(held + _gather(later, found[part][:, 1:]))
    return tuple(parts)


def _forward(static: _Static, inputs: dict[str, Any], runs: Array | None, keep: bool) -> dict[str, Any]:
    plan = static.turning if keep else static.plain
    values = inputs["values"]
    b, t, width = values.shape
    run = padded_runs(plan, runs)
    outputs: dict[str, Any] = {
        "outputs": jax.ShapeDtypeStruct((b, t, width), values.dtype),
        "end": (float32(b, plan.pieces, width),) * 4,
    }
    if keep:
        outputs["states"] = (float32(b, plan.pieces * plan.tiles, width),) * 2
    first = {name: x for name, x in inputs.items() if name in ("write", "values", "gates")}
    before = starts(forward_kernel, plan, first, run, inputs["start"])
    found = launch(forward_kernel, plan, {**inputs, **run, "start": before}, outputs)
    found["end"] = tuple(part[:, -1] for part in found["end"])
    # Named while narrow, so that a rematerialised block keeps them instead of running the kernel twice.
    return jax.tree.map(partial(checkpoint_name, name=READ_NAME), found)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _memory(static: _Static, inputs: dict[str, Any], runs: Array | None) -> tuple[Array, tuple[Array, ...]]:
    found = _forward(static, inputs, runs, keep=False)
    return found["outputs"], found["end"]


def _memory_fwd(static: _Static, inputs: dict[str, Any], runs: Any) -> tuple[Any, Any]:
    turned = inputs["write"].perturbed or ("read" in inputs and inputs["read"].perturbed)
    inputs = jax.tree.map(lambda x: x.value, inputs, is_leaf=lambda x: hasattr(x, "perturbed"))
    runs = None if runs is None else runs.value
    found = _forward(static, inputs, runs, keep=turned)
    return (found["outputs"], found["end"]), (inputs, runs, found.get("states"))


def instantiate(x: Any) -> Array:
    """Zeros for a cotangent that is known to be zero."""
    if isinstance(x, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(x.shape, x.dtype)
    return x


def _memory_bwd(static: _Static, saved: Any, cotangents: Any) -> tuple[Any, None]:
    inputs, runs, states = saved
    plan = static.plain if states is None else static.turning
    d_outputs, d_end = jax.tree.map(
        instantiate,
        cotangents,
        is_leaf=lambda x: isinstance(x, jax.custom_derivatives.SymbolicZero),
    )
    values = inputs["values"]
    b, t, width = values.shape
    run = padded_runs(plan, runs)
    given = {name: x for name, x in inputs.items() if name != "start"}
    given["d_outputs"] = d_outputs
    outputs: dict[str, Any] = {
        "d_values": jax.ShapeDtypeStruct((b, t, width), values.dtype),
        "d_start": (float32(b, plan.pieces, width),) * 2,
    }
    if "gates" in inputs:
        outputs["d_gates"] = float32(b, t, width // plan.tiling.channels)
    if states is not None:
        given["states"] = states
        for name in ("write", "read"):
            if name in inputs:
                outputs[f"d_{name}"] = float32(b, t, width)
    # The residue of a state counts as part of the memory it corrects; the state's cotangent is the memory's.
    given["d_end"] = _ends(plan, given, run, (d_end[0], d_end[2]))
    found = launch(backward_kernel, plan, {**given, **run}, outputs)
    gradients: dict[str, Any] = {"values": found["d_values"]}
    if "gates" in inputs:
        gradients["gates"] = found["d_gates"].reshape(b, t, plan.heads, -1).sum(-1)
    if "factors" in inputs:
        gradients["factors"] = jnp.zeros_like(inputs["factors"])
    for name in ("write", "read"):
        if name not in inputs:
            continue
        if states is None:
            gradients[name] = jnp.zeros_like(inputs[name])
        else:
            found_phases = found[f"d_{name}"]
            gradients[name] = found_phases.sum(0, keepdims=True) if len(inputs[name]) < b else found_phases
    real, imag = (part[:, 0] for part in found["d_start"])
    gradients["start"] = (real, real, imag, imag)
    return gradients, None


_memory.defvjp(_memory_fwd, _memory_bwd, symbolic_zeros=True)
