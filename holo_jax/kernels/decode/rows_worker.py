"""One warpgroup of the kernel over all layers: products by tensor cores, and the mail.

See ``rows``. All warps of a program make one product together: each multiplies its part of the
columns, which it loads from device memory into registers itself; parts meet in shared memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from holo_jax.array_types import Array
from holo_jax.kernels import mosaic
from holo_jax.kernels.decode import plan as decode_plan
from holo_jax.kernels.decode import rows_plan as decode_rows_plan
from holo_jax.kernels.decode import rows_product as decode_rows_product
from holo_jax.kernels.decode import rows_ptx as decode_rows_ptx
from holo_jax.kernels.decode.plan import MAPS, PRODUCTS
from holo_jax.kernels.decode.rows_product import Finish, Multiply, Source
from holo_jax.kernels.decode.shape import Shape
from holo_jax.kernels.decode.worker import Refs, Worker, rounded, silu

# Loads of weights, 16 bytes a lane, before the vector has come: as many as there are registers for.
EARLY = {"maps": 12, "out": 4, "up": 16, "down": 6}
_SOURCES = {"maps": "x", "out": "z", "up": "x1", "down": "u"}
_TARGETS = {"maps": "y", "out": "x1", "up": "u", "down": "x"}


class RowsWorker(Worker):
    """Products and mail of a program's share."""

    def __init__(self, shape: Shape, refs: Refs) -> None:
        super().__init__(shape, refs)
        self.vectors = decode_rows_plan.vectors(shape)
        self.slot_bytes = 4 * decode_rows_plan.slot_words(shape)
        self.launch: Any = None

    def call(self, text: str, refs: list[Any], *numbers: Any, threads: int = 256) -> None:
        """Runs a text by every thread: operands are its number among so many threads, refs, numbers."""
        plgpu = mosaic.pallas()

        scalar = plgpu.Layout.WG_SPLAT(())
        given = [jnp.asarray(n, jnp.int32) for n in numbers]

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), *[scalar] * len(given)))
        def run(context: Any, *args: Any) -> None:
            pointers = [_address(ref) for ref in args[: len(refs)]]
            values = [value.registers.item() for value in args[len(refs) :]]
            mosaic.utils().inline_ptx(
                text, _thread(threads), *pointers, *values, has_side_effects=True, convergent=True
            )

        run(*refs, *given)

    def held(self, x: Any, layout: Any) -> Any:
        """What is loaded, begun here: the compiler would put a load off until its use, past waits between."""
        plgpu = mosaic.pallas()

        if self.interpret:
            return x
        layout = plgpu.Layout.WG_SPLAT(()) if layout is None else layout

        @plgpu.inline_mgpu(
            arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)
        )
        def keep(context: Any, x: Any) -> Any:
            from jaxlib.mlir import ir
            from jaxlib.mlir.dialects import vector

            registers = np.empty(x.registers.shape, dtype=object)
            for place, register in np.ndenumerate(x.registers):
                if not isinstance(register.type, ir.VectorType):
                    registers[place] = _moved([register])[0]
                    continue
                [count] = register.type.shape
                parts = [
                    vector.extract(register, dynamic_position=[], static_position=[n]) for n in range(count)
                ]
                registers[place] = vector.from_elements(register.type, list(_moved(parts)))
            return mosaic.fragments().FragmentedArray(
                _registers=registers, _layout=layout.to_mgpu(), _is_signed=None
            )

        return keep(x)

    def stores(self, name: str) -> Any:
        """Whether this program has results of a product."""
        return self.first(name) < decode_plan.outputs(self.shape, name)

    def first(self, name: str) -> Any:
        """First column of this program's results."""
        return self.program * decode_rows_plan.share(self.shape, name)

    def finish_of(self, name: str) -> Finish:
        """See ``Finish``."""
        shape = self.shape
        return Finish(
            rows=shape.rows,
            padded=decode_rows_plan.padded(shape),
            tiles=len(decode_rows_plan.tiles(shape, name)),
            own=decode_rows_plan.share(shape, name),
            outputs=decode_plan.outputs(shape, name),
            at=4 * self.vectors[_TARGETS[name]].at,
            slot=self.slot_bytes,
            depth=decode_plan.depth(shape, name),
            eps=shape.eps,
            heads=shape.heads,
            per_head=decode_plan.per_head(shape),
        )

    def begin(self) -> None:
        """Waits for the kernel before, and takes this program's columns of the stream."""
        refs = self.refs
        self.follow()
        self.launch = self.numbers_of(0).launch
        if self.interpret:
            refs["stream"][...] = refs["x"][...].astype(jnp.float32)
            return
        text = decode_rows_product.begun(self.finish_of("down"))
        self.call(text, [refs["stream"], refs["x"]], self.first("down"))

    def follow(self) -> None:
        """Waits for the kernel before this one, which may still run: what it stored is there then.

        The one after it may begin from now on, where there is room: when programs end.
        """
        if not self.interpret:
            mosaic.pallas().griddepcontrol_wait()
            mosaic.pallas().griddepcontrol_launch_dependents()

    def product(self, name: str, layer: Array, slot: Array, target: Array) -> None:
        """Waits for a vector, multiplies by this program's rows, gives their room back, stores the results.

        Args:
          name: of the product.
          layer: which.
          slot: of the vector in the mail.
          target: of the results.
        """
        plgpu = mosaic.pallas()

        shape, refs = self.shape, self.refs
        sums = refs[decode_rows_plan.sums(name)]
        for n in range(len(decode_rows_plan.copies(shape, name))):
            plgpu.barrier_wait(refs[f"{name}_come"].at[n])
        if self.interpret:
            self._finished(name, self._multiplied(name, layer, slot), layer, target)
        else:
            given = {key: refs[key] for key in ("mail", "stream", "hidden", "numbers")}
            given |= {"array": refs["x"], "weights": refs[f"{name}_room"], "sums": sums}
            at_end = layer == (0 if name == "maps" else shape.layers - 1)
            numbers = {"slot": slot, "target": target, "first": self.first(name)}
            numbers |= {"waits": self.stores(name).astype(jnp.int32), "flag": at_end.astype(jnp.int32)}
            text = decode_rows_product.product(name, self._multiply(name), self.finish_of(name))
            operands = decode_rows_product.OPERANDS[name]
            self.call(
                text, [given[key] for key in operands.refs], *(numbers[key] for key in operands.numbers)
            )
        plgpu.barrier_arrive(refs["free"].at[PRODUCTS.index(name)])

    def slot(self, layer: Array) -> Array:
        """Of a layer's vectors in the mail."""
        launch = self.numbers_of(0).launch if self.launch is None else self.launch
        return (launch * self.shape.layers + layer) & (decode_rows_plan.SLOTS - 1)

    def clear(self, slot: Array) -> None:
        """Makes a slot ready for vectors to come, before the next copy is asked for.

        By the warpgroup that fetches; not in programs that wait for no input of the output map.
        """
        shape = self.shape
        if self.interpret:
            self.refs["mail"][slot] = jnp.full((decode_rows_plan.slot_words(shape),), -1, jnp.int32)
            return
        programs = -(-shape.width // decode_rows_plan.share(shape, "out"))
        text = decode_rows_ptx.cleared(programs, self.slot_bytes)

        def store() -> None:
            self.call(text, [self.refs["mail"]], slot, self.program, threads=128)
            self.meet()

        pl.when(self.stores("out"))(store)

    def head_of(self, slot: Any) -> tuple[Array, Array]:
        """Row and head in a place of this program; the last one if there is none."""
        shape = self.shape
        own = jnp.minimum(self.program + shape.programs * slot, shape.rows * shape.heads - 1)
        return own // shape.heads, own % shape.heads

    def has(self, slot: Any) -> Array:
        """Whether there is a head for a place of this program."""
        return self.program + self.shape.programs * slot < self.shape.rows * self.shape.heads

    def ask(self, layer: Array) -> None:
        """Has taps and norms of this program's heads in the second cache, by the warpgroup that fetches."""
        shape, refs = self.shape, self.refs
        if self.interpret:
            return
        for slot in range(decode_rows_plan.heads_of_program(shape)):
            _, head = self.head_of(slot)
            for name in ("write_taps", "read_taps"):
                text = decode_rows_ptx.asked(shape.taps, 4 * shape.heads * shape.m)
                at = (layer * shape.taps * shape.heads + head) * (4 * shape.m)
                self.call(text, [refs[name]], at, threads=128)
            if shape.head_norm:
                at = (layer * shape.heads + head) * (4 * shape.d)
                text = decode_rows_ptx.asked(4 * shape.d // 128, 128)
                self.call(text, [refs["head_norm"]], at, threads=128)

    def maps(self, row: Array, head: Array, slot: Array) -> Array:
        """Waits for the maps of a head, float32 ``[MAPS]``, then zeros."""
        plgpu = mosaic.pallas()

        shape, own = self.shape, decode_plan.per_head(self.shape)
        first = (row * shape.heads + head) * own
        if self.interpret:
            words = self.refs["mail"][slot, pl.ds(self.vectors["y"].at + first, own)]
            return jnp.pad(jax.lax.bitcast_convert_type(words, jnp.float32), (0, MAPS - own))
        layout = plgpu.Layout.WG_STRIDED((MAPS,), vec_size=2)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())),
            return_type=plgpu.ShapeDtypeStruct((MAPS,), jnp.float32, layout=layout),
        )
        def take(context: Any, mail: Any, at: Any) -> Any:
            from jaxlib.mlir import ir
            from jaxlib.mlir.dialects import arith, vector

            i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
            found = mosaic.utils().inline_ptx(
                decode_rows_ptx.pairs(own // 2),
                _address(mail),
                at.registers.item(),
                _thread(128),
                result_types=[i32, i32],
                has_side_effects=True,
            )
            both = [arith.bitcast(f32, word) for word in found]
            registers = np.empty(1, dtype=object)
            registers[0] = vector.from_elements(ir.VectorType.get((2,), f32), both)
            return mosaic.fragments().FragmentedArray(
                _registers=registers, _layout=layout.to_mgpu(), _is_signed=None
            )

        return take(self.refs["mail"], slot * self.slot_bytes + 4 * (self.vectors["y"].at + first))

    def put(self, row: Array, head: Array, slot: Array, read: Array) -> None:
        """Stores what a head has read, float32 that bfloat16 can hold, in a line."""
        plgpu = mosaic.pallas()

        shape, vector = self.shape, self.vectors["z"]
        if self.interpret:
            before = self._vector("z", slot)
            self._store("z", slot, jax.lax.dynamic_update_slice(before, read[None], (row, head * shape.d)))
            return
        step = 64 * decode_rows_plan.padded(shape)

        line = self.layouts.lines.reduce(0)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(()), line))
        def store(context: Any, mail: Any, at: Any, values: Any) -> None:
            from jaxlib.mlir.dialects import vector

            [register] = values.registers.flat
            both = [vector.extract(register, dynamic_position=[], static_position=[n]) for n in range(2)]
            mosaic.utils().inline_ptx(
                decode_rows_ptx.line(step),
                _address(mail),
                at.registers.item(),
                _thread(128),
                *both,
                has_side_effects=True,
            )

        at = slot * self.slot_bytes + 4 * vector.at + row * 64 + head * (shape.d // 32 * step)
        store(self.refs["mail"], at, read)

    def _multiply(self, name: str) -> Multiply:
        shape, vector = self.shape, self.vectors[_SOURCES[name]]
        room = decode_rows_plan.padded(shape)
        source = Source(64, 16, 64 * room) if vector.lines == 32 else Source(16, 16 * room, 64 * room)
        return Multiply(
            rows=shape.rows,
            padded=room,
            tiles=tuple(decode_rows_plan.tiles(shape, name)),
            depth=decode_plan.depth(shape, name),
            at=4 * vector.at,
            slot=self.slot_bytes,
            source=source,
            plain=Source(2 * shape.width, 16, 64) if name == "maps" else None,
            squares=name in ("maps", "up"),
            early=EARLY[name],
        )

    def _vector(self, name: str, slot: Array) -> Array:
        """In the interpreter: a vector of all rows in float32."""
        vector, room = self.vectors[name], decode_rows_plan.padded(self.shape)
        words = self.refs["mail"][slot, pl.ds(vector.at, vector.words)]
        parts = [jax.lax.shift_left(words, 16), words & -(1 << 16)]
        numbers = jnp.stack([jax.lax.bitcast_convert_type(part, jnp.float32) for part in parts], axis=-1)
        found = numbers.reshape(-1, room, vector.lines).swapaxes(0, 1).reshape(room, -1)
        return found[: self.shape.rows]

    def _store(self, name: str, slot: Array, values: Array) -> None:
        """Inverse of ``_vector``."""
        vector, room = self.vectors[name], decode_rows_plan.padded(self.shape)
        values = jnp.pad(values, ((0, room - self.shape.rows), (0, 0)), constant_values=-1.0)
        bits = jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16).astype(jnp.int32)
        pairs = bits.reshape(room, -1, vector.lines).swapaxes(0, 1).reshape(-1, 2)
        words = pairs[:, 0] | jax.lax.shift_left(pairs[:, 1], 16)
        self.refs["mail"][slot, pl.ds(vector.at, vector.words)] = words

    def _multiplied(self, name: str, layer: Array, slot: Array) -> Array:
        """In the interpreter: results of all rows in float32, those of normed rows divided by the root."""
        shape = self.shape
        x = self._vector(_SOURCES[name], slot)
        if name == "maps":
            x = jnp.where(layer == 0, self.refs["x"][...].astype(jnp.float32), x)
        weight = decode_rows_plan.gathered(shape, name, self.refs[f"{name}_room"][...])
        found = jax.lax.dot_general(x, weight.astype(jnp.float32), (((1,), (1,)), ((), ())))
        if name in ("maps", "up"):
            found = found * jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + shape.eps)
        return found

    def _finished(self, name: str, found: Array, layer: Array, target: Array) -> None:
        """In the interpreter: stores results."""
        shape, refs = self.shape, self.refs
        if name == "maps":
            words = jax.lax.bitcast_convert_type(found, jnp.int32).reshape(-1)
            refs["mail"][target, pl.ds(self.vectors["y"].at, words.shape[0])] = words
            return
        if name == "up":
            up, gate = (rounded(part) for part in jnp.split(found, 2, axis=1))
            self._store("u", target, silu(gate) * up)
            return
        stream = rounded(refs["stream"][...] + rounded(found))
        refs["stream"][...] = stream
        self._store(_TARGETS[name], target, stream)
        if name == "down":
            reads = (layer == shape.layers - 1) & (refs["numbers"][1] != 0)
            refs["hidden"][...] = jnp.where(reads[:, None], stream.astype(jnp.bfloat16), refs["hidden"][...])


def _thread(threads: int = 256) -> Any:
    """Thread among those that compute, or in its warpgroup."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    return arith.remui(
        mosaic.utils().thread_idx(), mosaic.utils().c(threads, ir.IntegerType.get_signless(32))
    )


def _moved(values: list[Any]) -> Any:
    """Copies of registers, which are made where they stand."""
    count = len(values)
    text = " ".join(f"mov.b32 ${n}, ${n + count};" for n in range(count))
    types = [value.type for value in values]
    return mosaic.utils().inline_ptx(text, *values, result_types=types, has_side_effects=True)


def _address(ref: Any) -> Any:
    """Of an array in device memory, or in shared memory as a number of 32 bits."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    utils = mosaic.utils()
    pointer = utils.memref_ptr(ref)
    if llvm.PointerType(pointer.type).address_space == utils.WORKGROUP_NVPTX_ADDRESS_SPACE:
        return llvm.ptrtoint(ir.IntegerType.get_signless(32), pointer)
    return pointer
