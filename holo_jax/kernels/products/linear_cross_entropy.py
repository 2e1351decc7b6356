"""The loss of an output projection: in chunks of plain JAX, or with its logits kept on chip on Hopper.

No logits reach memory. ``logit_exponentials`` writes ``E_ij = exp(l_ij - r_i)`` of a chunk's logits ``l`` in
bfloat16, with ``r`` the target's logit and ``_LEAD`` powers of two: never far above a row's normalizer. With
``o_i`` the sum of row i, which lacks its target's column, and ``s_i = 1 / (o_i + 2^-_LEAD)``

    loss_i = log(1 + 2^_LEAD o_i),    d_logits = s_i E_ij,    E_i,t_i set to -o_i;

so E is the gradient but for a factor of a row, which is applied to the result of one product of the backward
pass and to the hidden states that the other reads. A confident token's gradient is a sum, not a difference.
Where a token's loss exceeds 148 nats E overflows: the loss is infinite then, and gradients not finite.

Without gradients a kernel of jax-linear-attention (Apache-2.0, version 0.1.0,
https://github.com/jla-org/jax-linear-attention) finds maximum and sum of each tile, whatever their range.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from holo_jax.array_types import Array, Float, Int
from holo_jax.functional.cross_entropy import IGNORE, chunked_cross_entropy
from holo_jax.kernels.block import uses
from holo_jax.kernels.capability import partitioned
from holo_jax.kernels.hopper import backend as hopper
from holo_jax.kernels.products.logit_exponentials import COLUMNS, DEPTH, ROWS, exponentials
from holo_jax.ordered_sums import sums_alone
from holo_jax.parallel import DATA, layout, parameter_layout, sharded, tensor_axis, whole

# Exponentials reach from 2^-126 to 2^127: under the normalizer of a certain token 40 powers are left.
_LEAD = 86


def unsupported(hidden: Array, weights: Array, logits_dtype: str) -> str | None:
    """Why the kernels cannot run this call, or None."""
    reason = hopper.missing()
    if reason is not None:
        return reason
    if hidden.dtype != jnp.bfloat16:
        return f"hidden has dtype {hidden.dtype}; it must be bfloat16"
    if jnp.dtype(logits_dtype) != jnp.float32:
        return f"logits_dtype is {logits_dtype}; it must be float32"
    width, vocabulary = weights.shape
    if width % DEPTH or vocabulary > 2**24:
        return f"weights has shape {weights.shape}; it must be a multiple of {DEPTH} by at most 2^24"
    if tensor_axis() is not None:
        return "the vocabulary is divided over devices"
    if partitioned():
        return "the computation spans several devices; call it inside jax.shard_map"
    return None


def linear_cross_entropy(
    hidden: Float[Array, "b t e"],
    weights: Float[Array, "e v"] | Float[Array, "n e v"],
    targets: Int[Array, "b t"],
    *,
    chunk_tokens: int,
    logits_dtype: str = "float32",
    backend: str = "auto",
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """``functional.cross_entropy.chunked_cross_entropy`` by the fastest form this machine can run.

    On a mesh each device visits its own tokens and its part of the vocabulary; hidden states stay in place.

    Args:
      weights: as there, or once a device (``holo_jax.ordered_sums.summed_meanwhile``).
      chunk_tokens: about how many tokens have logits at one time, on each device.
      backend: ``"portable"``, or another ``block_backend`` for the kernels where they can run.
    """

    axes, each = ("embed", "vocab"), weights.ndim == 3

    def own(hidden: Array, weights: Array, targets: Array) -> Array:
        weights = whole(weights[0] if each else weights, axes, hidden.dtype)
        if uses(backend, "products") and unsupported(hidden, weights, logits_dtype) is None:
            rows = hidden.reshape(-1, hidden.shape[-1])
            return _summed(rows, weights, targets.reshape(-1), chunk_tokens).reshape(1, 1)
        total, _ = chunked_cross_entropy(
            hidden, weights, targets, chunk_tokens=chunk_tokens, logits_dtype=logits_dtype
        )
        return total.reshape(1, 1)

    at = P(DATA) if each else parameter_layout(axes)
    every = sharded(own, (layout("b t"), at, layout("b t")), layout("b t"))
    count = jnp.sum(targets != IGNORE)
    if sums_alone():
        # Nobody reads it before the end of a step: its sum over devices would hold up others until then.
        targets, count = lax.optimization_barrier((targets, count))
    return jnp.sum(every(hidden, weights, targets)), count


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summed(hidden: Array, weights: Array, targets: Array, chunk: int) -> Array:
    """Summed nats of rows ``[n, e]`` by the kernels; the gradient is formed on the way forward.

    Differentiated, it is infinite where a token's loss exceeds 148 nats.
    """
    from jla.ops.mosaic_gpu.linear_cross_entropy import objective_sums

    counted = targets != IGNORE
    found = objective_sums(
        hidden,
        weights.astype(hidden.dtype).T,
        jnp.where(counted, targets, 0),
        counted,
        label_smoothing=0.0,
        z_loss_weight=0.0,
        row_chunk=chunk,
        compute_dtype=hidden.dtype,
    )
    return found[0]


def _summed_forward(hidden: Array, weights: Array, targets: Array, chunk: int) -> tuple[Array, Any]:
    n, v = hidden.shape[0], weights.shape[1]
    hidden = jnp.pad(hidden, ((0, -n % ROWS), (0, 0)))
    targets = jnp.pad(targets, (0, -n % ROWS), constant_values=IGNORE)
    table = jnp.pad(weights.astype(hidden.dtype).T, ((0, -v % COLUMNS), (0, 0)))
    counted = targets != IGNORE
    targets = jnp.where(counted, targets, 0).astype(jnp.int32)
    reference = _references(hidden, table, targets, counted)
    step = min(chunk + -chunk % ROWS, hidden.shape[0])
    total, d_weights = jnp.zeros((), jnp.float32), None
    d_hidden: list[Array] = []
    shares: list[Array] = []
    for start in range(0, hidden.shape[0], step):
        if d_hidden:
            # Chunks do not depend on each other; the gradient of one's logits is to be alive at a time.
            hidden, d_weights, d_hidden[-1] = lax.optimization_barrier((hidden, d_weights, d_hidden[-1]))
        rows, own, over = (x[start : start + step] for x in (hidden, targets, reference))
        found, sums = exponentials(rows, table, over, own, vocabulary=v)
        others = jnp.sum(sums, axis=0)
        total += jnp.sum(jnp.logaddexp(jnp.log(others) + _LEAD * math.log(2), 0.0))
        # Written where it lies. An ignored row's exponentials are all 0, and so is what its target is set to.
        found = found.at[jnp.arange(own.size), own].set(
            -others.astype(found.dtype),
            unique_indices=True,
            indices_are_sorted=True,
            mode="promise_in_bounds",
        )
        shares.append(1.0 / (others + 2.0**-_LEAD))
        scaled = (rows.astype(jnp.float32) * shares[-1][:, None]).astype(rows.dtype)
        d_hidden.append(jnp.matmul(found, table, preferred_element_type=jnp.float32))
        part = lax.dot_general(scaled, found, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        d_weights = part if d_weights is None else d_weights + part
    assert d_weights is not None
    dtypes = (jnp.zeros((0,), hidden.dtype), jnp.zeros((0,), weights.dtype))
    of_rows = (jnp.concatenate(parts)[:n] for parts in (d_hidden, shares))
    return total, (*of_rows, d_weights[:, :v], dtypes)


def _references(hidden: Array, table: Array, targets: Array, counted: Array) -> Array:
    """Of rows ``[n]``, in powers of two: target logits and ``_LEAD``; the end of float32 where ignored."""
    own = table.at[targets].get(mode="promise_in_bounds")
    logits = jnp.sum(hidden.astype(jnp.float32) * own.astype(jnp.float32), axis=1)
    return jnp.where(counted, logits * math.log2(math.e) + _LEAD, jnp.finfo(jnp.float32).max)


def _summed_backward(chunk: int, saved: Any, cotangent: Array) -> tuple[Array, Array, None]:
    d_hidden, shares, d_weights, dtypes = saved
    gradients = d_hidden * shares[:, None], d_weights
    scaled = ((g * cotangent).astype(like.dtype) for g, like in zip(gradients, dtypes, strict=True))
    return *scaled, None  # type: ignore[return-value]


_summed.defvjp(_summed_forward, _summed_backward)
