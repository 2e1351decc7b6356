"""Cross-entropy over a large vocabulary without ever holding all logits.

For hidden states h_i, output matrix W and targets y_i the summed loss is
``sum_i w_i (logsumexp(h_i W) - (h_i W)[y_i])``. The tokens are visited in chunks of time; the
gradient ``(softmax(h_i W) - onehot(y_i)) w_i`` of a chunk is formed while its logits exist, so the
logits are computed once and never stored.

Where the vocabulary is divided over devices (``holo_jax.parallel.tensor_axis``), normalizers and target
logits are summed over its parts.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from holo_jax.array_types import Array, Bool, Float, Int
from holo_jax.parallel import layout, sequence_axis, sharded, tensor_axis

IGNORE = -100


def next_token_targets(
    labels: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None = None
) -> Int[Array, "b t"]:
    """Targets of each position: the label one step later, ``IGNORE`` where there is none to predict.

    Ignored are the last position, labels equal to ``IGNORE``, and, with ``segment_ids``, targets in
    another segment than their input and targets in segment 0 (padding).
    """
    return sharded(_targets, layout("b t"), layout("b t"))(labels, segment_ids)


def _targets(labels: Array, segment_ids: Array | None) -> Array:
    targets = _following(labels, IGNORE)
    if segment_ids is None:
        return targets
    following = _following(segment_ids, 0)
    return jnp.where((following == segment_ids) & (following != 0), targets, IGNORE)


def _following(x: Array, end: int) -> Array:
    """``x`` one position later, ``end`` after the last one; x may be a device's part of the sequence."""
    after, axis = jnp.full_like(x[:, :1], end), sequence_axis()
    if axis is not None:
        count = lax.axis_size(axis)
        received = lax.ppermute(x[:, :1], axis, [(i + 1, i) for i in range(count - 1)])
        after = jnp.where(lax.axis_index(axis) == count - 1, after, received)
    return jnp.concatenate([x[:, 1:], after], axis=1)


def _chunk_terms(
    hidden: Float[Array, "b c e"], weights: Float[Array, "e v"], targets: Int[Array, "b c"], logits_dtype: str
) -> tuple[Float[Array, "b c"], Float[Array, "b c v"], Float[Array, "b c"], Bool[Array, "b c v"]]:
    """Loss, logits, normalizer and which logit is the target; v may be a device's part of the vocabulary."""
    logits = jnp.einsum("bce,ev->bcv", hidden, weights, preferred_element_type=jnp.dtype(logits_dtype))
    own, axis = targets, tensor_axis()
    if axis is None:
        normalizer = jax.nn.logsumexp(logits, axis=-1)
    else:
        own = jnp.where(targets == IGNORE, IGNORE, targets - lax.axis_index(axis) * logits.shape[-1])
        largest = lax.pmax(jnp.max(logits, axis=-1), axis)
        summed = lax.psum(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1), axis)
        normalizer = largest + jnp.log(summed)
    here = (own >= 0) & (own < logits.shape[-1])
    index = jnp.where(here, own, 0)[..., None]
    picked = jnp.where(here, jnp.take_along_axis(logits, index, axis=-1)[..., 0], 0)
    if axis is not None:
        picked = lax.psum(picked, axis)
    target = lax.broadcasted_iota(own.dtype, logits.shape, 2) == own[..., None]
    return jnp.where(targets != IGNORE, normalizer - picked, 0), logits, normalizer, target


def _rows(array: Float[Array, "b c d"]) -> Float[Array, "n d"]:
    return array.reshape(-1, array.shape[-1])


