"""One warpgroup of the kernel over all layers (``rows``): its registers, its loads and waits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array
from holo_jax.kernels import mosaic
from holo_jax.kernels.decode import plan as decode_plan
from holo_jax.kernels.decode.shape import Shape

Refs = dict[str, Any]


class Layouts(NamedTuple):
    """Where a warpgroup's registers hold what.

    Attributes:
      lines: ``[4 n, 64]``, a row in one warp.
      slabs: ``[4 n, 64]``, a column in one warp.
      lanes: ``[32]``, the same in every warp.
      quads: ``[16 n, 64]``, a row in eight lanes of one warp.
    """

    lines: Any
    slabs: Any
    lanes: Any
    quads: Any


def layouts() -> Layouts:
    """Of this kernel."""
    plgpu = mosaic.pallas()

    def tiled(tiles: Any, warps: Any, lanes: Any) -> Any:
        return plgpu.Layout.TILED(plgpu.Tiling(tiles), warp_dims=warps, lane_dims=lanes, vector_dim=-1)

    return Layouts(
        lines=tiled(((4, 64), (2,)), (-3,), (-2,)),
        slabs=tiled(((4, 64), (4, 16), (2,)), (-4,), (-3, -2)),
        lanes=tiled(((32,), (1,)), (plgpu.Replicated(4),), (-2,)),
        quads=tiled(((16, 64), (4, 16), (2,)), (-5,), (-3, -2)),
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
    """One warpgroup that computes: loads and waits."""

    def __init__(self, shape: Shape, refs: Refs) -> None:
        self.shape, self.refs, self.interpret = shape, refs, shape.interpret
        self.layouts = layouts()
        self.group, self.program = jax.lax.axis_index("group"), jax.lax.axis_index("program")

    def numbers_of(self, row: Any) -> Numbers:
        """Of one row."""
        return Numbers(*(self.refs["numbers"][n, row] for n in range(4)))

    def load(self, ref: Any, layout: Any) -> Array:
        """A block in a layout."""
        plgpu = mosaic.pallas()

        return ref[...] if self.interpret else plgpu.load(ref, layout=layout, optimized=False)

    def spread(self, x: Array, shape: tuple[int, int], axis: int, layout: Any) -> Array:
        """A vector along one axis of a block, the same along the other."""
        plgpu = mosaic.pallas()

        wide = jax.lax.broadcast_in_dim(x, shape, (axis,))
        return wide if self.interpret else plgpu.layout_cast(wide, layout)

    def meet(self) -> None:
        """Waits for the other warps of this group, and what they stored."""
        plgpu = mosaic.pallas()

        if self.interpret:
            return

        @plgpu.inline_mgpu()
        def barrier(context: Any) -> None:
            mosaic.utils().warpgroup_barrier()

        barrier()

    def slots(self, shape: tuple[int, int], layout: Any) -> Array:
        """Numbers of rows, in a layout."""
        plgpu = mosaic.pallas()

        if self.interpret:
            return jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)


def rounded(x: Array) -> Array:
    """Float32 that bfloat16 can hold."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def silu(x: Array) -> Array:
    """``x * sigmoid(x)``; a root squared, as a quotient is many instructions."""
    root = jax.lax.rsqrt(1.0 + jnp.exp(-x))
    return x * (root * root)


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
        num_threads=decode_plan.groups(shape) + 1,
        thread_name="group",
        kernel_name=program.__name__,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=plgpu.InterpretGPUParams() if shape.interpret else False,
    )(*fixed.values(), *states.values())
    return {name: jax.freeze(ref) for name, ref in states.items()}
