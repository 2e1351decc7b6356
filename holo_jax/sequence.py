"""Bookkeeping of packed and continued sequences: positions inside segments, shifted taps."""

import jax.numpy as jnp
from jax import lax

from holo_jax.array_types import Array, Bool, Float, Int, UInt32


def segment_starts(
    segment_ids: Int[Array, "b t"], previous: Int[Array, "b"] | None = None
) -> Bool[Array, "b t"]:
    """True where a segment begins; position 0 begins one unless ``previous`` has the same id."""
    if previous is None:
        first = jnp.ones_like(segment_ids[:, :1], bool)
    else:
        first = segment_ids[:, :1] != previous[:, None]
    return jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)


def segment_positions(
    starts: Bool[Array, "b t"], offset: UInt32[Array, "b"] | None = None
) -> UInt32[Array, "b t"]:
    """Position of each token inside its segment; a segment continued from before goes on at ``offset``."""
    t = starts.shape[1]
    index = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], starts.shape)
    begin = lax.cummax(jnp.where(starts, index, -1), axis=1)
    inside = (index - jnp.maximum(begin, 0)).astype(jnp.uint32)
    if offset is None:
        return inside
    return inside + jnp.where(begin < 0, offset[:, None], jnp.zeros((), jnp.uint32))


def delayed(
    x: Float[Array, "b t f"], delay: int, tail: Float[Array, "b k f"] | None, inside: UInt32[Array, "b t"]
) -> Float[Array, "b t f"]:
    """x_{t - delay}, taken from ``tail`` (the last k inputs before x) at the start, 0 before a segment."""
    if delay == 0:
        return x
    b, t, f = x.shape
    k = 0 if tail is None else tail.shape[1]
    before = jnp.zeros((b, delay, f), x.dtype) if tail is None else tail[:, k - delay :].astype(x.dtype)
    shifted = jnp.concatenate([before, x], axis=1)[:, :t]
    return jnp.where((inside >= delay)[..., None], shifted, jnp.zeros((), x.dtype))


def next_tail(
    x: Float[Array, "b t f"], size: int, tail: Float[Array, "b k f"] | None, inside: UInt32[Array, "b t"]
) -> Float[Array, "b k f"]:
    """The last ``size`` inputs of the current segment, zeros where the segment is younger."""
    b, _, f = x.shape
    before = jnp.zeros((b, size, f), x.dtype) if tail is None else tail.astype(x.dtype)
    last = jnp.concatenate([before, x], axis=1)[:, -size:]
    age = jnp.arange(size - 1, -1, -1, dtype=jnp.uint32)
    return jnp.where((inside[:, -1:] >= age[None])[..., None], last, jnp.zeros((), x.dtype))


def short_convolution(
    x: Float[Array, "b t f"],
    taps: Float[Array, "k f"],
    tail: Float[Array, "b j f"] | None,
    inside: UInt32[Array, "b t"],
) -> Float[Array, "b t f"]:
    """Causal depthwise convolution y_t = sum_j taps[k-1-j] x_{t-j}, within each segment."""
    k = taps.shape[0]
    y = taps[k - 1][None, None] * x
    for delay in range(1, k):
        y = y + taps[k - 1 - delay][None, None] * delayed(x, delay, tail, inside)
    return y
