"""One token of 2 to 16 rows through all memory layers by one kernel, on tensor cores (Pallas, Mosaic GPU).

As ``stream`` does for one row: a program for every multiprocessor stays for the whole token, a
warpgroup of it asks for a layer's weights while the layer before is worked out, and vectors go from program
to program through device memory without barriers. Two things differ with rows. Products are made by tensor
cores, and the columns that they sum over are dealt to the warps of a program: so each warp needs only its
part of a vector, and loads it from device memory into registers. And the memory of every head of every row is
a warpgroup's work; its state, too large to be kept ahead beside a layer's weights, is on its way to registers
while the maps are exchanged.

Vectors are in the mail as plain numbers, where a word of ones says that nothing has come
(``rows_ptx``). A layer has a slot of its own; four layers on it is used again. A slot is cleared in
the layer after its own: whoever has the input of that layer's output map knows that all have read what was in
it, and what is stored three layers on is stored by programs that have heard of the clearing.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.array_types import Array
from holo_jax.kernels import mosaic
from holo_jax.kernels.decode import plan as decode_plan
from holo_jax.kernels.decode import rows_plan as decode_rows_plan
from holo_jax.kernels.decode.memory import Exchange, Place, head, of_head
from holo_jax.kernels.decode.plan import PRODUCTS
from holo_jax.kernels.decode.rows_worker import RowsWorker
from holo_jax.kernels.decode.shape import Shape
from holo_jax.kernels.decode.worker import Refs, launch

# Copies on their way to a program at a time.
FLIGHT = 3
_PENDING = ("phases", "keys", "written", "squares")


def fetch(shape: Shape, refs: Refs) -> None:
    """The warpgroup that asks for weights, a few copies at a time, in the order in which they are needed.

    It also clears slots of the mail, and has states of heads in the second cache before they are asked for.
    """
    plgpu = mosaic.pallas()

    worker = RowsWorker(shape, refs)
    items: list[Any] = []
    for name in PRODUCTS:
        for n, (first, lines) in enumerate(decode_rows_plan.copies(shape, name)):
            own = pl.ds(first, lines)
            free = refs["free"].at[PRODUCTS.index(name)] if n == 0 else None
            items.append((name, own, refs[f"{name}_come"].at[n], free))

    def used(name: str, layer: Array, free: Any) -> None:
        """Waits until the weights of the layer before are not needed any more."""
        plgpu.barrier_wait(free)
        if name == "out":
            worker.clear(worker.slot(layer - 2))

    def body(layer: Array, none: Array) -> Array:
        for n, (name, own, come, free) in enumerate(items):
            if free is not None:
                pl.when(layer > 0)(partial(used, name, layer, free))
            if n == 0:
                worker.ask(layer)
            before = n - FLIGHT
            if before >= -len(items):
                other = items[before][2]
                if before < 0:
                    pl.when(layer > 0)(partial(plgpu.barrier_wait, other))
                else:
                    plgpu.barrier_wait(other)
            plgpu.copy_gmem_to_smem(
                refs[name].at[layer, worker.program, own], refs[f"{name}_room"].at[own], come
            )
        return none

    jax.lax.fori_loop(0, shape.layers, body, jnp.int32(0))
    # What came last: nobody waits for it here any more, but every barrier is to be seen to its end.
    for n, (name, _, come, free) in enumerate(items):
        if n >= len(items) - FLIGHT:
            plgpu.barrier_wait(come)
        if free is not None:
            used(name, jnp.int32(shape.layers), free)


def compute(shape: Shape, refs: Refs) -> None:
    """A warpgroup that computes: its walk through the layers."""
    worker = RowsWorker(shape, refs)
    heads = shape.rows * shape.heads
    workers = decode_rows_plan.workers(shape)
    turns = pl.cdiv(heads, workers)

    def place(turn: Any) -> tuple[Place, Array]:
        """A head of this warpgroup, the last one if there is none, and whether there is."""
        at = decode_rows_plan.head_of(shape, worker.program, worker.group) + turn * workers
        own = jnp.minimum(at, heads - 1)
        row = own // shape.heads
        return Place(jnp.int32(0), row, own % shape.heads, worker.numbers_of(row)), at < heads

    def loaded(at: Place) -> Any:
        layer, row, head, _ = at
        layouts = {
            "memory": worker.layouts.slabs,
            "keys": worker.layouts.lines,
            "written": worker.layouts.slabs,
        }
        states = {name: worker.load(refs[name].at[layer, row, head], own) for name, own in layouts.items()}
        phases, weights, norm, biases = of_head(worker, at)
        lanes = worker.layouts.lanes
        small = (
            [worker.held(x, lanes) for x in phases],
            [[worker.held(x, lanes) for x in taps] for taps in weights],
            None if norm is None else worker.held(norm, worker.layouts.lines.reduce(0)),
            {name: worker.held(x, None) for name, x in biases.items()},
        )
        return small, {name: worker.held(x, layouts[name]) for name, x in states.items()}

    def memory(at: Place, slot: Array, own: Any) -> None:
        small, states = own
        exchange = Exchange(
            maps=lambda: worker.maps(at.row, at.head, slot),
            keys=lambda: states["keys"],
            memory=lambda: (states["memory"], states["written"]),
            put=lambda read: worker.put(at.row, at.head, slot, read),
        )
        head(worker, at, refs["stage"].at[worker.group], small, exchange)

    # A GPU has one turn, whose states are on their way to registers while the maps are exchanged.
    only = place(0) if turns == 1 else None

    def body(layer: Array, none: Array) -> Array:
        slot, following = (worker.slot(layer + n) for n in (0, 1))

        worker.product("maps", layer, slot, slot)
        own = None if only is None else loaded(only[0]._replace(layer=layer))

        def turn_of(turn: Any, none: Array) -> Array:
            at, here = place(turn) if only is None else only
            at = at._replace(layer=layer)
            pl.when(here)(lambda: memory(at, slot, loaded(at) if own is None else own))
            return none

        if turns == 1:
            turn_of(0, none)
        else:
            jax.lax.fori_loop(0, turns, turn_of, none)
        worker.product("out", layer, slot, slot)
        worker.product("up", layer, slot, slot)
        worker.product("down", layer, slot, following)
        return none

    worker.begin()
    jax.lax.fori_loop(0, shape.layers, body, jnp.int32(0))


def decode_rows(shape: Shape, refs: Refs) -> None:
    """One warpgroup of one program; ``refs`` as in ``run``."""
    groups = decode_plan.plan(shape).groups
    pl.when(jax.lax.axis_index("group") == groups)(partial(fetch, shape, refs))
    pl.when(jax.lax.axis_index("group") < groups)(partial(compute, shape, refs))


def run(shape: Shape, arrays: dict[str, Array]) -> dict[str, Array]:
    """One token through all layers.

    Args:
      shape: see ``Shape``; ``decode_rows_plan.unsupported`` says which.
      arrays: by name. Weights of ``decode_rows_plan.dealt`` in bfloat16: ``maps`` in the order of
        ``decode_plan.rows_by_head`` and ``up`` (up and gate), both with the norm's weight in them, ``out``
        and ``down``. Stacked over layers in float32 ``head_norm``, ``read_taps``, ``write_taps``,
        ``write_bias``, ``erase_bias``; the memory ``memory``, ``writes`` and what is pending: ``phases``,
        ``keys``, ``written``, ``squares``. ``numbers``: int32 ``[n, rows]``, begins with
        ``decode_worker.Numbers``; launches follow each other. ``x``: the residual stream ``[rows, width]``;
        ``hidden``: the same after the last layer, of the last token that each row read; both in bfloat16.
        ``mail``: of ``decode_rows_plan.mail``, or of the launch before.

    Returns:
      ``hidden``, what is pending, and ``mail``, after the token.
    """
    plgpu = mosaic.pallas()

    changed = ("hidden", "mail", *_PENDING)
    groups = decode_plan.plan(shape).groups
    scratch: Refs = {}
    for name in PRODUCTS:
        scratch[f"{name}_room"] = plgpu.SMEM(decode_rows_plan.room(shape, name), jnp.bfloat16)
        scratch[f"{name}_come"] = plgpu.Barrier(num_barriers=len(decode_rows_plan.copies(shape, name)))
    for place in ("sums", "added_sums"):
        scratch[place] = plgpu.SMEM((decode_rows_plan.sums_bytes(shape, place) // 4,), jnp.float32)
    scratch["stage"] = plgpu.SMEM((groups, decode_plan.stage(shape)), jnp.float32)
    # The residual stream: two columns of a row a thread; in the interpreter all of it.
    stream = ((shape.rows, shape.width), jnp.float32) if shape.interpret else ((256,), jnp.int32)
    scratch["stream"] = plgpu.SMEM(*stream)
    scratch["free"] = plgpu.Barrier(num_arrivals=groups, num_barriers=len(PRODUCTS))

    return launch(shape, decode_rows, arrays, changed, scratch)
