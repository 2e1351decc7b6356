"""One token by kernels: through all memory layers at once, or through one layer's memory (Pallas, Triton).

Both do what ``generate.pending`` defines: writes of a group are held back, and a memory is only read.

``run_heads`` is one layer's memory, for any number of rows: a program is one head of one row.

``run`` is all layers, for a few rows. A token then costs what streaming the weights costs, plus what starts
and ends of kernels cost; at five small kernels a layer the latter is more. Here as many programs as the
device has multiprocessors stay resident and walk the layers together. A layer has five parts, each of which
needs all of the one before:

* maps of the normalised input: values, phases, gates;
* the memory: each head reads its memory and the writes that are pending, and adds its own to those;
* the output map and the residual sum;
* the gated hidden layer of the denoiser;
* its output map and the residual sum.

Between parts the programs meet at a counter in device memory. Before a program waits there it has asked for
its weights of the next part, which do not depend on the others: they arrive while it waits.

A program that waits in vain gives up after a bounded number of polls, and the result is NaN.

Weights are ``[out, in]`` and stacked over layers; each program takes rows of them, eight at a time. A warp
holds whole rows, so sums stay inside warps.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array
from holo_jax.kernels.decode_shape import DEPTH, ROWS, Shape, parts
from holo_jax.kernels.phasor_features import sin_cos_reduced

Refs = dict[str, Any]
WARPS = 8
HEAD_WARPS = 4
_PARTS = 5
_EPS = 1e-6
# Polls before a program gives up; the others are then not there at all, and the result is made NaN.
_PATIENCE = 1 << 15


def _rows(first: Any) -> Array:
    return first + jax.lax.iota(jnp.int32, ROWS)


def _grid(rows: Array, chunk: int) -> tuple[Array, Array]:
    columns = chunk * DEPTH + jax.lax.iota(jnp.int32, DEPTH)
    shape = (ROWS, DEPTH)
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None, :], shape)


class _Walk:
    """One program: where it is, and the loads, sums and meetings of all parts."""

    def __init__(self, shape: Shape, refs: Refs) -> None:
        self.shape, self.refs = shape, refs
        self.program = pl.program_id(0)
        self.parts = parts(shape)
        # Indices are arrays throughout: the interpreter takes no plain numbers beside them.
        self.zero = self.program * 0

    def first(self, tile: int) -> Array:
        """First row of a tile of this program."""
        return (self.program + tile * self.shape.programs) * ROWS

    def fetch(self, name: str, layer: Array, wanted: Array | None = None) -> list[Array]:
        """The weights of this program in a part, in storage dtype; zero where there are none."""
        part, ref, found = self.parts[name], self.refs[name], []
        for tile in range(part.tiles(self.shape.programs)):
            rows = _rows(self.first(tile))
            for half in range(part.halves):
                for chunk in range(part.chunks):
                    where, columns = _grid(rows, chunk)
                    mask = where < part.outputs
                    if part.depth % DEPTH:
                        mask &= columns < part.depth
                    if wanted is not None:
                        mask &= wanted
                    view = ref.at[layer, where + half * part.outputs, columns]
                    found.append(plgpu.load(view, mask=mask, other=0.0))
        return found

    def vector(self, ref: Any, row: int, depth: int, layer: Array | None = None) -> list[Array]:
        """A vector in float32, in pieces that are the same in every row of a tile.

        What other programs wrote is read past the first cache (``layer`` None).
        """
        pieces = []
        for chunk in range(pl.cdiv(depth, DEPTH)):
            _, columns = _grid(_rows(0), chunk)
            mask = columns < depth if depth % DEPTH else None
            other = None if mask is None else 0.0
            if layer is None:
                piece = plgpu.load(ref.at[row + self.zero, columns], mask=mask, other=other, volatile=True)
            else:
                piece = plgpu.load(ref.at[layer, columns], mask=mask, other=other)
            pieces.append(piece.astype(jnp.float32))
        return pieces

    def normalised(self, ref: Any, row: int, weights: list[Array]) -> list[Array]:
        """RMSNorm of a residual row, rounded to the storage dtype."""
        shape = self.shape
        x = self.vector(ref, row, shape.width)
        squares = sum(piece * piece for piece in x)
        inverse = jax.lax.rsqrt(jnp.sum(squares, axis=1) * (1.0 / shape.width) + shape.eps)[:, None]
        dtype = ref.dtype
        return [(p * inverse * w).astype(dtype).astype(jnp.float32) for p, w in zip(x, weights, strict=True)]

    def sums(self, name: str, weights: list[Array], inputs: list[list[Array]]) -> Any:
        """Yields tile, half, row of the batch and the float32 sums ``[ROWS]`` of a part."""
        part = self.parts[name]
        taken = iter(weights)
        for tile in range(part.tiles(self.shape.programs)):
            found = []
            for _ in range(part.halves):
                own = [next(taken).astype(jnp.float32) for _ in range(part.chunks)]
                found.append(
                    [jnp.sum(sum(w * p for w, p in zip(own, x, strict=True)), axis=1) for x in inputs]
                )
            rows = _rows(self.first(tile))
            yield rows, rows < part.outputs, list(zip(*found, strict=True))

    def arrive(self) -> None:
        """Says that what this program wrote can be read."""
        if self.shape.programs > 1:
            plgpu.debug_barrier()
            plgpu.atomic_add(self.refs["counter"], (self.zero,), 1)

    def wait(self, number: Array, good: Array) -> Array:
        """Waits until all programs have arrived ``number`` times; whether they have, this time and before."""
        shape = self.shape
        if shape.programs == 1:
            return good
        target = number * shape.programs

        def waiting(carry: tuple[Array, Array]) -> Array:
            return (carry[1] - target < 0) & (carry[0] < _PATIENCE)

        def poll(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            return carry[0] + 1, plgpu.load(self.refs["counter"].at[self.zero], volatile=True)

        start = (jnp.int32(0), jnp.where(good == 1, target - 1, target))
        _, seen = jax.lax.while_loop(waiting, poll, start)
        plgpu.debug_barrier()
        return jnp.where(seen - target < 0, 0, good)

    def head(self, layer: Array, row: Array, head: Array) -> None:
        """The memory of one head of one row: read, hold the write back, normalise, gate."""
        shape, refs, zero = self.shape, self.refs, self.zero
        m, d, taps, storage = shape.m, shape.d, shape.taps, refs["z"].dtype
        phasors, channels = jax.lax.iota(jnp.int32, m), jax.lax.iota(jnp.int32, d)
        slots = jax.lax.iota(jnp.int32, shape.size)
        columns = head * m + phasors

        def block(rows: Array, width: int) -> tuple[Array, Array]:
            columns = jax.lax.iota(jnp.int32, width)
            size = (rows.shape[0], width)
            return jnp.broadcast_to(rows[:, None], size), jnp.broadcast_to(columns[None, :], size)

        def map_of(name: str, column: Array) -> Array:
            # Other programs write the maps of a layer only where several walk together.
            return plgpu.load(refs["y"].at[row, shape.offsets[name] + column], volatile=shape.programs > 1)

        # All loads stand before the first use of one: a program waits once. The memory is most of the bytes.
        memory, held = [], []
        for plane in (0, 1):
            at, across = block(plane * m + phasors, d)
            memory.append(plgpu.load(refs["memory"].at[layer, row, head, at, across]))
        vectors = {"phases": map_of("phases", columns)}
        for name in ("values", "gate") if shape.gate else ("values",):
            vectors[name] = map_of(name, head * d + channels)
        gates = {}
        for name, present in (("write", shape.write), ("erase", shape.erase)):
            if present:
                gates[name] = (map_of(name, head), plgpu.load(refs[f"{name}_bias"].at[layer, head]))
        weights = [
            [plgpu.load(refs[name].at[layer, tap + zero, columns]) for tap in range(taps)]
            for name in ("write_taps", "read_taps")
        ]
        active = plgpu.load(refs["active"].at[row])
        norm: Any = plgpu.load(refs["head_norm"].at[layer, head, channels]) if shape.head_norm else None
        position: Any = plgpu.load(refs["position"].at[row]) if shape.scale == "sqrt_time" else None
        index = plgpu.load(refs["index"].at[zero])
        phases = [plgpu.load(refs["phases"].at[layer, row, index + tap, columns]) for tap in range(taps - 1)]
        # What this group has not yet written is the last one's, and no byte of it is moved.
        for plane in (0, 1):
            at, across = block(slots, m)
            view = refs["keys"].at[layer, row, head, at, plane * m + across]
            held.append(plgpu.load(view, mask=at < index, other=0.0))
        at, across = block(slots, d)
        bound = plgpu.load(refs["written"].at[layer, row, head, at, across], mask=at < index, other=0.0)
        if shape.scale == "sqrt_writes":
            view = refs["squares"].at[layer, row, head, slots]
            squares = plgpu.load(view, mask=slots < index, other=0.0)
            writes = plgpu.load(refs["writes"].at[layer, row, head])

        def stored(name: str) -> Array:
            return vectors[name].astype(storage).astype(jnp.float32)

        def gate(name: str) -> Array:
            x, bias = gates[name]
            return jax.nn.sigmoid(x + bias)

        raw = shape.phase_scale * vectors["phases"]
        phases.append(raw)
        keys = []
        for own in weights:
            angle: Any = sum(weight * phase for weight, phase in zip(own, phases, strict=True))
            sine, cosine = sin_cos_reduced(angle, jnp.floor(angle * (0.5 / jnp.pi) + 0.5))
            keys.append((cosine * m**-0.5, sine * m**-0.5))
        before = []
        for key in keys:
            terms = [part[:, None] * plane for part, plane in zip(key, memory, strict=True)]
            scores = [part[None, :] * plane for part, plane in zip(key, held, strict=True)]
            score = jnp.sum(scores[0] + scores[1], axis=1)
            before.append(jnp.sum(terms[0] + terms[1], axis=0) + jnp.sum(score[:, None] * bound, axis=0))

        opened = active * gate("write") if shape.write else active
        written = opened * stored("values")
        if shape.erase:
            written -= opened * gate("erase") * before[0]
        overlap = jnp.sum(sum(a * b for a, b in zip(*keys, strict=True)), axis=0)
        read = before[1] + overlap * written
        plgpu.store(refs["phases"].at[layer, row, index + (taps - 1), columns], raw)
        plgpu.store(refs["written"].at[layer, row, head, index, channels], written)
        for plane in (0, 1):
            plgpu.store(refs["keys"].at[layer, row, head, index, plane * m + phasors], keys[0][plane])
        plgpu.store(refs["squares"].at[layer, row, head, index], opened * opened)
        if shape.scale == "sqrt_time":
            read *= jax.lax.rsqrt(position + 1.0)
        elif shape.scale == "sqrt_writes":
            total = jnp.sum(squares, axis=0) + opened * opened
            read *= jax.lax.rsqrt(writes + total + _EPS)
        if shape.head_norm:
            mean = jnp.sum(read * read, axis=0) * (1.0 / d)
            read = read * jax.lax.rsqrt(mean + shape.eps) * norm
        if shape.gate:
            opening = stored("gate")
            read = read.astype(storage).astype(jnp.float32) * (opening * jax.nn.sigmoid(opening))
        plgpu.store(refs["z"].at[row, head * d + channels], read.astype(storage))


def decode_stack(shape: Shape, refs: Refs) -> None:
    """One program's walk through the layers; ``refs`` as in ``run``."""
    walk = _Walk(shape, refs)
    rows = range(shape.rows)
    launch = plgpu.load(refs["launch"].at[walk.zero])
    storage = refs["x"].dtype
    heads = shape.rows * shape.heads

    def project(name: str, inputs: list[list[Array]], weights: list[Array], layer: Array) -> None:
        if name == "maps":
            for where, mask, found in walk.sums(name, weights, inputs):
                for row, (y,) in enumerate(found):
                    plgpu.store(refs["y"].at[row + walk.zero, where], y, mask=mask)
        elif name == "up":
            for where, mask, found in walk.sums(name, weights, inputs):
                for row, halves in enumerate(found):
                    up, gate = (half.astype(storage).astype(jnp.float32) for half in halves)
                    hidden = gate * jax.nn.sigmoid(gate) * up
                    plgpu.store(refs["u"].at[row + walk.zero, where], hidden.astype(storage), mask=mask)
        else:
            source, target = ("x", "x1") if name == "out" else ("x1", "x")
            for where, mask, found in walk.sums(name, weights, inputs):
                for row, (y,) in enumerate(found):
                    old = plgpu.load(
                        refs[source].at[row + walk.zero, where], mask=mask, other=0.0, volatile=True
                    )
                    new = (old.astype(jnp.float32) + y.astype(storage).astype(jnp.float32)).astype(storage)
                    plgpu.store(refs[target].at[row + walk.zero, where], new, mask=mask)

    def gather(name: str, layer: Array) -> list[list[Array]]:
        if name in ("maps", "up"):
            norm, source = ("mixer_norm", "x") if name == "maps" else ("mlp_norm", "x1")
            weights = walk.vector(refs[norm], 0, shape.width, layer)
            return [walk.normalised(refs[source], row, weights) for row in rows]
        source, depth = ("z", shape.values) if name == "out" else ("u", shape.hidden)
        return [walk.vector(refs[source], row, depth) for row in rows]

    def product(name: str, weights: list[Array], layer: Array, following: Any) -> list[Array]:
        """A part, and the weights of the next one, asked for before or after it."""
        ahead = following() if shape.early else []
        project(name, gather(name, layer), weights, layer)
        walk.arrive()
        return ahead if shape.early else following()

    def body(layer: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        weights, good = carry
        met = (launch * shape.layers + layer) * _PARTS
        out = product("maps", weights, layer, lambda: walk.fetch("out", layer))
        good = walk.wait(met + 1, good)

        def visit(turn: Array, none: Array) -> Array:
            number = walk.program + turn * shape.programs

            @pl.when(number < heads)
            def read() -> None:
                walk.head(layer, number // shape.heads, number % shape.heads)

            return none

        jax.lax.fori_loop(0, pl.cdiv(heads, shape.programs), visit, jnp.int32(0))
        walk.arrive()
        good = walk.wait(met + 2, good)
        up = product("out", out, layer, lambda: walk.fetch("up", layer))
        good = walk.wait(met + 3, good)
        down = product("up", up, layer, lambda: walk.fetch("down", layer))
        good = walk.wait(met + 4, good)
        more = layer + 1 < shape.layers
        following = jnp.minimum(layer + 1, shape.layers - 1)
        weights = product("down", down, layer, lambda: walk.fetch("maps", following, more))
        good = walk.wait(met + 5, good)
        return weights, good

    start = walk.fetch("maps", jnp.int32(0))
    _, good = jax.lax.fori_loop(0, shape.layers, body, (start, jnp.int32(1)))

    @pl.when(good == 0)
    def spoil() -> None:
        plgpu.store(refs["x"].at[walk.zero, _rows(walk.zero)], jnp.full((ROWS,), jnp.nan, storage))


# Arrays that a kernel changes in place.
_PENDING = ("phases", "keys", "written", "squares")


def _launch(
    body: Any,
    shape: Shape,
    arrays: dict[str, Array],
    changed: tuple[str, ...],
    room: dict[str, Any],
    grid: tuple[int, ...],
    warps: int,
) -> dict[str, Array]:
    given = {name: array for name, array in arrays.items() if name in changed}
    fixed = {name: array for name, array in arrays.items() if name not in changed}
    outputs = {**{name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in given.items()}, **room}

    def kernel(inputs: tuple[Refs, Refs], outputs: Refs) -> None:
        # Arrays changed in place are the outputs; their inputs are the same memory.
        body(shape, {**inputs[1], **outputs})

    names = sorted(outputs)
    return pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=grid,
        input_output_aliases={n: names.index(name) for n, name in enumerate(sorted(given))},
        compiler_params=None if shape.interpret else plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=shape.interpret,
        name=body.__name__,
    )((given, fixed))


def run(shape: Shape, arrays: dict[str, Array]) -> dict[str, Array]:
    """One token through all layers.

    Args:
      shape: see ``Shape``.
      arrays: by name. ``x``: residual stream ``[rows, width]`` in storage dtype. Stacked over layers:
        ``maps``, ``out``, ``up`` (up and gate), ``down`` in storage dtype, ``[out, in]``; float32
        ``mixer_norm``, ``mlp_norm``, ``head_norm``, ``read_taps``, ``write_taps``, ``write_bias``,
        ``erase_bias``; the memory ``memory``, ``writes`` and what is pending: ``phases``, ``keys``,
        ``written``, ``squares``. ``index``: pending writes ``[1]``; ``active``: 1.0 or 0.0 ``[rows]``;
        ``position`` in float32 ``[rows]``; ``counter`` int32 ``[1]``, zero at first, and ``launch`` ``[1]``,
        how often it has been used.

    Returns:
      ``x``, ``counter`` and what is pending, after the token.
    """
    storage = arrays["x"].dtype
    room = {
        "y": jax.ShapeDtypeStruct((shape.rows, shape.offsets["all"]), jnp.float32),
        "z": jax.ShapeDtypeStruct((shape.rows, shape.values), storage),
        "u": jax.ShapeDtypeStruct((shape.rows, shape.hidden), storage),
        "x1": jax.ShapeDtypeStruct((shape.rows, shape.width), storage),
    }
    changed = ("x", "counter", *_PENDING)
    found = _launch(decode_stack, shape, arrays, changed, room, (shape.programs,), WARPS)
    return {name: found[name] for name in changed}


def decode_heads(shape: Shape, refs: Refs) -> None:
    """One program: one head of one row of one layer."""
    walk = _Walk(shape, refs)
    walk.head(walk.zero, pl.program_id(1), pl.program_id(0))


def run_heads(shape: Shape, arrays: dict[str, Array], storage: Any) -> dict[str, Array]:
    """The memory of one layer, for any number of rows: from the maps ``y`` of a token to ``z``.

    Args:
      shape: with ``layers`` 1.
      arrays: as in ``run`` what the memory needs, and ``y``: the joined maps in float32.
      storage: dtype of the result.

    Returns:
      ``z`` ``[rows, values]``, what the output map is applied to, and what is pending.
    """
    room = {"z": jax.ShapeDtypeStruct((shape.rows, shape.values), storage)}
    return _launch(decode_heads, shape, arrays, _PENDING, room, (shape.heads, shape.rows), HEAD_WARPS)
