"""Kernels of the outer memory without erase, a block of positions a program (Pallas, lowered to Triton).

With the features ``phi(a) = [cos a, sin a] / sqrt(m)``, keys ``k_j = g_j phi(a_j)`` and queries
``q_i = phi(b_i)``, output and gradients are sums over earlier or later positions of the same segment,

    y_i = sum_{j <= i} (q_i . k_j) v_j,       dq_i = sum_{j <= i} (dy_i . v_j) k_j,
    dv_j = sum_{i >= j} (k_j . q_i) dy_i,     dk_j = sum_{i >= j} (v_j . dy_i) q_i.

Inside a chunk they are products of matrices under a mask; chunks before (behind) it are known by the state
``S = sum v k^T`` (``G = sum dy q^T``). A block's kernel begins with the state before it, which ``prefix``
sums from the totals of blocks. Features are made where phases are read, and never written. Of the state two
halves are kept apart, ``[d, m]`` by cosines and by sines.

Operands of products are rounded to the dtype of the values; sums are float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array
from holo_jax.kernels.outer.program import Pair, Plan, Program, Shape, product, selected, survived

Refs = dict[str, Any]
# Elements of a state that a program of ``prefix`` sums, and blocks that it reads ahead.
_PART = 256
_AHEAD = 8


def _added(state: Pair, columns: Array, rows: Pair) -> Pair:
    """State after ``sum columns_j rows_j^T``."""
    return state[0] + product(columns, rows[0], 0, 0), state[1] + product(columns, rows[1], 0, 0)


def _similar(left: Pair, right: Pair) -> Array:
    """``left_i . right_j`` over both halves."""
    return product(left[0], right[0], 1, 1) + product(left[1], right[1], 1, 1)


def _read(pair: Pair, state: Pair) -> Array:
    """``[chunk, d]``: what features read from a state."""
    narrow = state[0].astype(pair[0].dtype), state[1].astype(pair[0].dtype)
    return product(pair[0], narrow[0], 1, 1) + product(pair[1], narrow[1], 1, 1)


def _read_features(columns: Array, state: Pair) -> Pair:
    """``[chunk, m]`` twice: what values read from a state."""
    return product(columns, state[0].astype(columns.dtype)), product(columns, state[1].astype(columns.dtype))


def totals(plan: Plan, shape: Shape, inputs: Refs, outputs: Refs) -> None:
    """``sum v k^T`` over the last segment of a block.

    ``write``, ``values``, ``gates``, ``runs`` to ``totals``.
    """
    program = Program(plan, shape, inputs)

    def visit(number: Array, state: Pair) -> Pair:
        chunk = program.chunk(number)
        phases, values, gates = (
            program.load("write", chunk),
            program.load("values", chunk),
            program.gates(chunk),
        )
        values = selected(program.among(chunk, program.first + plan.tiling.block - 1), values)
        return _added(state, values, program.features(phases, gates, values.dtype))

    state = jax.lax.fori_loop(0, program.count, visit, program.zero_state())
    program.put_state(outputs["totals"], state)


def outputs(plan: Plan, shape: Shape, inputs: Refs, outputs: Refs) -> None:
    """``y``: ``write``, ``read``, ``values``, ``gates``, ``runs``, ``states`` to ``outputs``."""
    program = Program(plan, shape, inputs)

    def visit(number: Array, state: Pair) -> Pair:
        chunk = program.chunk(number)
        write, read = program.load("write", chunk), program.load("read", chunk)
        values, gates = program.load("values", chunk), program.gates(chunk)
        keys = program.features(write, gates, values.dtype)
        queries = program.features(read, None, values.dtype)
        weights = jnp.where(chunk.causal, _similar(queries, keys), 0.0).astype(values.dtype)
        found = product(weights, values) + selected(chunk.reached, _read(queries, state))
        after = _added(survived(chunk, state), selected(chunk.last, values), keys)
        program.store(outputs["outputs"], chunk, found)
        return after

    jax.lax.fori_loop(0, program.count, visit, program.state(inputs["states"]))


def reads(plan: Plan, shape: Shape, inputs: Refs, outputs: Refs) -> None:
    """Gradients of read phases, and ``sum dy q^T`` over the first segment of a block.

    ``write``, ``read``, ``values``, ``gates``, ``runs``, ``states``, ``d_outputs`` to ``d_read``, ``totals``.
    """
    program = Program(plan, shape, inputs)

    def visit(number: Array, carry: tuple[Pair, Pair]) -> tuple[Pair, Pair]:
        state, total = carry
        chunk = program.chunk(number)
        write, read = program.load("write", chunk), program.load("read", chunk)
        values, gates, pulls = (
            program.load("values", chunk),
            program.gates(chunk),
            program.load("d_outputs", chunk),
        )
        keys = program.features(write, gates, values.dtype)
        queries = program.features(read, None, values.dtype)
        weights = jnp.where(chunk.causal, product(pulls, values, 1, 1), 0.0).astype(values.dtype)
        seen = _read_features(selected(chunk.reached, pulls), state)
        d_cosine, d_sine = product(weights, keys[0]) + seen[0], product(weights, keys[1]) + seen[1]
        after = _added(survived(chunk, state), selected(chunk.last, values), keys)
        pulls = selected(program.among(chunk, program.first - 1), pulls)
        total = _added(total, pulls, queries)
        program.store(outputs["d_read"], chunk, queries[0] * d_sine - queries[1] * d_cosine)
        return after, total

    start = program.state(inputs["states"]), program.zero_state()
    _, total = jax.lax.fori_loop(0, program.count, visit, start)
    program.put_state(outputs["totals"], total)


def writes(plan: Plan, shape: Shape, inputs: Refs, outputs: Refs) -> None:
    """Gradients of values, write phases and gates, from the last chunk of a block to the first.

    ``write``, ``read``, ``values``, ``gates``, ``runs``, ``d_outputs`` and ``states``, the sums of ``dy q^T``
    behind every block, to ``d_values``, ``d_write``, ``d_gates``.
    """
    program = Program(plan, shape, inputs)

    def visit(step: Array, state: Pair) -> Pair:
        chunk = program.chunk(program.count - 1 - step, later=True)
        write, read = program.load("write", chunk), program.load("read", chunk)
        values, gates, pulls = (
            program.load("values", chunk),
            program.gates(chunk),
            program.load("d_outputs", chunk),
        )
        # Without gates, which multiply all three gradients behind the products.
        keys = program.features(write, None, values.dtype)
        queries = program.features(read, None, values.dtype)
        weights = jnp.where(chunk.causal, _similar(keys, queries), 0.0).astype(values.dtype)
        d_values = product(weights, pulls) + selected(chunk.last, _read(keys, state))
        weights = jnp.where(chunk.causal, product(values, pulls, 1, 1), 0.0).astype(values.dtype)
        behind = _read_features(selected(chunk.last, values), state)
        d_cosine, d_sine = product(weights, queries[0]) + behind[0], product(weights, queries[1]) + behind[1]
        before = _added(survived(chunk, state), selected(chunk.reached, pulls), queries)
        d_write = keys[0] * d_sine - keys[1] * d_cosine
        if gates is not None:
            along = jnp.sum(keys[0] * d_cosine + keys[1] * d_sine, axis=1)
            program.store_gates(outputs["d_gates"], chunk, along)
            d_values, d_write = gates * d_values, gates * d_write
        program.store(outputs["d_values"], chunk, d_values)
        program.store(outputs["d_write"], chunk, d_write)
        return before

    jax.lax.fori_loop(0, program.count, visit, program.state(inputs["states"]))


def prefix(plan: Plan, inputs: Refs, outputs: Refs, *, counted: int, backwards: bool) -> None:
    """Exclusive sums of ``totals`` over blocks from ``start``, or from the last block back.

    ``survives``: int32 ``[b, blocks]``, whether what is before a block is seen behind it. To ``states``, and
    to ``end`` what is behind all blocks. Totals of the first ``counted`` blocks are read.
    """
    part, head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    columns = pl.ds(part * _PART, _PART)

    def group(number: Array, state: Array) -> Array:
        places = [number * _AHEAD + index for index in range(_AHEAD)]
        blocks = [plan.blocks - 1 - place if backwards else place for place in places]
        # All reads before the first store: none would pass it.
        found = []
        for place, block in zip(places, blocks, strict=True):
            mask = jnp.broadcast_to(place < counted, (_PART,))
            total = plgpu.load(inputs["totals"].at[row, head, block, columns], mask=mask, other=0.0)
            kept = None
            if "survives" in inputs:
                kept = plgpu.load(inputs["survives"].at[row, block], mask=place < plan.blocks, other=1)
            found.append((total, kept))
        for place, block, (total, kept) in zip(places, blocks, found, strict=True):
            states, mask = outputs["states"], jnp.broadcast_to(place < plan.blocks, (_PART,))
            plgpu.store(states.at[row, head, block, columns], state.astype(states.dtype), mask=mask)
            state = total + (state if kept is None else jnp.where(kept != 0, state, 0.0))
        return state

    if "start" in inputs:
        state = plgpu.load(inputs["start"].at[row, head, columns])
    else:
        state = jnp.zeros((_PART,), jnp.float32)
    state = jax.lax.fori_loop(0, -(-plan.blocks // _AHEAD), group, state)
    plgpu.store(outputs["end"].at[row, head, columns], state)


def launch(
    kernel: Any, plan: Plan, shape: Shape, inputs: Refs, outputs: Refs, taken: int | None = None
) -> Any:
    """Runs ``totals``, ``outputs``, ``reads`` or ``writes``; ``outputs`` holds shapes and dtypes.

    Programs take the first ``taken`` blocks, all if None.
    """
    batch, _, heads, _ = inputs["values"].shape

    def body(ins: Refs, outs: Refs) -> None:
        kernel(plan, shape, ins, outs)

    grid = (heads, plan.blocks if taken is None else taken, batch)
    return _call(body, plan, f"outer_{kernel.__name__}", grid, shape, inputs, outputs)


def totals_of(plan: Plan, inputs: Refs, wanted: jax.ShapeDtypeStruct, counted: int) -> Array:
    """What ``totals`` finds of the first ``counted`` blocks; those of others are undefined."""
    if not counted:
        return jnp.zeros(wanted.shape, wanted.dtype)
    return launch(totals, plan, plan.tiling.totals, inputs, {"totals": wanted}, counted)["totals"]


def launch_prefix(
    plan: Plan,
    totals: Array,
    start: Array | None,
    survives: Array | None,
    dtype: Any,
    *,
    counted: int | None = None,
    backwards: bool = False,
) -> tuple[Array, Array]:
    """(states ``[b, h, blocks, 2, d, m]`` in ``dtype``, float32 end ``[b, h, 2, d, m]``) of ``prefix``."""
    batch, heads, blocks, *state = totals.shape
    width = 2 * plan.d * plan.m
    inputs = {"totals": totals.reshape(batch, heads, blocks, width)}
    if start is not None:
        inputs["start"] = start.reshape(batch, heads, width)
    if survives is not None:
        inputs["survives"] = survives
    wanted = {
        "states": jax.ShapeDtypeStruct((batch, heads, blocks, width), dtype),
        "end": jax.ShapeDtypeStruct((batch, heads, width), jnp.float32),
    }

    def body(ins: Refs, outs: Refs) -> None:
        prefix(plan, ins, outs, counted=plan.blocks if counted is None else counted, backwards=backwards)

    grid = (width // _PART, heads, batch)
    found = _call(body, plan, "outer_prefix", grid, Shape(warps=_PART // 128), inputs, wanted)
    return found["states"].reshape(totals.shape), found["end"].reshape(batch, heads, *state)


def _call(
    body: Any, plan: Plan, name: str, grid: tuple[int, ...], shape: Shape, inputs: Refs, outputs: Refs
) -> Any:
    parameters = None
    if not plan.interpret:
        parameters = plgpu.CompilerParams(num_warps=shape.warps, num_stages=shape.stages)
    call = pl.pallas_call(
        body, out_shape=outputs, grid=grid, compiler_params=parameters, interpret=plan.interpret, name=name
    )
    return call(inputs)
