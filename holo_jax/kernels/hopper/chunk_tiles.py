"""What kernels over chunks of 64 positions share: tiles of 64 x 64, loads and products (Mosaic GPU).

Products have 16-bit operands and float32 accumulators.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.array_types import Array
from holo_jax.kernels import mosaic

CHUNK = 64
WIDTH = 64


def tile(dtype: Any, *lead: int) -> Any:
    """Room for tiles in shared memory, laid out for asynchronous copies and the tensor cores."""
    plgpu = mosaic.pallas()
    swizzle = plgpu.find_swizzle(WIDTH * jnp.dtype(dtype).itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM((*lead, CHUNK, WIDTH), dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def vector(*lead: int) -> Any:
    """Room for float32 numbers of a chunk's positions."""
    return mosaic.pallas().SMEM((*lead, CHUNK), jnp.float32)


def load(ref: Any) -> Array:
    """A tile in the registers of the tensor cores, as float32."""
    plgpu = mosaic.pallas()
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def along(ref: Any, axis: int) -> Array:
    """A vector whose numbers belong to the rows (0) or columns (1) of a tile, spread over it."""
    plgpu = mosaic.pallas()
    numbers = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis))
    return jax.lax.broadcast_in_dim(numbers, (CHUNK, WIDTH), [axis])


def indices(axis: int) -> Array:
    """Rows (0) or columns (1) of a tile, counted."""
    plgpu = mosaic.pallas()
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, WIDTH), axis, layout=plgpu.Layout.WGMMA)


def zeros() -> Array:
    """A float32 tile of nothing."""
    plgpu = mosaic.pallas()
    return plgpu.layout_cast(jnp.zeros((CHUNK, WIDTH), jnp.float32), plgpu.Layout.WGMMA)


class Products:
    """Products of tiles, of which the first may be in registers; ``interpreted`` where no tensor cores are.

    Nothing may be moved over the end of a product, which no register names: hence the barriers.
    """

    def __init__(self, interpreted: bool) -> None:
        self._interpreted = interpreted

    def __call__(self, a: Any, b: Any) -> Array:
        """``a b``."""
        return self.apart((a, b))[0]

    def apart(self, *pairs: Any) -> tuple[Array, ...]:
        """Of several pairs at once."""
        if self._interpreted:  # the interpreter multiplies no registers
            wide = ([x[...].astype(jnp.float32) for x in pair] for pair in pairs)
            return tuple(jnp.dot(a, b, precision="highest") for a, b in wide)
        plgpu = mosaic.pallas()

        def multiply(*sums: Any) -> tuple[Array, ...]:
            for total, (a, b) in zip(sums, pairs, strict=True):
                plgpu.wgmma(total, a, b)
            return tuple(total[...] for total in sums)

        rooms = [plgpu.ACC((CHUNK, WIDTH), jnp.float32) for _ in pairs]
        return jax.lax.optimization_barrier(pl.run_scoped(multiply, *rooms))

    def added(self, start: Array, *pairs: Any) -> Array:
        """``start`` and the products of all pairs."""
        if self._interpreted:
            return sum(self.apart(*pairs), start)
        plgpu = mosaic.pallas()

        def multiply(total: Any) -> None:
            for a, b in pairs:
                plgpu.wgmma(total, a, b)

        return jax.lax.optimization_barrier(pl.run_state(multiply)(plgpu.ACC.init(start)))
