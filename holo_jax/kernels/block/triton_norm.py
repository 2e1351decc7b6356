"""Kernels of norms over rows, which read what they need once (Pallas, lowered to Triton).

The forward pass may add a branch to the residual stream on the way; the backward pass adds the gradient of
the stream and may write the normed rows once more, so that nobody has to keep them. Arithmetic is float32.
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
    norm: Norm, x: Array, delta: Array | None, scale: Array, bias: Array | None
) -> tuple[Array, Array]:
    """(x + delta, its norm), ``[n, e]`` in the dtype of x; x itself without ``delta``."""
    n, e = x.shape
    rows = rows_of(n, e, _TILE)
    given = {"x": x, "delta": delta, "scale": scale, "bias": bias}
    inputs = {name: array for name, array in given.items() if array is not None}

    def kernel(ins: dict[str, Any], outs: dict[str, Any]) -> None:
        total = ins["x"][...]
        if delta is not None:
            total = (total.astype(jnp.float32) + ins["delta"][...].astype(jnp.float32)).astype(x.dtype)
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
) -> tuple[Array, Array | None, Array, Array | None]:
    """Gradients, given the gradient of the normed rows as a sum of ``parts``.

    Returns:
      (gradient of the sum, the normed rows if ``again``, gradients of ``scale`` and ``bias`` in float32).
    """
    n, e = total.shape
    programs = _PROGRAMS
    while programs > 1 and (n % programs or n // programs < _LEAST_ROWS):
        programs //= 2
    each = n // programs
    rows = rows_of(each, e, _BACKWARD_TILE)
    inputs: dict[str, Any] = {"total": total, "parts": parts, "scale": scale}
    inputs |= {name: x for name, x in (("d_total", d_total), ("bias", bias)) if x is not None}

    def kernel(ins: dict[str, Any], outs: dict[str, Any]) -> None:
        weight = ins["scale"][...].astype(jnp.float32)[None]
        read = [ins["total"], *ins["parts"], *([] if d_total is None else [ins["d_total"]])]
        tiles = each // rows

        def load(index: Array) -> tuple[Array, ...]:
            at = (pl.ds(index * rows, rows), slice(None))
            return tuple(ref[at] for ref in read)

        def step(index: Array, carry: tuple[tuple[Array, ...], tuple[Array, ...]]) -> Any:
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
            added = (cotangent * own, cotangent)
            return loaded, tuple(s + a for s, a in zip(sums, added, strict=False))

        # Summed over rows once: a sum over the rows of a tile makes its warps wait for one another.
        count = 1 if bias is None else 2
        begin = load(jnp.int32(0)), (jnp.zeros((rows, e), jnp.float32),) * count
        _, sums = jax.lax.fori_loop(0, tiles, step, begin)
        for name, total_of in zip(("d_scale", "d_bias"), sums, strict=False):
            outs[name][...] = jnp.sum(total_of, axis=0)[None]

    tile = pl.BlockSpec((each, e), lambda i: (i, 0))
    row = pl.BlockSpec((1, e), lambda i: (i, 0))
    whole = pl.BlockSpec((e,), lambda i: (0,))
    shapes = {"d_total": jax.ShapeDtypeStruct((n, e), total.dtype)}
    if again:
        shapes["normed"] = shapes["d_total"]
    for name in ("d_scale",) if bias is None else ("d_scale", "d_bias"):
        shapes[name] = jax.ShapeDtypeStruct((programs, e), jnp.float32)
    found = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(programs,),
        in_specs=(jax.tree.map(lambda array: tile if array.ndim == 2 else whole, inputs),),
        out_specs={name: tile if name in ("d_total", "normed") else row for name in shapes},
        compiler_params=parameters(norm, _BACKWARD_WARPS[norm.centered]),
        interpret=norm.interpret,
        name="norm_backward",
    )(inputs)
    sums = {name: jnp.sum(found[name], axis=0) for name in found if name in ("d_scale", "d_bias")}
    return found["d_total"], found.get("normed"), sums["d_scale"], sums.get("d_bias")


def parameters(norm: Norm, warps: int = _WARPS) -> Any:
    """How the compiler is to lay out a program."""
    return None if norm.interpret else plgpu.CompilerParams(num_warps=warps, num_stages=1)
