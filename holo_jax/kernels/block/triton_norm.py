"""Kernels of norms over rows, which read what they need once (Pallas, lowered to Triton).

The forward pass may add a branch to the residual stream on the way, and an offset to the branch; the backward
pass adds the gradient of the stream and may write the normed rows once more, so that nobody has to keep them.
Arithmetic is float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array

# Numbers of a tile: 32 a thread and array, and half as many or fewer where there are more arrays.
_TILE, _BACKWARD_TILE = 4096, 2048
_PROGRAMS = 1024
_LEAST_ROWS = 16
_WARPS = 4
# Of LayerNorm's gradient, whose sums for two parameters take registers, and of RMSNorm's.
_BACKWARD_WARPS = {True: 4, False: 8}


class Norm(NamedTuple):
    """What is static about a norm.

    Attributes:
      eps: added to the mean square.
      centered: LayerNorm, with a bias, instead of RMSNorm.
      interpret: run in Pallas' interpreter, anywhere.
    """

    eps: float
    centered: bool
    interpret: bool = False


class Gradients(NamedTuple):
    """What the backward pass finds.

    Attributes:
      total: of ``x + (delta + offset)``, in its dtype.
      normed: the normed rows, or None.
      scale, bias, offset: sums over rows in float32; None of what there is not.
    """

    total: Array
    normed: Array | None
    scale: Array
    bias: Array | None
    offset: Array | None


def standard(norm: Norm, x: Array) -> tuple[Array, Array]:
    """(normalised rows, 1 / deviation ``[rows, 1]``) of float32 rows."""
    if norm.centered:
        x = x - jnp.mean(x, axis=1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + norm.eps)
    return x * inverse, inverse


def rows_of(count: int, width: int, numbers: int) -> int:
    """Rows of a tile of about so many numbers: a power of two that divides all rows."""
    rows = min(max(1, numbers // width), 32)
    while count % rows:
        rows //= 2
    return rows


def forward(
    norm: Norm,
    x: Array,
    delta: Array | None,
    scale: Array,
    bias: Array | None,
    offset: Array | None = None,
) -> tuple[Array, Array]:
    """(x + delta, its norm), ``[n, e]`` in the dtype of x; x itself without ``delta``.

    An ``offset`` ``[e]`` is added to every row of ``delta`` first, and rounded with it.
    """
    n, e = x.shape
    rows = rows_of(n, e, _TILE)
    given = {"x": x, "delta": delta, "scale": scale, "bias": bias, "offset": offset}
    inputs = {name: array for name, array in given.items() if array is not None}

    def kernel(ins: dict[str, Any], outs: dict[str, Any]) -> None:
        total = ins["x"][...]
        if delta is not None:
            added = ins["delta"][...]
            if offset is not None:
                vector = ins["offset"][...].astype(x.dtype).astype(jnp.float32)[None]
                added = (added.astype(jnp.float32) + vector).astype(x.dtype)
            total = (total.astype(jnp.float32) + added.astype(jnp.float32)).astype(x.dtype)
            outs["total"][...] = total
        normed, _ = standard(norm, total.astype(jnp.float32))
        normed = normed * ins["scale"][...].astype(jnp.float32)[None]
        if bias is not None:
            normed = normed + ins["bias"][...].astype(jnp.float32)[None]
        outs["normed"][...] = normed.astype(x.dtype)

    tile = pl.BlockSpec((rows, e), lambda i: (i, 0))
    whole = pl.BlockSpec((e,), lambda i: (0,))
    names = ("normed",) if delta is None else ("normed", "total")
    found = pl.pallas_call(
        kernel,
        out_shape={name: jax.ShapeDtypeStruct((n, e), x.dtype) for name in names},
        grid=(n // rows,),
        in_specs=({name: tile if array.ndim == 2 else whole for name, array in inputs.items()},),
        out_specs=dict.fromkeys(names, tile),
        compiler_params=parameters(norm),
        interpret=norm.interpret,
        name="norm_forward",
    )(inputs)
    return found.get("total", x), found["normed"]


def backward(
    norm: Norm,
    total: Array,
    d_total: Array | None,
    parts: tuple[Array, ...],
    scale: Array,
    bias: Array | None,
    *,
    again: bool,
    offset: bool = False,
) -> Gradients:
    """Gradients, given the gradient of the normed rows as a sum of ``parts``.

    Args:
      norm: as given to ``forward``.
      total: what the norm was of.
      d_total: its gradient from elsewhere, or None.
      parts: at least one.
      scale, bias: as given to ``forward``.
      again: whether to write the normed rows.
      offset: whether ``forward`` was given one.
    """
    n, e = total.shape
    programs = _PROGRAMS
    while programs > 1 and (n % programs or n // programs < _LEAST_ROWS):
        programs //= 2
    each = n // programs
    rows = rows_of(each, e, _BACKWARD_TILE)
    inputs: dict[str, Any] = {"total": total, "parts": parts, "scale": scale}
    inputs |= {name: x for name, x in (("d_total", d_total), ("bias", bias)) if x is not None}
    asked = {"d_scale": True, "d_bias": bias is not None, "d_offset": offset}
    summed = [name for name in asked if asked[name]]

    def kernel(ins: dict[str, Any], outs: dict[str, Any]) -> None:
        weight = ins["scale"][...].astype(jnp.float32)[None]
        read = [ins["total"], *ins["parts"], *([] if d_total is None else [ins["d_total"]])]
        tiles = each // rows

        def load(index: Array) -> tuple[Array, ...]:
            at = (pl.ds(index * rows, rows), slice(None))
            return tuple(ref[at] for ref in read)

        def step(index: Array, carry: tuple[tuple[Array, ...], dict[str, Array]]) -> Any:
            loaded, sums = carry
            at = (pl.ds(index * rows, rows), slice(None))
            x, *cotangents = (a.astype(jnp.float32) for a in loaded)
            # No read passes a store, so the next tile's are asked for before this one's.
            loaded = load(jnp.minimum(index + 1, tiles - 1))
            own, inverse = standard(norm, x)
            stream = None if d_total is None else cotangents.pop()
            cotangent = cotangents[0]
            for part in cotangents[1:]:
                cotangent = cotangent + part
            if again:
                normed = own * weight
                if bias is not None:
                    normed = normed + ins["bias"][...].astype(jnp.float32)[None]
                outs["normed"][at] = normed.astype(total.dtype)
            pull = cotangent * weight
            inside = pull - own * jnp.mean(pull * own, axis=1, keepdims=True)
            if norm.centered:
                inside = inside - jnp.mean(pull, axis=1, keepdims=True)
            gradient = inverse * inside
            if stream is not None:
                gradient = gradient + stream
            outs["d_total"][at] = gradient.astype(total.dtype)
            added = {"d_scale": cotangent * own, "d_bias": cotangent, "d_offset": gradient}
            return loaded, {name: sums[name] + added[name] for name in summed}

        # Summed over rows once: a sum over the rows of a tile makes its warps wait for one another.
        begin = load(jnp.int32(0)), dict.fromkeys(summed, jnp.zeros((rows, e), jnp.float32))
        _, sums = jax.lax.fori_loop(0, tiles, step, begin)
        for name in summed:
            outs[name][...] = jnp.sum(sums[name], axis=0)[None]

    tile = pl.BlockSpec((each, e), lambda i: (i, 0))
    row = pl.BlockSpec((1, e), lambda i: (i, 0))
    whole = pl.BlockSpec((e,), lambda i: (0,))
    shapes = {"d_total": jax.ShapeDtypeStruct((n, e), total.dtype)}
    if again:
        shapes["normed"] = shapes["d_total"]
    shapes |= dict.fromkeys(summed, jax.ShapeDtypeStruct((programs, e), jnp.float32))
    found = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(programs,),
        in_specs=(jax.tree.map(lambda array: tile if array.ndim == 2 else whole, inputs),),
        out_specs={name: row if name in summed else tile for name in shapes},
        compiler_params=parameters(norm, _BACKWARD_WARPS[norm.centered]),
        interpret=norm.interpret,
        name="norm_backward",
    )(inputs)
    sums = {name: jnp.sum(found[name], axis=0) for name in summed}
    return Gradients(
        found["d_total"], found.get("normed"), sums["d_scale"], sums.get("d_bias"), sums.get("d_offset")
    )


def parameters(norm: Norm, warps: int = _WARPS) -> Any:
    """How the compiler is to lay out a program."""
    return None if norm.interpret else plgpu.CompilerParams(num_warps=warps, num_stages=1)
