"""Kernels over heads: norm and gate of a retrieval, factors of values (Pallas, lowered to Triton).

A program takes one head of a stretch of tokens. A retrieval gets an RMSNorm a head, then a silu gate; its
backward pass writes the gated values once more, so that nobody has to keep them for the gradient of the map
they go into. Arithmetic is float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.array_types import Array
from holo_jax.kernels.block.triton_norm import Norm, parameters, standard

# Rows of a tile; forwards a program takes one, as nothing is summed over tokens.
_ROWS = 16
_SCALE_ROWS, _SCALE_TOKENS = 32, 256
# Tokens of a program of the gradient, by whether values have factors.
_BACKWARD_TOKENS = {True: 1024, False: 512}


def tokens_of(count: int, most: int) -> int:
    """Tokens of a program: the largest power of two up to ``most`` that divides all tokens."""
    tokens = most
    while count % tokens:
        tokens //= 2
    return tokens


def _load(inputs: dict[str, Any], at: Any) -> dict[str, Array]:
    """What rows of a head need of the inputs but the weight."""
    found = {name: ref[at] for name, ref in inputs.items() if name not in ("factors", "weight")}
    return found | ({"factors": inputs["factors"][at[0], 0]} if "factors" in inputs else {})


def _gated(loaded: dict[str, Array], norm: Norm, weight: Array) -> dict[str, Array]:
    values = loaded["values"].astype(jnp.float32)
    factor = loaded["factors"][:, None] if "factors" in loaded else None
    scaled = values if factor is None else values * factor
    normed, inverse = standard(norm, scaled)
    gate = loaded["gate"].astype(jnp.float32)
    share = jax.nn.sigmoid(gate)
    found = {"values": values, "normed": normed, "inverse": inverse, "gate": gate, "share": share}
    found |= {"product": normed * weight, "silu": gate * share}
    return found if factor is None else found | {"factor": factor}


def _specs(arrays: dict[str, Any], tokens: int, width: int) -> dict[str, Any]:
    tile = pl.BlockSpec((tokens, width), lambda i, j: (i, j))
    column = pl.BlockSpec((tokens, 1), lambda i, j: (i, j))
    head = pl.BlockSpec((1, width), lambda i, j: (j, 0))
    by_name = {"factors": column, "d_factors": column, "weight": head}
    return {name: by_name.get(name, tile) for name in arrays}


def forward(norm: Norm, inputs: dict[str, Array]) -> Array:
    """``silu(gate) * RMSNorm(values * factors) * weight``, ``[n, h d]`` in the dtype of the values.

    Args:
      norm: epsilon.
      inputs: ``values`` and ``gate`` ``[n, h d]``, ``weight`` ``[h, d]`` and maybe ``factors`` ``[n, h]``.
    """
    values = inputs["values"]
    n, (heads, width) = values.shape[0], inputs["weight"].shape
    tokens = tokens_of(n, _ROWS)

    def kernel(ins: dict[str, Any], out: Any) -> None:
        at = (slice(None), slice(None))
        found = _gated(_load(ins, at), norm, ins["weight"][0, :].astype(jnp.float32)[None])
        out[at] = (found["silu"] * found["product"]).astype(values.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(values.shape, values.dtype),
        grid=(n // tokens, heads),
        in_specs=(_specs(inputs, tokens, width),),
        out_specs=pl.BlockSpec((tokens, width), lambda i, j: (i, j)),
        compiler_params=parameters(norm),
        interpret=norm.interpret,
        name="gated_norm_forward",
    )(inputs)


def backward(norm: Norm, inputs: dict[str, Array], cotangent: Array) -> dict[str, Array]:
    """Gradients by name of input (``d_values`` and so on), and ``gated``, the output once more."""
    values = inputs["values"]
    n, (heads, width) = values.shape[0], inputs["weight"].shape
    tokens = tokens_of(n, _BACKWARD_TOKENS["factors" in inputs])
    rows = min(_ROWS, tokens)
    tiles = tokens // rows
    arrays = inputs | {"cotangent": cotangent}

    def kernel(ins: dict[str, Any], outs: dict[str, Any]) -> None:
        weight = ins["weight"][0, :].astype(jnp.float32)[None]

        def load(index: Array) -> dict[str, Array]:
            return _load(ins, (pl.ds(index * rows, rows), slice(None)))

        def step(index: Array, carry: tuple[dict[str, Array], Array]) -> Any:
            here, total = carry
            at = (pl.ds(index * rows, rows), slice(None))
            # No read passes a store, so the next tile's are asked for before this one's.
            following = load(jnp.minimum(index + 1, tiles - 1))
            found = _gated(here, norm, weight)
            pull = here["cotangent"].astype(jnp.float32)
            silu, share, normed = found["silu"], found["share"], found["normed"]
            outs["gated"][at] = (silu * found["product"]).astype(values.dtype)
            slope = share * (1.0 + found["gate"] * (1.0 - share))
            outs["d_gate"][at] = (pull * found["product"] * slope).astype(values.dtype)
            pull = pull * silu
            total = total + pull * normed
            pull = pull * weight
            pull = found["inverse"] * (pull - normed * jnp.mean(pull * normed, axis=1, keepdims=True))
            if "factor" in found:
                outs["d_factors"][at[0], 0] = jnp.sum(pull * found["values"], axis=1)
                pull = pull * found["factor"]
            outs["d_values"][at] = pull.astype(values.dtype)
            return following, total

        begin = load(jnp.int32(0)), jnp.zeros((rows, width), jnp.float32)
        _, total = jax.lax.fori_loop(0, tiles, step, begin)
        outs["d_weight"][0, 0, :] = jnp.sum(total, axis=0)

    whole = jax.ShapeDtypeStruct(values.shape, values.dtype)
    shapes = dict.fromkeys(("gated", "d_values", "d_gate"), whole)
    if "factors" in inputs:
        shapes["d_factors"] = jax.ShapeDtypeStruct((n, heads), jnp.float32)
    specs = _specs(shapes, tokens, width)
    shapes["d_weight"] = jax.ShapeDtypeStruct((n // tokens, heads, width), jnp.float32)
    specs["d_weight"] = pl.BlockSpec((1, 1, width), lambda i, j: (i, j, 0))
    found = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(n // tokens, heads),
        in_specs=(_specs(arrays, tokens, width),),
        out_specs=specs,
        compiler_params=parameters(norm),
        interpret=norm.interpret,
        name="gated_norm_backward",
    )(arrays)
    return found | {"d_weight": jnp.sum(found["d_weight"], axis=0)}


def scale_backward(
    scaled: Array, factors: Array, cotangent: Array, *, interpret: bool
) -> tuple[Array, Array]:
    """Gradients of values and of float32 factors ``[n, h]``, from their product ``[n, h d]`` and its own."""
    (n, heads), width = factors.shape, scaled.shape[1] // factors.shape[1]
    tokens = tokens_of(n, _SCALE_TOKENS)
    rows = min(_SCALE_ROWS, tokens)
    inputs = {"scaled": scaled, "factors": factors, "cotangent": cotangent}

    def scale_heads_backward(ins: dict[str, Any], outs: dict[str, Any]) -> None:
        def step(index: Array, _: None) -> None:
            at = (pl.ds(index * rows, rows), slice(None))
            given = ins["cotangent"][at].astype(jnp.float32)
            factors = ins["factors"][at[0], 0]
            outs["d_values"][at] = (given * factors[:, None]).astype(scaled.dtype)
            product = jnp.sum(given * ins["scaled"][at].astype(jnp.float32), axis=1)
            none = factors == 0.0
            outs["d_factors"][at[0], 0] = jnp.where(none, 0.0, product / jnp.where(none, 1.0, factors))

        jax.lax.fori_loop(0, tokens // rows, step, None)

    shapes = {
        "d_values": jax.ShapeDtypeStruct(scaled.shape, scaled.dtype),
        "d_factors": jax.ShapeDtypeStruct((n, heads), jnp.float32),
    }
    found = pl.pallas_call(
        scale_heads_backward,
        out_shape=shapes,
        grid=(n // tokens, heads),
        in_specs=(_specs(inputs, tokens, width),),
        out_specs=_specs(shapes, tokens, width),
        compiler_params=parameters(Norm(0.0, False, interpret)),
        interpret=interpret,
        name="scale_heads_backward",
    )(inputs)
    return found["d_values"], found["d_factors"]
