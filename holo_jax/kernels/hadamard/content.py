"""Kernels of the elementwise memory: one pass over time, sums in registers (Pallas, lowered to Triton).

A program owns ``channels`` channels of one row and walks one piece of time in tiles of ``rows * steps``
positions. A tile is ``rows`` runs of ``steps`` consecutive positions: the steps are taken one after the other
by all rows at once, so a prefix sum costs one addition a position, and only the totals of the rows are
combined across threads, once a tile, by a sum over the earlier rows that a mask selects. That sum is exactly
causal (shifted, not a difference), and the mask also makes it reset between segments.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array
from holo_jax.kernels.hadamard.program import (
    Plan,
    Program,
    Runs,
    State,
    after_tile,
    before_rows,
    combine,
    equal,
    scan,
    where,
)
from holo_jax.kernels.instructions import sin_cos

Refs = dict[str, Any]


def forward_kernel(plan: Plan, inputs: Refs, outputs: Refs) -> None:
    """One program of the forward pass.

    Inputs, by name: ``write`` and ``values``; ``read`` (absent: the same as ``write``), ``gates``, ``runs``,
    ``factors`` of the outputs; ``start``: the state before every piece. Outputs, each where wanted:
    ``outputs``, ``states`` (before every tile) and ``end`` (after every piece).
    """
    program = Program(plan)
    tiling = plan.tiling
    reads = "outputs" in outputs
    width = inputs["values"].shape[-1] // plan.heads

    def tile(index: Array, state: State) -> State:
        number = program.piece * plan.tiles + index
        start = number * tiling.length
        if "states" in outputs:
            for part in (0, 1):
                program.put_vector(outputs["states"][part], number, state[2 * part] + state[2 * part + 1])
        times = [program.times(start, step) for step in range(tiling.steps)]
        phases = [program.load(inputs["write"], t) for t in times]
        queries = [program.load(inputs["read"], t) for t in times] if "read" in inputs and reads else None
        values = [program.load(inputs["values"], t) for t in times]
        if "gates" in inputs:
            values = [v * program.gate(inputs["gates"], t, width) for v, t in zip(values, times, strict=True)]
        runs = Runs(program, inputs.get("runs"), start, times)
        keys = [sin_cos(p, tiling.approximate) for p in phases]
        sums = scan(keys, values, runs.same)
        if reads:
            read_keys = keys if queries is None else [sin_cos(q, tiling.approximate) for q in queries]
            prefix = before_rows(state, sums[-1], runs)
            for step, (sine, cosine) in enumerate(read_keys):
                found_before = (where(runs.sees[step], p) for p in prefix)
                real, imag = (s + p for s, p in zip(sums[step], found_before, strict=True))
                found = cosine * real + sine * imag
                if "factors" in inputs:
                    found = found * program.factor(inputs["factors"], times[step])
                program.store(outputs["outputs"], times[step], found)
        return after_tile(state, sums[-1], runs)

    state = tuple(program.vector(ref, program.piece) for ref in inputs["start"])
    state = jax.lax.fori_loop(0, plan.tiles, tile, state)
    for ref, part in zip(outputs["end"], state, strict=True):
        program.put_vector(ref, program.piece, part)


def backward_kernel(plan: Plan, inputs: Refs, outputs: Refs) -> None:
    """One program of the backward pass, from the last tile of its piece to the first.

    Inputs as in the forward pass, further ``d_outputs``, ``d_end``: the cotangent of the state after every
    piece, and ``states`` if the gradients of the phases are wanted. Outputs, each where wanted: ``d_values``,
    ``d_write``, ``d_read`` (of equal phases only ``d_write``, the sum), ``d_gates`` (one number a program),
    ``d_start``.

    With ``G_t = dy_t e^{i b_t} + G_{t+1}``: ``dv = g Re(e^{-ia} G)``, ``dg = sum v Re(e^{-ia} G)``,
    ``da = g v Im(e^{-ia} G)``, ``db = dy Im(e^{-ib} M)``; M is summed again from the state before the tile.
    """
    program = Program(plan)
    tiling, runs = plan.tiling, inputs.get("runs")
    steps = range(tiling.steps)
    width = inputs["d_outputs"].shape[-1] // plan.heads
    turned = "d_write" in outputs
    full = "d_values" in outputs
    valued = turned or "d_gates" in outputs

    def tile(index: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        number = program.piece * plan.tiles + (plan.tiles - 1 - index)
        start = number * tiling.length
        times = [program.times(start, step) for step in steps]
        apart = "read" in inputs
        queries = [program.load(inputs["read" if apart else "write"], t) for t in times]
        phases = [program.load(inputs["write"], t) for t in times] if apart and full else queries
        cotangents = [program.load(inputs["d_outputs"], t) for t in times]
        if "factors" in inputs:
            cotangents = [
                c * program.factor(inputs["factors"], t) for c, t in zip(cotangents, times, strict=True)
            ]
        values: Any = [program.load(inputs["values"], t) for t in times] if valued else None
        gates = (
            [program.gate(inputs["gates"], t, width) for t in times] if full and "gates" in inputs else None
        )
        here: Any = None
        before: Any = None
        same: list[Any] = [None] * tiling.steps
        if runs is not None:
            before = program.run(runs, times[0] - 1)
            here = [program.run(runs, t) for t in times]
            same = [None, *(equal(x, y) for x, y in zip(here[1:], here[:-1], strict=True))]
        read_keys = [sin_cos(q, tiling.approximate) for q in queries]
        keys = [sin_cos(p, tiling.approximate) for p in phases] if apart and full else read_keys
        written: Any = values
        if values is not None and gates is not None:
            written = [v * g for v, g in zip(values, gates, strict=True)]
        pulls = []
        if turned:
            sums = scan(keys, written, same)
            allowed = program.slots[:, None] > program.slots[None, :]
            if here is not None:
                allowed &= before[:, None] == here[-1][None, :]
            prefix = []
            for part in (0, 1):
                held = program.vector(inputs["states"][part], number)[None, :]
                if here is not None:
                    held = jnp.where(equal(before, program.run(runs, start - 1)), held, 0.0)
                prefix.append(combine(allowed, sums[-1][part]) + held)
            for step, (sine, cosine) in enumerate(read_keys):
                sees = None if here is None else equal(here[step], before)
                real, imag = (s + where(sees, p) for s, p in zip(sums[step], prefix, strict=True))
                pull = cotangents[step] * (cosine * imag - sine * real)
                if apart:
                    program.store(outputs["d_read"], times[step], pull)
                else:
                    pulls.append(pull)
        backwards = [None, *reversed(same[1:])]
        later = scan(read_keys[::-1], cotangents[::-1], backwards)[::-1]
        came: Any = None
        if here is not None:
            came = program.run(runs, start + tiling.length)
        if full:
            allowed = program.slots[:, None] < program.slots[None, :]
            if here is not None:
                allowed &= here[-1][:, None] == here[0][None, :]
            suffix = []
            for part in (0, 1):
                held = state[part][None, :]
                if here is not None:
                    held = jnp.where(equal(here[-1], came), held, 0.0)
                suffix.append(combine(allowed, later[0][part]) + held)
            for step, (sine, cosine) in enumerate(keys):
                sees = None if here is None else equal(here[step], here[-1])
                real, imag = (s + where(sees, p) for s, p in zip(later[step], suffix, strict=True))
                along = cosine * real + sine * imag
                if "d_gates" in outputs:
                    program.store_rows(outputs["d_gates"], times[step], jnp.sum(values[step] * along, axis=1))
                if turned:
                    pull = written[step] * (cosine * imag - sine * real)
                    pull = pull if apart else pull + pulls[step]
                    program.store(outputs["d_write"], times[step], pull)
                along = along if gates is None else gates[step] * along
                program.store(outputs["d_values"], times[step], along)
        after = []
        for part in (0, 1):
            total, held = later[0][part], state[part]
            if here is not None:
                first = program.run(runs, start)
                total = jnp.where(equal(here[0], first), total, 0.0)
                held = jnp.where(first == came, held, 0.0)
            after.append(held + jnp.sum(total, axis=0))
        return after[0], after[1]

    state = tuple(program.vector(ref, program.piece) for ref in inputs["d_end"])
    state = jax.lax.fori_loop(0, plan.tiles, tile, state)
    for ref, part in zip(outputs["d_start"], state, strict=True):
        program.put_vector(ref, program.piece, part)


def launch(kernel: Any, plan: Plan, inputs: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    """Runs a kernel over all channels, pieces and rows; ``outputs`` holds shapes and dtypes."""
    tiling = plan.tiling
    batch, _, width = outputs["end" if "end" in outputs else "d_start"][0].shape

    def body(ins: Refs, outs: Refs) -> None:
        kernel(plan, ins, outs)

    return pl.pallas_call(
        body,
        out_shape=outputs,
        grid=(width // tiling.channels, plan.pieces if plan.taken is None else plan.taken, batch),
        compiler_params=None
        if plan.interpret
        else plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=plan.interpret,
        name=kernel.__name__,
    )(inputs)
