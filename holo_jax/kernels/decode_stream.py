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
number (``decode_mail``), without barriers between programs. The next layer overwrites a vector without
asking: whoever does has waited, over the parts between, for something that every reader of the vector made
after it had read it.

The norm costs no pass of its own, as in ``decode_products``. A warp multiplies whole rows, so sums stay
inside it.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.array_types import Array
from holo_jax.kernels import decode_mail, decode_plan, mosaic
from holo_jax.kernels.decode_plan import CHUNK, PRODUCTS
from holo_jax.kernels.decode_shape import Shape
from holo_jax.kernels.phasor_features import sin_cos_reduced

Refs = dict[str, Any]
_EPS = 1e-6
# Copies on their way to a program at a time; two to sixteen were no faster.
FLIGHT = 3
_TILE = 4  # rows of a weight at a time, one a warp
_PENDING = ("phases", "keys", "written", "squares")
_MAIL = ("y", "z", "x1", "u")


class Layouts(NamedTuple):
    """Where a warpgroup's registers hold what.

    Attributes:
      rows: ``[4 n, 256]``, a row in one warp.
      lines: ``[4 n, 64]``, a row in one warp.
      slabs: ``[4 n, 64]``, a column in one warp.
      lanes: ``[32]``, the same in every warp.
    """

    rows: Any
    lines: Any
    slabs: Any
    lanes: Any


def layouts() -> Layouts:
    """Of this kernel."""
    plgpu = mosaic.pallas()

    def tiled(tiles: Any, warps: Any, lanes: Any) -> Any:
        return plgpu.Layout.TILED(plgpu.Tiling(tiles), warp_dims=warps, lane_dims=lanes, vector_dim=-1)

    return Layouts(
        rows=tiled(((_TILE, CHUNK), (8,)), (-3,), (-2,)),
        lines=tiled(((4, 64), (2,)), (-3,), (-2,)),
        slabs=tiled(((4, 64), (4, 16), (2,)), (-4,), (-3, -2)),
        lanes=tiled(((32,), (1,)), (plgpu.Replicated(4),), (-2,)),
    )


