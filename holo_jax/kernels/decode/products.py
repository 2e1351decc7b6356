"""Products of few rows with a weight, with what stands before and after them (Pallas, lowered to Triton).

A token of few rows costs what reading the weights costs, plus what starts and ends of kernels cost. Three
kinds of product make a layer beside its memory (``heads.run_heads``), each one kernel:

* ``maps``: of the RMSNorm of the residual stream, in float32;
* ``gated``: of the RMSNorm, ``silu(gate) * up``;
* ``added``: the residual stream plus the product.

The norm costs no pass of its own: its weight is multiplied in before the product, and one over the root mean
square, which is summed on the way, after it. So the normed row is not rounded as a whole, its terms are.

Weights are ``[out, in]``. A program takes a few rows of the weight, one a warp, so sums stay inside warps,
and asks for several pieces of them before it needs the first. For more rows, tiles on tensor cores were
slower than the compiler's own products (docs/log.md, 2026-11-28).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array, Float

# More rows would keep more sums than a thread has registers.
MAX_ROWS = 4
_LEAST_CHUNK = 64


class Tiling(NamedTuple):
    """Shape of a program; results differ by rounding only.

    Attributes:
      outputs: rows of the weight that a program takes, and its warps.
      chunk: columns of the weight taken at a time.
      ahead: chunks asked for before the first is needed.
    """

    outputs: int
    chunk: int = 256
    ahead: int = 8


def tiling_of(depth: int) -> Tiling:
    """The fastest on an H100: 16 KiB of weights a program up to 1,024 columns, four rows of more."""
    return Tiling(outputs=8 if depth <= 1024 else 4, chunk=min(depth & -depth, 256))


class Product(NamedTuple):
    """What is static about a call.

    Attributes:
      kind: ``maps``, ``gated`` or ``added``.
      rows, depth, outputs: of the result ``[rows, outputs]``, summed over ``depth``.
      eps: of the norm.
      tiling: shape of a program.
      interpret: run in Pallas' interpreter.
    """

    kind: str
    rows: int
    depth: int
    outputs: int
    eps: float
    tiling: Tiling
    interpret: bool

    @property
    def halves(self) -> int:
        """Weights of one result: ``up`` and ``gate``, one above the other, or one."""
        return 2 if self.kind == "gated" else 1

    @property
    def normed(self) -> bool:
        """Whether the input is normed."""
        return self.kind != "added"


def unsupported(rows: int, depths: tuple[int, ...]) -> str | None:
    """Why products of these depths cannot run by kernels, or None."""
    if rows > MAX_ROWS:
        return f"the batch has {rows} rows; it must have at most {MAX_ROWS}"
    for depth in depths:
        if depth % _LEAST_CHUNK:
            return f"a product sums over {depth} columns; it must be a multiple of {_LEAST_CHUNK}"
    return None


def product(
    kind: str,
    x: Float[Array, "b i"],
    weight: Float[Array, "o i"],
    *,
    norm: Float[Array, " i"] | None = None,
    residual: Float[Array, "b o"] | None = None,
    eps: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "b r"]:
    """One of the products above.

    Args:
      kind: ``maps`` and ``gated`` norm their input with the weight ``norm``; ``added`` adds ``residual``.
      x: rows in the storage dtype.
      weight: in the storage dtype, for ``gated`` the rows of ``up`` and then those of ``gate``.
      norm: weight of the norm in float32.
      residual: rows in the storage dtype.
      eps: of the norm.
      interpret: run in Pallas' interpreter, anywhere.

    Returns:
      Float32 for ``maps``, else the storage dtype; ``[b, o]``, of ``gated`` half as many columns.
    """
    rows, depth = x.shape
    tiling = tiling_of(depth)
    outputs = weight.shape[0] // (2 if kind == "gated" else 1)
    call = Product(kind, rows, depth, outputs, eps, tiling, interpret)
    given = {"x": x, "weight": weight, "norm": norm, "residual": residual}
    inputs = {name: array for name, array in given.items() if array is not None}

    programs = pl.cdiv(outputs, tiling.outputs)

    def kernel(ins: dict[str, Any], out: Any) -> None:
        _program(call, {**ins, "out": out})

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, outputs), jnp.float32 if kind == "maps" else x.dtype),
        grid=(programs,),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=tiling.outputs, num_stages=1),
        interpret=interpret,
        name=f"decode_{kind}",
    )(inputs)


def _block(rows: Array, columns: Array) -> tuple[Array, Array]:
    """Indices of a block."""
    shape = (rows.shape[0], columns.shape[0])
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None, :], shape)


def columns(call: Product) -> Array:
    """The columns of the result that this program makes; the last one's may lie past the end."""
    return pl.program_id(0) * call.tiling.outputs + jax.lax.iota(jnp.int32, call.tiling.outputs)


