"""Exponentials of logits over a reference of each row, as a product's epilogue makes them (Mosaic GPU).

For hidden states ``h``, a table ``W`` of output rows, targets ``t`` and references ``r`` of rows

    E_ij = exp2((h_i . W_j) log2(e) - r_i) for j != t_i,    E_i,t_i = 0,

in bfloat16, whose range of exponents is float32's: so no row needs its maximum, and any reference near its
normalizer will do. Sums over blocks of columns are those of the float32 numbers. Logits stay in registers.

Programs, one a multiprocessor, walk blocks of 128 rows by 256 columns; one warpgroup copies operands, two
multiply, 128 columns each.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from holo_jax.array_types import Array, Float, Int
from holo_jax.kernels import mosaic
from holo_jax.kernels.capability import multiprocessors

ROWS, COLUMNS, DEPTH = 128, 256, 64
_HALF = COLUMNS // 2  # of a warpgroup
_PART = 64  # columns stored at a time
_STAGES = 4
_AHEAD = 3  # steps of a product; the second warpgroup multiplies while the first finds exponentials
_BAND = 8  # blocks of rows that programs side by side share
_LOG2_E = math.log2(math.e)
_Refs = dict[str, Any]


def exponentials(
    hidden: Float[Array, "n e"],
    table: Float[Array, "v e"],
    reference: Float[Array, "n"],
    targets: Int[Array, "n"],
    *,
    vocabulary: int,
    interpret: Any = None,
) -> tuple[Float[Array, "n v"], Float[Array, "s n"]]:
    """(E, sums of its float32 numbers over every 128 columns).

    Args:
      hidden, table: bfloat16; n a multiple of 128, v of 256, e of 64.
      reference: r, float32, in powers of two.
      targets: columns that are 0 in their row; int32.
      vocabulary: columns from here on are 0.
      interpret: parameters of Pallas' interpreter, or None.
    """
    plgpu = mosaic.pallas()
    (n, e), v = hidden.shape, table.shape[0]

    def operand(rows: int) -> Any:
        return plgpu.SMEM((_STAGES, rows, DEPTH), hidden.dtype, transforms=_laid_out(hidden.dtype))

    def run(*refs: Any, **held: Any) -> None:
        _program((n // ROWS, v // COLUMNS, e // DEPTH), vocabulary, *refs, held=held)

    found: tuple[Array, Array] = plgpu.kernel(
        run,
        out_type=(
            jax.ShapeDtypeStruct((n, v), jnp.bfloat16),
            jax.ShapeDtypeStruct((v // _HALF, n), jnp.float32),
        ),
        scratch_types=dict(
            hidden=operand(ROWS),
            table=operand(COLUMNS),
            part=plgpu.SMEM((2, ROWS, _PART), jnp.bfloat16, transforms=_laid_out(jnp.bfloat16)),
            sums=plgpu.SMEM((2, ROWS), jnp.float32),
            come=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            free=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            ahead=plgpu.Barrier(),
        ),
        grid=(max(multiprocessors(), 1),),
        grid_names=("program",),
        num_threads=3,
        thread_name="group",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="logit_exponentials",
    )(hidden, table, reference, targets)
    return found


def _laid_out(dtype: Any) -> tuple[Any, Any]:
    """Of rows of 64 numbers, for asynchronous copies and the tensor cores."""
    plgpu = mosaic.pallas()
    swizzle = plgpu.find_swizzle(DEPTH * jnp.dtype(dtype).itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)


def _program(
    blocks: tuple[int, int, int],
    vocabulary: int,
    hidden_ref: Any,
    table_ref: Any,
    reference_ref: Any,
    targets_ref: Any,
    out_ref: Any,
    sums_ref: Any,
    *,
    held: _Refs,
) -> None:
    plgpu = mosaic.pallas()
    *grid, depth = blocks
    group, program = lax.axis_index("group"), lax.axis_index("program")
    programs = lax.axis_size("program")
    own = lax.div(math.prod(grid) - program + programs - 1, programs)

    def place(block: Array) -> tuple[Array, Array]:
        return plgpu.planar_snake(program + block * programs, tuple(grid), 0, _BAND)

    @pl.when(group == 2)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, own)
        def _block(block: Array) -> None:
            row, column = place(block)

            @pl.loop(0, depth)
            def _step(k: Array) -> None:
                count = block * depth + k
                slot = lax.rem(count, _STAGES)

                @pl.when(count >= _STAGES)
                def _wait() -> None:
                    plgpu.barrier_wait(held["free"].at[slot])

                at = pl.ds(k * DEPTH, DEPTH)
                come = held["come"].at[slot]
                rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * COLUMNS, COLUMNS)
                plgpu.copy_gmem_to_smem(hidden_ref.at[rows, at], held["hidden"].at[slot], come)
                plgpu.copy_gmem_to_smem(table_ref.at[columns, at], held["table"].at[slot], come)

        # No stage is left that another warpgroup has yet to read.
        @pl.loop(jnp.maximum(own * depth - _STAGES, 0), own * depth)
        def _rest(count: Array) -> None:
            plgpu.barrier_wait(held["free"].at[lax.rem(count, _STAGES)])

    @pl.when(group != 2)
    def _multiply() -> None:
        plgpu.set_max_registers(232, action="increase")

        @pl.loop(0, own)
        def _block(block: Array) -> None:
            row, column = place(block)
            rows = pl.ds(row * ROWS, ROWS)
            first = column * COLUMNS + group * _HALF
            along = plgpu.Layout.WGMMA.reduce(1)
            reference, target = (
                plgpu.load(ref.at[rows], layout=along, optimized=False)
                for ref in (reference_ref, targets_ref)
            )
            start = block * depth

            def product(total: Any) -> Array:
                def step(k: Any) -> None:
                    slot = lax.rem(start + k, _STAGES)
                    plgpu.barrier_wait(held["come"].at[slot])
                    followed = (group == 0) & (k == min(_AHEAD, depth) - 1)
                    plgpu.barrier_arrive(held["ahead"], predicate=followed)
                    columns = held["table"].at[slot, pl.ds(group * _HALF, _HALF)]
                    plgpu.wgmma(total, held["hidden"].at[slot], columns.T)

                @pl.when(group == 1)
                def _behind() -> None:
                    plgpu.barrier_wait(held["ahead"])

                step(0)

                @pl.loop(1, depth)
                def _steps(k: Array) -> None:
                    step(k)
                    plgpu.wgmma_wait(1)
                    plgpu.barrier_arrive(held["free"].at[lax.rem(start + k - 1, _STAGES)])

                logits = total[...]
                plgpu.barrier_arrive(held["free"].at[lax.rem(start + depth - 1, _STAGES)])
                return logits

            logits = pl.run_scoped(product, plgpu.ACC((ROWS, _HALF), jnp.float32))
            shape, sums = (ROWS, _PART), []
            for part in range(_HALF // _PART):
                at = first + part * _PART
                ours = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
                spread = partial(lax.broadcast_in_dim, shape=shape, broadcast_dimensions=[0])
                powers = logits[:, part * _PART : (part + 1) * _PART] * _LOG2_E - spread(reference)
                counted = ours != spread(target - at)
                if vocabulary < grid[1] * COLUMNS:
                    counted = counted & (ours < vocabulary - at)
                found = jnp.where(counted, jnp.exp2(powers), 0.0)
                sums.append(jnp.sum(found, axis=1))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                held["part"].at[group][...] = found.astype(jnp.bfloat16)
                if part == _HALF // _PART - 1:
                    held["sums"].at[group][...] = sum(sums[1:], sums[0])
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(held["part"].at[group], out_ref.at[rows, pl.ds(at, _PART)])
            plgpu.copy_smem_to_gmem(held["sums"].at[group], sums_ref.at[2 * column + group, rows])

        plgpu.wait_smem_to_gmem(0)
