"""The elementwise memory addressed by positions, on NVIDIA GPUs from Ampere on (see ``rotation``).

Values are read once and outputs written once, and no phases at all. Where rows and channels are too few to
fill the device, time is split in pieces, whose totals a first pass over the values finds.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from holo_jax.array_types import Array
from holo_jax.functional import MemoryState, rotors
from holo_jax.functional.segments import run_index
from holo_jax.kernels.call import READ_NAME, Call, total_writes
from holo_jax.kernels.hadamard.backend import float32, instantiate, padded_runs, plan, starts
from holo_jax.kernels.hadamard.content import launch
from holo_jax.kernels.hadamard.program import Plan, Tiling
from holo_jax.kernels.hadamard.rotation import rotation_backward, rotation_forward

_CHANNELS = (64, 32)
# Of two warps, four on a multiprocessor of a large device.
_PROGRAMS = 512


class Positions(NamedTuple):
    """Phases that are those of positions: at each token ``phases_at(turns, inside)``.

    Attributes:
      turns: uint32 frequencies ``[h, d]``.
      inside: uint32 positions inside segments, ``[b or 1, t]``; one more from each token of a segment to the
        next.
    """

    turns: Array
    inside: Array


def accumulate(
    call: Call,
    positions: Positions,
    *,
    factors: Array | None = None,
    tiling: Tiling | None = None,
    pieces: int | None = None,
    interpret: bool = False,
) -> tuple[Array, MemoryState]:
    """The same as ``triton.accumulate`` for a call whose phases are those of ``positions``.

    The call's phases are not read, and no gradient is taken of them.

    Args:
      call: the arguments; ``triton.unsupported`` accepts it.
      positions: frequencies and positions.
      factors: float32 ``[1 or b, t]``, constants that outputs are multiplied by before they are rounded.
      tiling: shape of the programs; a default if None.
      pieces: pieces of time; chosen by the number of rows and channels if None.
      interpret: run in Pallas' interpreter, anywhere.
    """
    b, t, h, d = call.values.shape
    channels = next(c for c in _CHANNELS if d % c == 0)
    tiling = tiling or Tiling(rows=8, steps=8, channels=channels, warps=channels // 32)
    cut = plan(call, tiling, pieces, interpret, _PROGRAMS)
    turns, inside = positions
    inside = jnp.broadcast_to(inside, (b, t))
    inputs: dict[str, Any] = {
        "values": call.values.reshape(b, t, h * d),
        "turns": _signed(turns.reshape(1, h * d)),
        "base": _signed(inside[:, :1] * turns.reshape(1, h * d)),
    }
    if call.gates is not None:
        inputs["gates"] = call.gates.astype(jnp.float32)
    if factors is not None:
        inputs["factors"] = factors
    state = call.initial_state
    parts = (jnp.zeros((b, h * d), jnp.float32),) * 4
    if state is not None:
        parts = (state.memory.real, state.residue.real, state.memory.imag, state.residue.imag)
    start = tuple(part.reshape(b, h * d) for part in parts)
    runs = None if call.segment_ids is None else run_index(call.segment_ids)
    outputs, end = _memory(cut, inputs, start, runs)
    real, real_rest, imag, imag_rest = (part.reshape(b, h, d) for part in end)
    memory, residue = jax.lax.complex(real, imag), jax.lax.complex(real_rest, imag_rest)
    if runs is not None:
        # Sums count positions on from the first segment's; the state, from the beginning of its own.
        moved = inside[:, -1:] - (inside[:, :1] + jnp.uint32(t - 1))
        by = rotors(turns, moved)[:, 0]
        own = (runs[:, -1] == 0)[:, None, None]
        memory, residue = (jnp.where(own, x, by * x) for x in (memory, residue))
    return outputs.astype(jnp.float32).reshape(b, t, h, d), MemoryState(memory, residue, total_writes(call))


def _signed(units: Array) -> Array:
    return jax.lax.bitcast_convert_type(units, jnp.int32)


def _run(
    kernel: Any, cut: Plan, inputs: dict[str, Any], start: tuple[Array, ...], runs: Any, outputs: Any
) -> dict[str, Any]:
    """One walk over all pieces; adds the last piece's ``end`` to the outputs."""
    run = padded_runs(cut, runs)
    b, _, width = inputs["values"].shape
    sums = {name: x for name, x in inputs.items() if name != "written"}
    before = starts(kernel, cut, sums, run, start)
    wanted = {**outputs, "end": (float32(b, cut.pieces, width),) * 4}
    found = launch(kernel, cut, {**inputs, **run, "start": before}, wanted)
    return {**found, "end": tuple(part[:, -1] for part in found["end"])}