def _finish(call: Product, refs: dict[str, Any], sums: list[Array], at: tuple[Array, ...]) -> Array:
    """From float32 products to the result, at indices of it that exist."""
    if call.kind == "maps":
        return sums[0]
    storage = refs["x"].dtype
    rounded = [y.astype(storage).astype(jnp.float32) for y in sums]
    if call.kind == "gated":
        up, gate = rounded
        return (gate * jax.nn.sigmoid(gate) * up).astype(storage)
    return (plgpu.load(refs["residual"].at[at]).astype(jnp.float32) + rounded[0]).astype(storage)


def products(call: Product, refs: dict[str, Any]) -> list[list[Array]]:
    """Of one program, for each row and half in float32: a warp multiplies and sums whole rows of the weight.

    Columns past the end have the last one's.
    """
    tiling = call.tiling
    outputs = columns(call)
    inside = jnp.minimum(outputs, call.outputs - 1)
    chunks = call.depth // tiling.chunk
    lanes = jax.lax.iota(jnp.int32, tiling.chunk)
    zero = pl.program_id(0) * 0

    def weights(chunk: int) -> list[Array]:
        found = []
        for half in range(call.halves):
            at = _block(inside + half * call.outputs, chunk * tiling.chunk + lanes)
            found.append(plgpu.load(refs["weight"].at[*at]))
        return found

    def inputs(chunk: int) -> tuple[list[Array], list[Array]]:
        """The rows' terms, times the norm's weight, and their squares; the same in every warp."""
        _, place = _block(outputs, chunk * tiling.chunk + lanes)
        terms = [plgpu.load(refs["x"].at[row + zero, place]).astype(jnp.float32) for row in range(call.rows)]
        if not call.normed:
            return terms, []
        scale = plgpu.load(refs["norm"].at[place])
        return [term * scale for term in terms], [term * term for term in terms]

    asked = [weights(chunk) for chunk in range(min(tiling.ahead, chunks))]
    sums: list[list[Any]] = [[0.0] * call.halves for _ in range(call.rows)]
    squares: list[Any] = [0.0] * call.rows
    for chunk in range(chunks):
        own = [weight.astype(jnp.float32) for weight in asked.pop(0)]
        if chunk + tiling.ahead < chunks:
            asked.append(weights(chunk + tiling.ahead))
        terms, square = inputs(chunk)
        for row, term in enumerate(terms):
            for half, weight in enumerate(own):
                sums[row][half] += weight * term
            if call.normed:
                squares[row] += square[row]
    found = [[jnp.sum(total, axis=1) for total in own] for own in sums]
    if not call.normed:
        return found
    means = [jnp.sum(square, axis=1) * (1.0 / call.depth) for square in squares]
    inverse = [jax.lax.rsqrt(mean + call.eps) for mean in means]
    return [[y * scale for y in own] for own, scale in zip(found, inverse, strict=True)]


def _program(call: Product, refs: dict[str, Any]) -> None:
    """One program."""
    outputs = columns(call)
    inside = jnp.minimum(outputs, call.outputs - 1)
    for row, found in enumerate(products(call, refs)):
        own_row = jnp.full_like(inside, row)
        result = _finish(call, refs, found, (own_row, inside))
        plgpu.store(refs["out"].at[own_row, outputs], result, mask=outputs < call.outputs)
