"""One token of 1 to 16 rows through all memory layers by one kernel, on tensor cores (Pallas, Mosaic GPU).

A token costs what streaming the weights costs, if nothing interrupts the stream. With a kernel for every
product something does: each starts, asks for its weights, waits for the first of them, and ends. Here one
program for every multiprocessor stays for the whole token, with room in shared memory for its share of a
layer's weights. When a share is multiplied, a warpgroup asks for the same one of the next layer, by
asynchronous copies: a layer's weights arrive while the layer before is worked out.

A layer has five parts, each of which needs all of the one before: the maps of the normed input; the memory,
one head of a row a warpgroup; the output map and the residual sum; the gated hidden layer of the denoiser;
its output map and the residual sum. Products are made by tensor cores, and the columns that they sum over are
dealt to the warps of a program: so each warp needs only its part of a vector, and loads it from device memory
into registers until all of it has come. States of heads are too large to be kept ahead beside a layer's
weights: they are copied to where those of ``up`` begin, once these are multiplied.

Vectors go from program to program through device memory without barriers, as plain numbers, where a word of
ones says that nothing has come (``rows_ptx``). A layer has a slot of its own; four layers on it is used
again. A slot is cleared in the layer after its own: whoever has the input of that layer's output map knows
that all have read what was in it, and what is stored three layers on is stored by programs that have heard
of the clearing. Who makes nothing of a product does not wait for its vector either.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.array_types import Array
from holo_jax.kernels import mosaic
from holo_jax.kernels.decode import plan as decode_plan
from holo_jax.kernels.decode import rows_plan as decode_rows_plan
from holo_jax.kernels.decode.memory import Exchange, Place, head, of_head, of_keys_layout
from holo_jax.kernels.decode.plan import PRODUCTS
from holo_jax.kernels.decode.rows_worker import RowsWorker
from holo_jax.kernels.decode.shape import Shape
from holo_jax.kernels.decode.worker import Refs, launch

# Copies on their way to a program at a time. With more vectors wait behind weights on the way from the second
# cache, with fewer memory stands still.
FLIGHT = 2
_PENDING = ("phases", "keys", "written", "squares")


def fetch(shape: Shape, refs: Refs) -> None:
    """The warpgroup that asks for weights and states, a few copies at a time, in the order of their need.

    It also clears slots of the mail. The first copies of ``up`` are asked for once heads have read their
    states, which are in their place until then.
    """
    plgpu = mosaic.pallas()

    worker = RowsWorker(shape, refs)
    late = decode_rows_plan.late(shape)

    class Item(NamedTuple):
        """One or several copies, what says that they have come, what that their room is free, whose it is.

        A late one is of the layer before; of a head that is not there nothing is copied.
        """

        start: Any
        come: Any
        free: Any
        name: str
        late: bool = False
        here: Any = None

    def weights(name: str, own: Any, come: Any) -> Any:
        def start(layer: Array) -> None:
            source = refs[name].at[layer, worker.program, own]
            plgpu.copy_gmem_to_smem(source, refs[f"{name}_room"].at[own], come)

        return start

    def states(slot: int, names: tuple[str, ...], come: Any) -> Any:
        def start(layer: Array) -> None:
            # Until here it has asked for what no kernel changes.
            pl.when(layer == 0)(worker.follow)
            row, head = worker.head_of(slot)
            for name in names:
                source = refs[name].at[layer, row, head]
                plgpu.copy_gmem_to_smem(source, refs[f"{name}_room"].at[slot], come)

        return start

    items: list[Item] = []
    for name in PRODUCTS:
        pieces = []
        for n, (first, lines) in enumerate(decode_rows_plan.copies(shape, name)):
            own, come = pl.ds(first, lines), refs[f"{name}_come"].at[n]
            pieces.append(Item(weights(name, own, come), come, None, name, name == "up" and n < late))
        if name == "up":
            items[:0] = [item._replace(free=None if n else "heads") for n, item in enumerate(pieces[:late])]
            pieces = pieces[late:]
            for slot in reversed(range(decode_rows_plan.heads_of_program(shape))):
                for kind, names in enumerate((("keys", "written"), ("memory",))):
                    come = refs["held_come" if kind == 0 else "memory_come"].at[slot]
                    pieces.insert(0, Item(states(slot, names, come), come, None, name, here=worker.has(slot)))
        items += [item if n else item._replace(free=name) for n, item in enumerate(pieces)]

    def used(name: str, layer: Array) -> None:
        """Waits until what was in this room is not needed any more."""
        plgpu.barrier_wait(refs["heads_read"] if name == "heads" else refs["free"].at[PRODUCTS.index(name)])
        if name == "out":
            # Numbers are there: who computes has waited for the kernel before.
            worker.clear(worker.slot(layer - 2))

    def when(do: Any, *conditions: Any) -> None:
        given = [x for x in conditions if x is not None]
        if given:
            pl.when(given[0] if len(given) == 1 else given[0] & given[1])(do)
        else:
            do()

    def begin(item: Item, layer: Array) -> None:
        item.start(layer - 1 if item.late else layer)

    def body(layer: Array, none: Array) -> Array:
        for n, item in enumerate(items):
            if item.free is not None:
                pl.when(layer > 0)(partial(used, item.free, layer))
            if n == 0:
                worker.ask(layer)
            other = items[n - FLIGHT]
            again = layer > 0 if n < FLIGHT or other.late else None
            when(partial(plgpu.barrier_wait, other.come), again, other.here)
            when(partial(begin, item, layer), layer > 0 if item.late else None, item.here)
        return none

    jax.lax.fori_loop(0, shape.layers, body, jnp.int32(0))
    # What came last: nobody waits for it here any more, but every barrier is to be seen to its end.
    for item in items[-FLIGHT:]:
        when(partial(plgpu.barrier_wait, item.come), item.here)
    end = jnp.int32(shape.layers)
    for item in items:
        if item.late:
            if item.free is not None:
                used(item.free, end)
            begin(item, end)
    for item in items:
        if item.late:
            plgpu.barrier_wait(item.come)
        elif item.free is not None:
            used(item.free, end)


def compute(shape: Shape, refs: Refs) -> None:
    """A warpgroup that computes: its walk through the layers."""
    plgpu = mosaic.pallas()

    worker = RowsWorker(shape, refs)
    groups, places = decode_plan.groups(shape), decode_rows_plan.heads_of_program(shape)
    turns = pl.cdiv(places, groups)
    layouts = worker.layouts
    parts = [pl.ds(n, shape.size) for n in range(0, 2 * shape.m, shape.size)]
    pending = {"keys": of_keys_layout(worker), "written": layouts.slabs}

    def place_of(own: Any) -> Place:
        """Of a place of this program, or the last head if there is none."""
        row, head = worker.head_of(own)
        return Place(jnp.int32(0), row, head, worker.numbers_of(row))

    def loaded(at: Place, own: Any) -> Any:
        def wait() -> None:
            for name in ("held_come", "memory_come"):
                plgpu.barrier_wait(refs[name].at[own])

        pl.when(worker.has(own))(wait)
        found = {name: worker.load(refs[f"{name}_room"].at[own], layout) for name, layout in pending.items()}
        memory = [worker.load(refs["memory_room"].at[own, part], layouts.slabs) for part in parts]
        phases, weights, norm, biases = of_head(worker, at)
        small = (
            [worker.held(x, layouts.lanes) for x in phases],
            [[worker.held(x, layouts.lanes) for x in taps] for taps in weights],
            None if norm is None else worker.held(norm, layouts.lines.reduce(0)),
            {name: worker.held(x, None) for name, x in biases.items()},
        )
        found = {name: worker.held(x, pending[name]) for name, x in found.items()}
        memory = [worker.held(x, layouts.slabs) for x in memory]
        plgpu.barrier_arrive(refs["heads_read"])
        return small, memory, found

    def memory(at: Place, slot: Array, own: Any) -> None:
        small, memory, states = own
        exchange = Exchange(
            maps=lambda: worker.maps(at.row, at.head, slot),
            keys=lambda: states["keys"],
            memory=lambda: (memory, states["written"]),
            put=lambda read: worker.put(at.row, at.head, slot, read),
        )
        head(worker, at, refs["stage"].at[worker.group], small, exchange)

    # Before numbers are read: the kernel before stores them.
    worker.begin()
    # A GPU has one turn.
    only = place_of(worker.group) if turns == 1 else None

    def body(layer: Array, none: Array) -> Array:
        slot, following = (worker.slot(layer + n) for n in (0, 1))

        worker.product("maps", layer, slot, slot)

        def turn_of(turn: Any, none: Array) -> Array:
            own = worker.group + turn * groups
            at = (place_of(own) if only is None else only)._replace(layer=layer)

            def work() -> None:
                given = loaded(at, own)
                pl.when(worker.has(own))(lambda: memory(at, slot, given))

            # A warpgroup without a place has no head in any program.
            if places < groups:
                pl.when(worker.group < places)(work)
            else:
                work()
            return none

        if turns == 1:
            turn_of(0, none)
        else:
            jax.lax.fori_loop(0, turns, turn_of, none)
        worker.product("out", layer, slot, slot)
        worker.product("up", layer, slot, slot)
        worker.product("down", layer, slot, following)
        return none

    jax.lax.fori_loop(0, shape.layers, body, jnp.int32(0))


def decode_rows(shape: Shape, refs: Refs) -> None:
    """One warpgroup of one program; ``refs`` as in ``run``."""
    weights, states = refs["shared_room"]
    refs = {**refs, "up_room": weights, **{f"{name}_room": room for name, room in states.items()}}
    groups = decode_plan.groups(shape)
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
    groups = decode_plan.groups(shape)
    scratch: Refs = {}
    for name in PRODUCTS:
        scratch[f"{name}_room"] = plgpu.SMEM(decode_rows_plan.room(shape, name), jnp.bfloat16)
        scratch[f"{name}_come"] = plgpu.Barrier(num_barriers=len(decode_rows_plan.copies(shape, name)))
    sizes = decode_rows_plan.states(shape)
    places = {name: plgpu.SMEM(size, jnp.float32) for name, size in sizes.items()}
    scratch["shared_room"] = plgpu.RefUnion(scratch.pop("up_room"), places)
    count = decode_rows_plan.heads_of_program(shape)
    scratch["held_come"] = plgpu.Barrier(num_arrivals=2, num_barriers=count)
    scratch["memory_come"] = plgpu.Barrier(num_barriers=count)
    scratch["heads_read"] = plgpu.Barrier(num_arrivals=count)
    for place in ("sums", "added_sums"):
        scratch[place] = plgpu.SMEM((decode_rows_plan.sums_bytes(shape, place) // 4,), jnp.float32)
    scratch["stage"] = plgpu.SMEM((groups, decode_plan.stage(shape)), jnp.float32)
    # The residual stream: two columns of a row a thread; in the interpreter all of it.
    stream = ((shape.rows, shape.width), jnp.float32) if shape.interpret else ((256,), jnp.int32)
    scratch["stream"] = plgpu.SMEM(*stream)
    scratch["free"] = plgpu.Barrier(num_arrivals=groups, num_barriers=len(PRODUCTS))

    return launch(shape, decode_rows, arrays, changed, scratch)
