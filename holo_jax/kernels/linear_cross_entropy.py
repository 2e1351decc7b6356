"""The loss of an output projection: in chunks of plain JAX, or with its logits kept on chip on Hopper.

The kernels of jax-linear-attention reduce each tile of float32 logits to maximum and sum in the epilogue of
the product and store ``exp(logit - maximum of the tile)`` in float16, from which one pass forms the gradient
that the two products of the backward pass read; no float32 logits reach memory.

Source: https://github.com/jla-org/jax-linear-attention (Apache-2.0), version 0.1.0.
"""

import jax.numpy as jnp

from holo_jax.array_types import Array, Float, Int
from holo_jax.functional.cross_entropy import IGNORE, chunked_cross_entropy
from holo_jax.kernels import hopper
from holo_jax.kernels.block import uses
from holo_jax.kernels.capability import partitioned
from holo_jax.parallel import layout, parameter_layout, sharded, tensor_axis, whole

_DEPTH = 64


def unsupported(hidden: Array, weights: Array, logits_dtype: str) -> str | None:
    """Why the kernels cannot run this call, or None."""
    reason = hopper.missing()
    if reason is not None:
        return reason
    if hidden.dtype not in (jnp.bfloat16, jnp.float16):
        return f"hidden has dtype {hidden.dtype}; it must be bfloat16 or float16"
    if jnp.dtype(logits_dtype) != jnp.float32:
        return f"logits_dtype is {logits_dtype}; it must be float32"
    width, vocabulary = weights.shape
    if width % _DEPTH or vocabulary > 2**24:
        return f"weights has shape {weights.shape}; it must be a multiple of {_DEPTH} by at most 2^24"
    if tensor_axis() is not None:
        return "the vocabulary is divided over devices"
    if partitioned():
        return "the computation spans several devices; call it inside jax.shard_map"
    return None


def linear_cross_entropy(
    hidden: Float[Array, "b t e"],
    weights: Float[Array, "e v"],
    targets: Int[Array, "b t"],
    *,
    chunk_tokens: int,
    logits_dtype: str = "float32",
    backend: str = "auto",
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """``functional.cross_entropy.chunked_cross_entropy`` by the fastest form this machine can run.

    On a mesh each device visits its own tokens and its part of the vocabulary; hidden states stay in place.

    Args:
      chunk_tokens: about how many tokens have logits at one time, on each device.
      backend: ``"portable"``, or another ``block_backend`` for the kernels where they can run.
    """

    axes = ("embed", "vocab")

    def own(hidden: Array, weights: Array, targets: Array) -> Array:
        weights = whole(weights, axes, hidden.dtype)
        if uses(backend, "products") and unsupported(hidden, weights, logits_dtype) is None:
            from jla.ops.cross_entropy import linear_cross_entropy_objective

            found = linear_cross_entropy_objective(
                hidden.reshape(-1, hidden.shape[-1]),
                weights.T,
                targets.reshape(-1),
                ignore_index=IGNORE,
                row_chunk=chunk_tokens,
                compute_dtype=hidden.dtype,
                impl="mosaic_gpu",
            )
            return found.objective_sum.reshape(1, 1)
        total, _ = chunked_cross_entropy(
            hidden, weights, targets, chunk_tokens=chunk_tokens, logits_dtype=logits_dtype
        )
        return total.reshape(1, 1)

    every = sharded(own, (layout("b t"), parameter_layout(axes), layout("b t")), layout("b t"))
    return jnp.sum(every(hidden, weights, targets)), jnp.sum(targets != IGNORE)
