"""Kernel of the elementwise memory whose phases are those of positions (Pallas, lowered to Triton).

``y_t = Re(e^{-i theta t} sum_{s <= t} e^{i theta s} x_s)`` needs no phase of any position: a sum that is
turned by ``e^{-i theta}`` from one position to the next is the retrieval,

    R_t = e^{-i theta} R_{t-1} + x_t,   y_t = Re R_t.

As in ``content`` a tile is ``rows`` runs of ``steps`` positions. A run is walked twice: from nothing
for its total, then from what earlier runs leave. Only between runs are sums turned to a frame that all share,
by phasors whose angles are exact products modulo 2^32, so the error does not grow with the position. The
gradient of ``x`` is the same walk over the cotangents from the last position to the first: ``cos`` is even.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array
from holo_jax.kernels.hadamard.program import Pair, Plan, Program, Runs, State, after_tile, before_rows, where
from holo_jax.kernels.instructions import sin_cos

Refs = dict[str, Any]
_RADIANS = 2.0 * math.pi / 2.0**32


def rotation_forward(plan: Plan, inputs: Refs, outputs: Refs) -> None:
    """The walk from the first position.

    Inputs, by name: ``values``; ``turns`` and ``base``, int32 ``[1 or b, width]``: the angle at position t is
    ``turns t + base`` units of 2^-32 of a turn; ``start``: the state before every piece; further ``gates`` of
    the values, ``factors`` of the outputs, ``runs``. Outputs: ``end``, the state after every piece, and
    ``outputs`` where wanted.
    """
    _walk(Program(plan), inputs, outputs, before="gates", after="factors")


def rotation_backward(plan: Plan, inputs: Refs, outputs: Refs) -> None:
    """The walk from the last position, whose values are cotangents of outputs.

    Further input ``written``: the values that gates multiplied; further output ``d_gates``, of each program.
    """
    _walk(Program(plan, backwards=True), inputs, outputs, before="factors", after="gates")


def _walk(program: Program, inputs: Refs, outputs: Refs, *, before: str, after: str) -> None:
    plan = program.plan
    tiling = plan.tiling
    turns, base = (program.constants(inputs[name])[None] for name in ("turns", "base"))
    one_step = _rotor(turns)
    one_run = _rotor(turns * tiling.steps)

    def scales(name: str, times: Array) -> Array | None:
        if name not in inputs:
            return None
        if name == "gates":
            return program.gate(inputs[name], times, inputs["values"].shape[-1] // plan.heads)
        return program.factor(inputs[name], times)

    def times_of(index: Array) -> list[Array]:
        start = (program.piece * plan.tiles + index) * tiling.length
        return [program.times(start, step) for step in range(tiling.steps)]

    def load(index: Array) -> tuple[Array, ...]:
        return tuple(program.load(inputs["values"], t) for t in times_of(index))

    def tile(index: Array, carry: tuple[State, tuple[Array, ...]]) -> Any:
        state, loaded = carry
        start = (program.piece * plan.tiles + index) * tiling.length
        times = times_of(index)
        values = [_scaled(x, scales(before, t)) for x, t in zip(loaded, times, strict=True)]
        # The next tile's are on their way while this one is summed. No read passes a store.
        loaded = load(jnp.minimum(index + 1, plan.tiles - 1))
        reads = "outputs" in outputs
        scales_after = [scales(after, t) if reads else None for t in times]
        written = [program.load(inputs["written"], t) for t in times] if "d_gates" in outputs else []
        runs = Runs(program, inputs.get("runs"), start, times)

        def advance(held: Pair | None, step: int) -> Pair:
            """(imaginary, real) of the sum at a step, from that of the step before."""
            if held is None:
                return jnp.zeros_like(values[step]), values[step]
            imag, real = _turned_back(held, one_step)
            return where(runs.same[step], imag), where(runs.same[step], real) + values[step]

        held: Pair | None = None
        for step in range(tiling.steps):
            held = advance(held, step)
        assert held is not None
        entry = _rotor((start - 1 + program.slots * tiling.steps)[:, None] * turns + base)
        totals = _turned(held, _turned(entry, one_run))
        if reads:
            held = _turned_back(before_rows(state, totals, runs), entry)
            for step, t in enumerate(times):
                held = advance(held, step)
                found = held[1]
                if written:
                    program.store_rows(outputs["d_gates"], t, jnp.sum(written[step] * found, axis=1))
                program.store(outputs["outputs"], t, _scaled(found, scales_after[step]))
        return after_tile(state, totals, runs), loaded

    # A state's parts are (real, imaginary); pairs here are (imaginary, real).
    real, real_rest, imag, imag_rest = (program.vector(ref, program.piece) for ref in inputs["start"])
    begin = (imag, imag_rest, real, real_rest), load(jnp.int32(0))
    (imag, imag_rest, real, real_rest), _ = jax.lax.fori_loop(0, plan.tiles, tile, begin)
    for ref, part in zip(outputs["end"], (real, real_rest, imag, imag_rest), strict=True):
        program.put_vector(ref, program.piece, part)


def _scaled(x: Array, by: Array | None) -> Array:
    return x if by is None else x * by


def _rotor(units: Array) -> Pair:
    """(sine, cosine) of int32 angles in units of 2^-32 of a turn."""
    return sin_cos(units.astype(jnp.float32) * _RADIANS, approximate=False)


def _turned(x: Pair, by: Pair) -> Pair:
    """``x e^{i angle}``; pairs are (imaginary, real), like (sine, cosine)."""
    (imag, real), (sine, cosine) = x, by
    return real * sine + imag * cosine, real * cosine - imag * sine


def _turned_back(x: Pair, by: Pair) -> Pair:
    """``x e^{-i angle}``."""
    (imag, real), (sine, cosine) = x, by
    return imag * cosine - real * sine, real * cosine + imag * sine
