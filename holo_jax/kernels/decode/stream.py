"""One token of one row through all memory layers by one kernel, and no weight waits (Pallas, Mosaic GPU).

A token costs what streaming the weights costs, if nothing interrupts the stream. With a kernel for every
product something does: each starts, asks for its weights, waits for the first of them, and ends. Here one
program for every multiprocessor stays for the whole token. Its warpgroups are workers of their own: each has
a share of the rows of every product, and room in shared memory for those of a whole layer. When it has
multiplied a share it asks for the same one of the next layer, by asynchronous copies: a layer's weights
arrive while the layer before is worked out.

A layer has five parts, each of which needs all of the one before: the maps of the normed input; the memory,
one head a worker; the output map and the residual sum; the gated hidden layer of the denoiser; its output map
and the residual sum. What one part says to the next goes through device memory as words that carry their
number (``mail``), without barriers between programs. The next layer overwrites a vector without
asking: whoever does has waited, over the parts between, for something that every reader of the vector made
after it had read it; who makes nothing does not wait for words either.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.array_types import Array
from holo_jax.kernels import mosaic
from holo_jax.kernels.decode import mail as decode_mail
from holo_jax.kernels.decode import plan as decode_plan
from holo_jax.kernels.decode.mail import Rows
from holo_jax.kernels.decode.memory import Exchange, Place, head, of_head
from holo_jax.kernels.decode.plan import CHUNK, PRODUCTS
from holo_jax.kernels.decode.shape import Shape
from holo_jax.kernels.decode.worker import Refs, Worker, launch, rounded, silu, turns

# Copies on their way to a program at a time; two to sixteen were no faster.
FLIGHT = 3
_PENDING = ("phases", "keys", "written", "squares")
_MAIL = ("y", "z", "x1", "u")


def fetch(shape: Shape, refs: Refs) -> None:
    """The warpgroup that asks for weights and memories, in the order in which they are needed.

    A few copies at a time, so that they come in this order.
    """
    plgpu = mosaic.pallas()

    program = jax.lax.axis_index("program")
    # Copies: where to, from where, what says that it has come, what says that its room is free, for whom.
    items: list[Any] = []
    for name in PRODUCTS:
        first, limit = decode_plan.first(shape, name, program), decode_plan.outputs(shape, name)
        for n, (half, row, rows) in enumerate(decode_plan.copies(shape, name)):
            into = refs[f"{name}_room"].at[half, pl.ds(row, rows)]

            def source(
                layer: Array, name: str = name, at: Any = half * limit + first + row, rows: int = rows
            ) -> Any:
                return refs[name].at[layer, pl.ds(at, rows)]

            free = refs["free"].at[PRODUCTS.index(name)] if n == 0 else None
            items.append((into, source, refs[f"{name}_come"].at[n], free, None))
        for turn in range(turns(shape)) if name == "maps" else ():
            head = program + turn * shape.programs
            for n, kind in enumerate(("keys", "memory", "written")):

                def state(layer: Array, kind: str = kind, head: Array = head) -> Any:
                    return refs[kind].at[layer, 0, head]

                free = refs["head_free"] if n == 0 else None
                items.append(
                    (refs[f"{kind}_room"], state, refs["head_come"].at[3 * turn + n], free, (turn, head))
                )

    def when(own: Any, condition: Any, do: Any) -> None:
        here = None if own is None else own[1] < shape.heads
        if here is not None and condition is not None:
            here &= condition
        elif here is None:
            here = condition
        if here is None:
            do()
        else:
            pl.when(here)(do)

    def body(layer: Array, none: Array) -> Array:
        for n, (into, source, come, free, own) in enumerate(items):
            if free is not None:
                used = None if own is not None and own[0] > 0 else layer > 0
                when(own, used, partial(plgpu.barrier_wait, free))
            before = n - FLIGHT
            if before >= -len(items):
                _, _, other, _, of_other = items[before]
                when(of_other, layer > 0 if before < 0 else None, partial(plgpu.barrier_wait, other))
            when(own, None, lambda: plgpu.copy_gmem_to_smem(source(layer), into, come))  # noqa: B023
        return none

    jax.lax.fori_loop(0, shape.layers, body, jnp.int32(0))
    # What came last: nobody waits for it here any more, but every barrier is to be seen to its end.
    for n, (_, _, come, free, own) in enumerate(items):
        if n >= len(items) - FLIGHT:
            when(own, None, partial(plgpu.barrier_wait, come))
        if free is not None and (own is None or own[0] == 0):
            when(own, None, partial(plgpu.barrier_wait, free))


def compute(shape: Shape, refs: Refs) -> None:
    """A warpgroup that computes: its walk through the layers."""
    worker = Worker(shape, refs)
    interpret, threads = shape.interpret, worker.layouts.threads
    base = first_number(shape.layers, worker.numbers.launch)

    def norm(name: str, layer: Array) -> list[Array]:
        return worker.pieces(refs[name].at[layer], shape.width)

    def body(layer: Array, scale: list[Array]) -> list[Array]:
        number, following = (base + layer) & 0xFFFF, (base + layer + 1) & 0xFFFF

        def maps(found: Array, _: Any) -> Array:
            return found

        def hidden(found: Array, _: Any) -> Array:
            return rounded(found)

        def added(found: Array, before: Array) -> Array:
            return rounded(before + rounded(found))

        def put_maps(values: list[Array], rows: Rows) -> None:
            per = worker.plan.per_head
            decode_mail.put_pairs(refs["y"], values[0], rows, number, threads, per, interpret=interpret)

        def put(target: str, number: Array) -> Any:
            def to(values: list[Array], rows: Rows) -> None:
                decode_mail.put(refs[target], values[0], rows, number, threads, interpret=interpret)

            return to

        def put_gated(values: list[Array], rows: Rows) -> None:
            up, gate = values
            put("u", number)([rounded(silu(gate) * up)], rows)

        def place(turn: int) -> Place:
            return Place(layer, 0, worker.program + turn * shape.programs, worker.numbers)

        def small() -> list[Any]:
            # Of the last head where there is none of this number.
            own = [place(turn) for turn in range(turns(shape))]
            return [of_head(worker, at._replace(head=jnp.minimum(at.head, shape.heads - 1))) for at in own]

        def memory(turn: int, own: Any) -> None:
            at = place(turn)
            head(worker, at, refs["stage"], own, exchanged(worker, at, turn, number))

        loaded = worker.product("maps", "x", number, maps, put_maps, scale=scale, beside=small)
        for turn, own in enumerate(loaded):
            here = (worker.program + turn * shape.programs < shape.heads) & (worker.group == 0)
            pl.when(here)(partial(memory, turn, own))

        def put_stream(values: list[Array], rows: Rows) -> None:
            last = layer == shape.layers - 1
            pl.when(~last)(lambda: put("x", following)(values, rows))
            pl.when(last & (worker.numbers.active != 0))(
                lambda: decode_mail.put_plain(refs["hidden"], values[0], rows, threads, interpret=interpret)
            )

        to = put("x1", number)
        scale = worker.product("out", "z", number, added, to, beside=lambda: norm("mlp_norm", layer))
        worker.product("up", "x1", number, hidden, put_gated, scale=scale)
        after = jnp.minimum(layer + 1, shape.layers - 1)
        return worker.product(
            "down", "u", number, added, put_stream, beside=lambda: norm("mixer_norm", after)
        )

    jax.lax.fori_loop(0, shape.layers, body, norm("mixer_norm", jnp.int32(0)))


def exchanged(worker: Worker, at: Place, turn: int, number: Array) -> Exchange:
    """Of a head, by words and copies."""
    plgpu = mosaic.pallas()

    refs, layouts, interpret = worker.refs, worker.layouts, worker.interpret

    def keys() -> Array:
        for n in range(3):
            plgpu.barrier_wait(refs["head_come"].at[3 * turn + n])
        return worker.load(refs["keys_room"], layouts.lines)

    def memory() -> tuple[Array, Array]:
        found, bound = (worker.load(refs[f"{name}_room"], layouts.slabs) for name in ("memory", "written"))
        plgpu.barrier_arrive(refs["head_free"])
        return found, bound

    def put(read: Array) -> None:
        first = at.head * worker.shape.d
        rows = Rows(first, first, first + worker.shape.d)
        decode_mail.put(refs["z"], read, rows, number, layouts.lines.reduce(0), interpret=interpret)

    def maps() -> Array:
        return decode_mail.take_pairs(
            refs["y"].at[at.head], worker.plan.per_head, number, interpret=interpret
        )

    return Exchange(maps, keys, memory, put)


def decode_stream(shape: Shape, refs: Refs) -> None:
    """One warpgroup of one program; ``refs`` as in ``run``."""
    groups = decode_plan.plan(shape).groups
    pl.when(jax.lax.axis_index("group") == groups)(partial(fetch, shape, refs))
    pl.when(jax.lax.axis_index("group") < groups)(partial(compute, shape, refs))


def first_number(layers: int, launch: Array) -> Array:
    """Number of the words that enter the first layer of a launch; each layer adds one."""
    return (launch * (layers + 1) + 1) & 0xFFFF


def mail(shape: Shape) -> dict[str, Array]:
    """What ``run`` calls ``mail``, before the first launch."""
    sizes = {"y": (shape.heads, decode_mail.PAIR_WORDS), "z": (shape.values,)}
    sizes |= {"x1": (shape.width,), "u": (shape.hidden,)}
    return {name: jnp.zeros(size, jnp.int32) for name, size in sizes.items()}


def run(shape: Shape, arrays: dict[str, Array]) -> dict[str, Array]:
    """One token through all layers.

    Args:
      shape: see ``Shape``; ``decode_plan.unsupported`` says which.
      arrays: by name. Stacked over layers ``maps`` in the order of ``decode_plan.rows_by_head``, ``out``,
        ``up`` (up and gate), ``down`` in bfloat16, ``[out, in]``; float32 ``mixer_norm``, ``mlp_norm``,
        ``head_norm``, ``read_taps``, ``write_taps``, ``write_bias``, ``erase_bias``; the memory ``memory``,
        ``writes`` and what is pending: ``phases``, ``keys``, ``written``, ``squares``. ``numbers``: int32
        ``[n, 1]``, begins with ``decode_worker.Numbers``. ``x``: the residual stream ``[1, width]`` in
        bfloat16, or its words with ``first_number`` (``mail``); ``hidden``: the same in bfloat16 after
        the last layer, of the last token that was read. ``mail``'s arrays from the launch before.

    Returns:
      ``hidden``, what is pending, and ``mail``'s arrays, after the token.
    """
    plgpu = mosaic.pallas()

    arrays = {**arrays, "x": arrays["x"][0]}
    if arrays["x"].dtype != jnp.int32:
        arrays["x"] = decode_mail.numbered(arrays["x"], first_number(shape.layers, arrays["numbers"][3, 0]))
    arrays["hidden"] = arrays["hidden"][0]
    for name in PRODUCTS:
        layers, outputs, depth = arrays[name].shape
        arrays[name] = arrays[name].reshape(layers, outputs, depth // CHUNK, CHUNK)
    changed = ("x", "hidden", *_MAIL, *_PENDING)
    groups = decode_plan.plan(shape).groups
    scratch: Refs = {}
    for name in PRODUCTS:
        scratch[f"{name}_room"] = plgpu.SMEM(decode_plan.room(shape, name), jnp.bfloat16)
        scratch[f"{name}_come"] = plgpu.Barrier(num_barriers=len(decode_plan.copies(shape, name)))
    for name in ("memory", "keys", "written"):
        scratch[f"{name}_room"] = plgpu.SMEM(arrays[name].shape[3:], jnp.float32)
    scratch["narrow"] = plgpu.SMEM((shape.width,), jnp.bfloat16)
    scratch["wide"] = plgpu.SMEM((max(shape.values, shape.hidden),), jnp.bfloat16)
    scratch["share"] = plgpu.SMEM((2, decode_plan.share(shape)), jnp.float32)
    scratch["stage"] = plgpu.SMEM((decode_plan.stage(shape),), jnp.float32)
    scratch["head_come"] = plgpu.Barrier(num_barriers=3 * turns(shape))
    scratch["head_free"] = plgpu.Barrier()
    scratch["free"] = plgpu.Barrier(num_arrivals=groups, num_barriers=len(PRODUCTS))

    found = launch(shape, decode_stream, arrays, changed, scratch)
    return {**found, "hidden": found["hidden"][None]}