def _split(array: Array, chunk: int, fill: int = 0) -> Array:
    pad = -array.shape[1] % chunk
    widths = [(0, 0), (0, pad)] + [(0, 0)] * (array.ndim - 2)
    padded = jnp.pad(array, widths, constant_values=fill)
    b, t = padded.shape[:2]
    return jnp.moveaxis(padded.reshape(b, t // chunk, chunk, *array.shape[2:]), 1, 0)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _summed(hidden: Array, weights: Array, targets: Array, chunk: int, logits_dtype: str) -> Array:
    stored = weights.astype(hidden.dtype)

    def body(total: Array, xs: tuple[Array, Array]) -> tuple[Array, None]:
        loss, *_ = _chunk_terms(xs[0], stored, xs[1], logits_dtype)
        return total + jnp.sum(loss), None

    zero = jnp.zeros((), jnp.dtype(logits_dtype))
    return lax.scan(body, zero, (_split(hidden, chunk), _split(targets, chunk, IGNORE)))[0]


def _summed_fwd(
    hidden: Array, weights: Array, targets: Array, chunk: int, logits_dtype: str
) -> tuple[Array, tuple[Array, Array]]:
    stored = weights.astype(hidden.dtype)

    def body(carry: tuple[Array, Array], xs: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        total, d_weights = carry
        loss, logits, normalizer, target = _chunk_terms(xs[0], stored, xs[1], logits_dtype)
        residual = jnp.exp(logits - normalizer[..., None]) - target
        d_logits = jnp.where((xs[1] != IGNORE)[..., None], residual, 0).astype(hidden.dtype)
        d_hidden = jnp.einsum("bcv,ev->bce", d_logits, stored)
        # One axis of tokens: with two, XLA has no product on CPUs for the gradient of a transposed table.
        d_weights = d_weights + jnp.einsum(
            "ne,nv->ev", _rows(xs[0]), _rows(d_logits), preferred_element_type=d_weights.dtype
        )
        return (total + jnp.sum(loss), d_weights), d_hidden

    dtype = jnp.dtype(logits_dtype)
    carry = (jnp.zeros((), dtype), jnp.zeros(weights.shape, dtype))
    (total, d_weights), d_hidden = lax.scan(
        body, carry, (_split(hidden, chunk), _split(targets, chunk, IGNORE))
    )
    b, t, e = hidden.shape
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(b, -1, e)[:, :t]
    return total, (d_hidden, d_weights.astype(weights.dtype))


def _summed_bwd(
    chunk: int, logits_dtype: str, saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array, None]:
    d_hidden, d_weights = saved
    axis = tensor_axis()
    if axis is not None:
        # Every part of the vocabulary holds the same loss: its cotangent is what all of them received.
        cotangent = lax.psum(cotangent, axis)
    return d_hidden * cotangent.astype(d_hidden.dtype), d_weights * cotangent.astype(d_weights.dtype), None


_summed.defvjp(_summed_fwd, _summed_bwd)


def chunked_cross_entropy(
    hidden: Float[Array, "b t e"],
    weights: Float[Array, "e v"],
    targets: Int[Array, "b t"],
    *,
    chunk_tokens: int,
    logits_dtype: str = "float32",
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed next-token loss and the number of targets counted.

    Args:
      hidden: final hidden states, storage dtype.
      weights: output matrix, float32 masters; products run in the dtype of ``hidden``, the gradient
        is accumulated and returned in float32. Where ``tensor_axis`` is manual, this device's columns.
      targets: see ``next_token_targets``; ``IGNORE`` counts nothing.
      chunk_tokens: about how many tokens have logits at one time.
      logits_dtype: dtype of logits and loss.

    Returns:
      (sum of nats over counted targets, number of counted targets).
    """
    b, t, _ = hidden.shape
    chunk = min(t, max(1, chunk_tokens // b))
    total = _summed(hidden, weights, targets, chunk, logits_dtype)
    return total, jnp.sum(targets != IGNORE)


def token_losses(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"]
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """Loss in nats of each position (0 where ignored) and which positions count."""
    valid = targets != IGNORE
    picked = jnp.take_along_axis(logits, jnp.where(valid, targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - picked, 0), valid
