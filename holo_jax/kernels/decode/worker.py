"""One warpgroup of the kernel over all layers: its registers, its loads and waits, its share of a product.

See ``stream``. A warp multiplies whole rows, so sums stay inside it; the norm costs no pass of its
own, as in ``products``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from holo_jax.array_types import Array
from holo_jax.kernels import mosaic
from holo_jax.kernels.decode import mail as decode_mail
from holo_jax.kernels.decode import plan as decode_plan
from holo_jax.kernels.decode.plan import CHUNK, PRODUCTS
from holo_jax.kernels.decode.shape import Shape

Refs = dict[str, Any]
_TILE = 4  # rows of a weight at a time, one a warp


class Layouts(NamedTuple):
    """Where a warpgroup's registers hold what.

    Attributes:
      rows: ``[4 n, 256]``, a row in one warp.
      lines: ``[4 n, 64]``, a row in one warp.
      slabs: ``[4 n, 64]``, a column in one warp.
      lanes: ``[32]``, the same in every warp.
      threads: ``[128 n]``, a number a thread.
    """

    rows: Any
    lines: Any
    slabs: Any
    lanes: Any
    threads: Any


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
        threads=tiled(((128,), (32,), (1,)), (-3,), (-2,)),
    )


class Numbers(NamedTuple):
    """Of a token, int32.

    Attributes:
      before: tokens of the group before it.
      active: 1 if the row reads it, else 0.
      position: tokens that the row has read, as the bits of an unsigned number.
      launch: launches of the kernel before, modulo 2^32.
    """

    before: Array
    active: Array
    position: Array
    launch: Array


class Worker:
    """One warpgroup that computes: loads, waits and products of its program's share."""

    def __init__(self, shape: Shape, refs: Refs) -> None:
        self.shape, self.refs, self.interpret = shape, refs, shape.interpret
        self.plan, self.layouts = decode_plan.plan(shape), layouts()
        self.group, self.program = jax.lax.axis_index("group"), jax.lax.axis_index("program")
        self.numbers = self.numbers_of(0)

    def numbers_of(self, row: Any) -> Numbers:
        """Of one row."""
        return Numbers(*(self.refs["numbers"][n, row] for n in range(4)))

    def load(self, ref: Any, layout: Any) -> Array:
        """A block in a layout."""
        plgpu = mosaic.pallas()

        return ref[...] if self.interpret else plgpu.load(ref, layout=layout, optimized=False)

    def widened(self, x: Array, layout: Any) -> Array:
        """Float32 of bfloat16 by halves of words: one instruction a number, where the compiler takes two."""
        if self.interpret:
            return x.astype(jnp.float32)
        plgpu = mosaic.pallas()

        @plgpu.inline_mgpu(
            arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout)
        )
        def widen(context: Any, x: Any) -> Any:
            from jaxlib.mlir import ir
            from jaxlib.mlir.dialects import arith, vector

            i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
            high, half = (mosaic.utils().c(value, i32) for value in (-(1 << 16), 16))
            registers = np.empty(x.registers.shape, dtype=object)
            for place, register in np.ndenumerate(x.registers):
                [count] = ir.VectorType(register.type).shape
                words = vector.bitcast(ir.VectorType.get((count // 2,), i32), register)
                numbers = []
                for n in range(count // 2):
                    word = vector.extract(words, dynamic_position=[], static_position=[n])
                    numbers += [arith.shli(word, half), arith.andi(word, high)]
                numbers = [arith.bitcast(f32, bits) for bits in numbers]
                registers[place] = vector.from_elements(ir.VectorType.get((count,), f32), numbers)
            return mosaic.fragments().FragmentedArray(
                _registers=registers, _layout=layout.to_mgpu(), _is_signed=None
            )

        return widen(x)

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
        return [self.widened(x, rows) if x.dtype == jnp.bfloat16 else x for x in found]

    def product(
        self,
        name: str,
        source: str,
        number: Array,
        finish: Any,
        put: Any,
        *,
        scale: list[Array] | None = None,
        beside: Any = lambda: None,
    ) -> Any:
        """Waits for a vector, multiplies this group's rows by it, gives their room back, stores the results.

        Args:
          name: of the product.
          source: the vector.
          number: of the vector's words.
          finish: makes results of the float32 sums of four rows and the same rows of the residual stream for
            ``out`` and ``down``.
          put: stores the program's share; called with it (of ``up`` and the gate) and its rows.
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
        # The last tiles begin early, so that they end with the share; what is made twice is the same.
        starts = [jnp.minimum((self.group * tiles + n) * tile, own - tile) for n in range(tiles)]
        first = decode_plan.first(shape, name, self.program)
        mine = decode_mail.Rows(first, *decode_plan.stored(shape, name, self.program))
        # The stream is where the maps, or the gated layer, had it.
        added = name in ("out", "down")
        old = [
            self.load(refs["narrow"].at[pl.ds(first + start, tile)], rows.reduce(1))
            for start in (starts if added else ())
        ]
        stage = refs["narrow" if name in ("maps", "up") else "wide"]
        part = pl.cdiv(depth // CHUNK, plan.groups) * CHUNK
        at = jnp.minimum(self.group * part, depth - part)
        # Only who stores something waits: so every reader of a vector is waited for before it is overwritten.
        waits = mine.begin < mine.end
        x = decode_mail.take(refs[source].at[pl.ds(at, part)], part, number, waits, interpret=interpret)
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
            for start, total in zip(starts, sums, strict=True):
                for half in range(halves):
                    room = refs[f"{name}_room"].at[half, pl.ds(start, tile), chunk]
                    weights = self.widened(self.load(room, rows), rows)
                    total[half] = plus(total[half], weights * wide)
        inverse: Any = None
        if scale is not None:
            inverse = jax.lax.rsqrt(jnp.sum(squares, axis=0) * (1.0 / depth) + shape.eps)
        plgpu.barrier_arrive(refs["free"].at[PRODUCTS.index(name)])
        for n, total in enumerate(sums):
            for half, y in enumerate(total):
                found = jnp.sum(y, axis=1)
                if inverse is not None:
                    found = found * inverse
                before = old[n].astype(jnp.float32) if added else None
                refs["share"].at[half, pl.ds(starts[n], tile)][...] = finish(found, before)
        self.meet(plan.groups)

        def store() -> None:
            here = own if interpret else refs["share"].shape[1]
            places = [refs["share"].at[half, pl.ds(0, here)] for half in range(halves)]
            put([self.load(place, self.layouts.threads) for place in places], mine)

        pl.when(self.group == 0)(store)
        return later


def plus(total: Array | None, x: Array) -> Array:
    """A sum that may not have begun."""
    return x if total is None else total + x


def rounded(x: Array) -> Array:
    """Float32 that bfloat16 can hold."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def silu(x: Array) -> Array:
    """``x * sigmoid(x)``; a root squared, as a quotient is many instructions."""
    root = jax.lax.rsqrt(1.0 + jnp.exp(-x))
    return x * (root * root)


def turns(shape: Shape) -> int:
    """Heads that a program works out."""
    return pl.cdiv(shape.heads, shape.programs)


def launch(
    shape: Shape, program: Any, arrays: dict[str, Array], changed: tuple[str, ...], scratch: Refs
) -> dict[str, Array]:
    """``program(shape, refs)`` in every warpgroup of a program a multiprocessor, for a whole token.

    Args:
      shape: see ``Shape``.
      program: the kernel, by whose name it is called.
      arrays: by the names of ``refs``.
      changed: those that the kernel writes.
      scratch: shared memory and barriers, by name.

    Returns:
      What was changed, after the kernel.
    """
    plgpu = mosaic.pallas()

    fixed = {name: array for name, array in arrays.items() if name not in changed}
    states = {name: jax.new_ref(arrays[name]) for name in changed}

    def body(*given: Any, **room: Any) -> None:
        program(shape, {**dict(zip([*fixed, *states], given, strict=True)), **room})

    plgpu.kernel(
        body,
        scratch_types=scratch,
        grid=(shape.programs,),
        grid_names=("program",),
        num_threads=decode_plan.plan(shape).groups + 1,
        thread_name="group",
        kernel_name=program.__name__,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=plgpu.InterpretGPUParams() if shape.interpret else False,
    )(*fixed.values(), *states.values())
    return {name: jax.freeze(ref) for name, ref in states.items()}