def _forward(cut: Plan, inputs: dict[str, Any], start: tuple[Array, ...], runs: Any) -> Any:
    values = inputs["values"]
    outputs = {"outputs": jax.ShapeDtypeStruct(values.shape, values.dtype)}
    found = _run(rotation_forward, cut, inputs, start, runs, outputs)
    # Named while narrow, so that a rematerialised block keeps them instead of running the kernel twice.
    return jax.tree.map(partial(checkpoint_name, name=READ_NAME), (found["outputs"], found["end"]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _memory(cut: Plan, inputs: dict[str, Any], start: tuple[Array, ...], runs: Any) -> Any:
    return _forward(cut, inputs, start, runs)


def _memory_fwd(cut: Plan, inputs: Any, start: Any, runs: Any) -> Any:
    plain = jax.tree.map(lambda x: x.value, (inputs, start, runs), is_leaf=lambda x: hasattr(x, "perturbed"))
    inputs, start, runs = plain
    return _forward(cut, inputs, start, runs), (inputs, runs)


def _memory_bwd(cut: Plan, saved: Any, cotangents: Any) -> tuple[Any, Any, None]:
    """The walk backwards, which starts from ``e^{i(theta (t - 1) + base)} conj(d_end)``; likewise its end."""
    inputs, runs = saved
    zero = jax.custom_derivatives.SymbolicZero
    d_outputs, d_end = jax.tree.map(instantiate, cotangents, is_leaf=lambda x: isinstance(x, zero))
    values, turns, base = (inputs[name] for name in ("values", "turns", "base"))
    b, t, width = values.shape
    units = turns * jnp.int32(t - 1) + base
    last = rotors(jax.lax.bitcast_convert_type(units, jnp.uint32), jnp.ones((1, 1), jnp.uint32))[0, 0]

    def mirrored(real: Array, imag: Array) -> Array:
        return last * jax.lax.complex(real, -imag)

    given = {name: x for name, x in inputs.items() if name != "base"}
    given |= {"values": d_outputs, "base": jnp.zeros_like(turns)}
    outputs: dict[str, Any] = {"outputs": jax.ShapeDtypeStruct(values.shape, values.dtype)}
    if "gates" in inputs:
        given["written"] = values
        outputs["d_gates"] = float32(b, t, width // cut.tiling.channels)
    # The residue of a state counts as part of the memory it corrects; the state's cotangent is the memory's.
    begin = mirrored(d_end[0], d_end[2])
    rest = jnp.zeros((b, width), jnp.float32)
    backwards = None if runs is None else (runs[:, -1:] - runs)[:, ::-1]
    found = _run(rotation_backward, cut, given, (begin.real, rest, begin.imag, rest), backwards, outputs)
    real, real_rest, imag, imag_rest = found["end"]
    d_start = mirrored(real + real_rest, imag + imag_rest)
    gradients: dict[str, Any] = {"values": found["outputs"], "turns": None, "base": None}
    if "gates" in inputs:
        gradients["gates"] = found["d_gates"].reshape(b, t, cut.heads, -1).sum(-1)
    if "factors" in inputs:
        gradients["factors"] = jnp.zeros_like(inputs["factors"])
    return gradients, (d_start.real, d_start.real, d_start.imag, d_start.imag), None


_memory.defvjp(_memory_fwd, _memory_bwd, symbolic_zeros=True)