class Worker:
    """One warpgroup that computes: loads, waits and products of its program's share."""

    def __init__(self, shape: Shape, refs: Refs) -> None:
        self.shape, self.refs, self.interpret = shape, refs, shape.interpret
        self.plan, self.layouts = decode_plan.plan(shape), layouts()
        self.group, self.program = jax.lax.axis_index("group"), jax.lax.axis_index("program")

    def load(self, ref: Any, layout: Any) -> Array:
        """A block in a layout."""
        plgpu = mosaic.pallas()

        return ref[...] if self.interpret else plgpu.load(ref, layout=layout, optimized=False)

    def spread(self, x: Array, shape: tuple[int, int], axis: int, layout: Any) -> Array:
        """A vector along one axis of a block, the same along the other."""
        plgpu = mosaic.pallas()

        wide = jax.lax.broadcast_in_dim(x, shape, (axis,))
        return wide if self.interpret else plgpu.layout_cast(wide, layout)

    def meet(self, groups: int = 1) -> None:
        """Waits for the other warps of this group, or of all that compute, and what they stored."""
        plgpu = mosaic.pallas()

        if self.interpret:
            return

        @plgpu.inline_mgpu()
        def barrier(context: Any) -> None:

            if groups == 1:
                mosaic.utils().warpgroup_barrier()
            else:
                mosaic.utils().inline_ptx(f"bar.sync 15, {128 * groups};", has_side_effects=True)

        barrier()

    def slots(self, shape: tuple[int, int], layout: Any) -> Array:
        """Numbers of rows, in a layout."""
        plgpu = mosaic.pallas()

        if self.interpret:
            return jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)

    def pieces(self, ref: Any, depth: int) -> list[Array]:
        """A vector in float32, the same in every warp."""
        rows = self.layouts.rows.reduce(0)
        found = [self.load(ref.at[pl.ds(n, CHUNK)], rows) for n in range(0, depth, CHUNK)]
        return [x.astype(jnp.float32) for x in found]

    def product(
        self,
        name: str,
        source: str,
        number: Array,
        finish: Any,
        *,
        scale: list[Array] | None = None,
        beside: Any = lambda: None,
    ) -> Any:
        """Waits for a vector, multiplies this group's rows by it, and gives their room back.

        Args:
          name: of the product.
          source: the vector.
          number: of the vector's words.
          finish: gets the float32 sums of four rows (of ``up`` those of the gate too), the same rows of the
            residual stream for ``out`` and ``down``, the first row and the end of the share.
          scale: the weight of the norm of the vector, if it is normed.
          beside: loads to begin once the vector has come, for later.

        Returns:
          What ``beside`` does.
        """
        plgpu = mosaic.pallas()

        shape, refs, plan = self.shape, self.refs, self.plan
        rows, interpret = self.layouts.rows, self.interpret
        own = getattr(plan, name)
        depth, halves = decode_plan.depth(shape, name), 2 if name == "up" else 1
        tile = own if interpret else _TILE
        tiles = pl.cdiv(pl.cdiv(own, tile), plan.groups)
        # The last group begins early, so that it ends with the share; what is made twice is stored twice.
        start = jnp.minimum(self.group * tiles * tile, max(own - tiles * tile, 0))
        first = decode_plan.first(shape, name, self.program)
        end = first + own
        # The stream is where the maps, or the gated layer, had it.
        added = name in ("out", "down")
        old = [
            self.load(refs["narrow"].at[pl.ds(first + start + n * tile, tile)], rows.reduce(1))
            for n in range(tiles if added else 0)
        ]
        stage = refs["narrow" if name in ("maps", "up") else "wide"]
        part = pl.cdiv(depth // CHUNK, plan.groups) * CHUNK
        at = jnp.minimum(self.group * part, depth - part)
        x = decode_mail.take(refs[source].at[pl.ds(at, part)], part, number, interpret=interpret)
        stage[pl.ds(at, part)] = x.astype(jnp.bfloat16)
        later = beside()
        self.meet(plan.groups)
        for n in range(len(decode_plan.copies(shape, name))):
            plgpu.barrier_wait(refs[f"{name}_come"].at[n])
        sums: list[list[Any]] = [[None] * halves for _ in range(tiles)]
        squares: Any = None
        for chunk, x in enumerate(self.pieces(stage, depth)):
            if scale is not None:
                squares = plus(squares, x * x)
                x = x * scale[chunk]
            wide = self.spread(x, (tile, CHUNK), 1, rows)
            for n, total in enumerate(sums):
                for half in range(halves):
                    room = refs[f"{name}_room"].at[half, pl.ds(start + n * tile, tile), chunk]
                    weights = self.load(room, rows).astype(jnp.float32)
                    total[half] = plus(total[half], weights * wide)
        inverse: Any = None
        if scale is not None:
            inverse = jax.lax.rsqrt(jnp.sum(squares, axis=0) * (1.0 / depth) + shape.eps)
        plgpu.barrier_arrive(refs["free"].at[PRODUCTS.index(name)])
        for n, total in enumerate(sums):
            found = [jnp.sum(y, axis=1) for y in total]
            if inverse is not None:
                found = [y * inverse for y in found]
            finish(found, old[n].astype(jnp.float32) if added else None, first + start + n * tile, end)
        return later


def plus(total: Array | None, x: Array) -> Array:
    """A sum that may not have begun."""
    return x if total is None else total + x


def rounded(x: Array) -> Array:
    """Float32 that bfloat16 can hold."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def silu(x: Array) -> Array:
    """``x * sigmoid(x)``."""
    return x / (1.0 + jnp.exp(-x))


def turns(shape: Shape) -> int:
    """Heads that a program works out."""
    return pl.cdiv(shape.heads, shape.programs)


def of_head(worker: Worker, layer: Array, head: Array) -> Any:
    """Begins the small loads of the memory of a head; of the last one if there is none of this number."""
    shape, refs, lanes = worker.shape, worker.refs, worker.layouts.lanes
    head = jnp.minimum(head, shape.heads - 1)
    own = pl.ds(head * shape.m, shape.m)
    before = shape.taps - 1
    phases = [
        worker.load(refs["phases"].at[layer, 0, refs["index"][0] + tap, own], lanes) for tap in range(before)
    ]
    weights = [
        [worker.load(refs[name].at[layer, tap, own], lanes) for tap in range(shape.taps)]
        for name in ("write_taps", "read_taps")
    ]
    norm: Any = None
    if shape.head_norm:
        norm = worker.load(refs["head_norm"].at[layer, head], worker.layouts.lines.reduce(0))
    biases = {name: refs[f"{name}_bias"][layer, head] for name in ("write", "erase") if getattr(shape, name)}
    return phases, weights, norm, biases


def head(worker: Worker, layer: Array, turn: int, number: Array, loaded: Any) -> None:
    """The memory of one head: read, hold the write back, normalise, gate.

    What ``decode_heads`` does in one program, with sums over phasors where they stay in a warp.
    """
    plgpu = mosaic.pallas()

    shape, refs, stage = worker.shape, worker.refs, worker.refs["stage"]
    load, spread, interpret = worker.load, worker.spread, worker.interpret
    m, d, size, taps = shape.m, shape.d, shape.size, shape.taps
    _, lines, slabs, lanes = worker.layouts
    line, channel = lines.reduce(0), slabs.reduce(0)
    head = worker.program + turn * shape.programs
    index, own = refs["index"][0], pl.ds(head * m, m)
    phases, weights, norm, biases = loaded
    total: Any = 0.0
    if shape.scale == "sqrt_writes":
        total = refs["writes"][layer, 0, head]
        for slot in range(size):
            total += jnp.where(slot < index, refs["squares"][layer, 0, head, slot], 0.0)

    def filled(name: str, width: int, layout: Any) -> Array:
        """What is pending, zero in slots without a write."""
        x = load(refs[f"{name}_room"], layout)
        return jnp.where(worker.slots((size, width), layout) < index, x, 0.0)

    # Places in shared memory: the maps, two keys, what is read, two scores.
    of_keys = [pl.ds(256 + 2 * m * n, 2 * m) for n in range(2)]
    of_read = pl.ds(256 + 4 * m, d)
    of_scores = [pl.ds(256 + 4 * m + d + size * n, size) for n in range(2)]
    stage[pl.ds(0, decode_mail.PAIR_WORDS // 2)] = decode_mail.take_pairs(
        refs["y"].at[head], worker.plan.per_head, number, interpret=interpret
    )
    worker.meet()
    raw = shape.phase_scale * load(stage.at[pl.ds(d, m)], lanes)
    refs["phases"].at[layer, 0, index + (taps - 1), own][...] = raw
    for place, kernel in zip(of_keys, weights, strict=True):
        angle: Any = sum(weight * phase for weight, phase in zip(kernel, [*phases, raw], strict=True))
        sine, cosine = sin_cos_reduced(angle, jnp.round(angle * (0.5 / math.pi)))
        stage[pl.ds(place.start, m)] = cosine * m**-0.5
        stage[pl.ds(place.start + m, m)] = sine * m**-0.5
    worker.meet()
    write, read_key = (load(stage.at[place], line) for place in of_keys)
    for n in range(3):
        plgpu.barrier_wait(refs["head_come"].at[3 * turn + n])
    keys = filled("keys", 2 * m, lines)
    refs["keys"].at[layer, 0, head, index][...] = write
    for place, key in zip(of_scores, (write, read_key), strict=True):
        stage[place] = jnp.sum(keys * spread(key, (size, 2 * m), 1, lines), axis=1)
    worker.meet()
    memory, bound = load(refs["memory_room"], slabs), filled("written", d, slabs)
    plgpu.barrier_arrive(refs["head_free"])
    before = []
    for of_key, of_score in zip(of_keys, of_scores, strict=True):
        key = spread(load(stage.at[of_key], slabs.reduce(1)), (2 * m, d), 0, slabs)
        score = spread(load(stage.at[of_score], slabs.reduce(1)), (size, d), 0, slabs)
        before.append(jnp.sum(memory * key, axis=0) + jnp.sum(bound * score, axis=0))

    def gate(name: str, at: int) -> Array:
        return 1.0 / (1.0 + jnp.exp(-(stage[at] + biases[name])))

    of_gates = d + m + d * shape.gate
    opened = refs["active"][0]
    if shape.write:
        opened = opened * gate("write", of_gates)
    written = opened * rounded(load(stage.at[pl.ds(0, d)], channel))
    if shape.erase:
        written -= opened * gate("erase", of_gates + shape.write) * before[0]
    refs["written"].at[layer, 0, head, index][...] = written
    refs["squares"][layer, 0, head, index] = opened * opened
    read = before[1] + jnp.sum(write * read_key, axis=0) * written
    if shape.scale == "sqrt_time":
        read = read * jax.lax.rsqrt(refs["position"][0] + 1.0)
    elif shape.scale == "sqrt_writes":
        read = read * jax.lax.rsqrt(total + opened * opened + _EPS)
    stage[of_read] = read
    worker.meet()
    read = load(stage.at[of_read], line)
    if shape.head_norm:
        mean = jnp.sum(read * read, axis=0) * (1.0 / d)
        read = read * jax.lax.rsqrt(mean + shape.eps) * norm
    if shape.gate:
        read = rounded(read) * silu(rounded(load(stage.at[pl.ds(d + m, d)], line)))
    first = head * d
    decode_mail.put(refs["z"], rounded(read), first, first + d, number, line, interpret=interpret)


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
    interpret, one = shape.interpret, worker.layouts.rows.reduce(1)
    base = first_number(shape, refs["launch"][0])

    def norm(name: str, layer: Array) -> list[Array]:
        return worker.pieces(refs[name].at[layer], shape.width)

    def body(layer: Array, scale: list[Array]) -> list[Array]:
        number, following = (base + layer) & 0xFFFF, (base + layer + 1) & 0xFFFF

        def maps(found: list[Array], _: Any, first: Array, end: Array) -> None:
            per = worker.plan.per_head
            decode_mail.put_pairs(refs["y"], found[0], first, end, number, one, per, interpret=interpret)

        def gated(found: list[Array], _: Any, first: Array, end: Array) -> None:
            up, gate = (rounded(y) for y in found)
            decode_mail.put(refs["u"], rounded(silu(gate) * up), first, end, number, one, interpret=interpret)

        def added(target: str, number: Array) -> Any:
            def finish(found: list[Array], before: Array, first: Array, end: Array) -> None:
                total = rounded(before + rounded(found[0]))
                decode_mail.put(refs[target], total, first, end, number, one, interpret=interpret)

            return finish

        def small() -> list[Any]:
            return [of_head(worker, layer, worker.program + n * shape.programs) for n in range(turns(shape))]

        loaded = worker.product("maps", "x", number, maps, scale=scale, beside=small)
        for turn, own in enumerate(loaded):
            here = (worker.program + turn * shape.programs < shape.heads) & (worker.group == 0)
            pl.when(here)(partial(head, worker, layer, turn, number, own))
        scale = worker.product(
            "out", "z", number, added("x1", number), beside=lambda: norm("mlp_norm", layer)
        )
        worker.product("up", "x1", number, gated, scale=scale)
        after = jnp.minimum(layer + 1, shape.layers - 1)
        return worker.product(
            "down",
            "u",
            number,
            added("x", following),
            beside=lambda: norm("mixer_norm", after),
        )

    jax.lax.fori_loop(0, shape.layers, body, norm("mixer_norm", jnp.int32(0)))


def decode_stream(shape: Shape, refs: Refs) -> None:
    """One warpgroup of one program; ``refs`` as in ``run``."""
    groups = decode_plan.plan(shape).groups
    pl.when(jax.lax.axis_index("group") == groups)(partial(fetch, shape, refs))
    pl.when(jax.lax.axis_index("group") < groups)(partial(compute, shape, refs))


def first_number(shape: Shape, launch: Array) -> Array:
    """Number of the words that enter the first layer of a launch; each layer adds one."""
    return (launch * (shape.layers + 1) + 1) & 0xFFFF


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
        ``writes`` and what is pending: ``phases``, ``keys``, ``written``, ``squares``. ``index``: pending
        writes ``[1]``; ``active``: 1.0 or 0.0 ``[1]``; ``position`` in float32 ``[1]``. ``x``: the residual
        stream ``[1, width]`` in bfloat16. ``mail``'s arrays from the launch before, and ``launch`` ``[1]``,
        how many have been.

    Returns:
      ``x``, what is pending, and ``mail``'s arrays, after the token.
    """
    plgpu = mosaic.pallas()

    arrays = {**arrays, "x": decode_mail.numbered(arrays["x"][0], first_number(shape, arrays["launch"][0]))}
    for name in PRODUCTS:
        layers, outputs, depth = arrays[name].shape
        arrays[name] = arrays[name].reshape(layers, outputs, depth // CHUNK, CHUNK)
    changed = ("x", *_MAIL, *_PENDING)
    fixed = {name: array for name, array in arrays.items() if name not in changed}
    states = {name: jax.new_ref(arrays[name]) for name in changed}
    groups = decode_plan.plan(shape).groups
    scratch: Refs = {}
    for name in PRODUCTS:
        scratch[f"{name}_room"] = plgpu.SMEM(decode_plan.room(shape, name), jnp.bfloat16)
        scratch[f"{name}_come"] = plgpu.Barrier(num_barriers=len(decode_plan.copies(shape, name)))
    for name in ("memory", "keys", "written"):
        scratch[f"{name}_room"] = plgpu.SMEM(arrays[name].shape[3:], jnp.float32)
    scratch["narrow"] = plgpu.SMEM((shape.width,), jnp.bfloat16)
    scratch["wide"] = plgpu.SMEM((max(shape.values, shape.hidden),), jnp.bfloat16)
    scratch["stage"] = plgpu.SMEM((decode_plan.stage(shape),), jnp.float32)
    scratch["head_come"] = plgpu.Barrier(num_barriers=3 * turns(shape))
    scratch["head_free"] = plgpu.Barrier()
    scratch["free"] = plgpu.Barrier(num_arrivals=groups, num_barriers=len(PRODUCTS))

    def body(*given: Any, **room: Any) -> None:
        decode_stream(shape, {**dict(zip([*fixed, *states], given, strict=True)), **room})

    plgpu.kernel(
        body,
        scratch_types=scratch,
        grid=(shape.programs,),
        grid_names=("program",),
        num_threads=groups + 1,
        thread_name="group",
        kernel_name="decode_stream",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=plgpu.InterpretGPUParams() if shape.interpret else False,
    )(*fixed.values(), *states.values())
    found = {name: jax.freeze(ref) for name, ref in states.items()}
    return {**found, "x": decode_mail.data(found["x"])[None]}
