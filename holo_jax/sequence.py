"""Bookkeeping of packed, continued and divided sequences: positions inside segments, shifted taps.

Where a sequence is divided over devices, a device goes on from what the ones before it leave: the last id and
position, and the last inputs that a convolution still needs. That is all that crosses a border of devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from holo_jax.array_types import Array, Bool, Float, Int, UInt32
from holo_jax.functional.varying import vary_together
from holo_jax.parallel import sequence_axis


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


def leading_padding(segment_ids: Int[Array, "b t"]) -> Int[Array, "b"]:
    """How many tokens with segment id 0 each row begins with; t if there are no others."""
    t = segment_ids.shape[1]
    index = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], segment_ids.shape)
    return jnp.min(jnp.where(segment_ids != 0, index, t), axis=1)


def with_tail(
    x: Float[Array, "b t f"],
    size: int,
    tail: Float[Array, "b k f"] | None = None,
    padding: Int[Array, "b"] | None = None,
) -> Float[Array, "b p f"]:
    """The ``size`` inputs before x (``tail``; zeros if None), then x: ``[b, size + t, f]``.

    A row whose first ``padding`` inputs are none has its tail right before its first real one.
    """
    b, _, f = x.shape
    before = jnp.zeros((b, size, f), x.dtype) if tail is None else tail.astype(x.dtype)
    past = jnp.concatenate([before, x], axis=1)
    if tail is None or padding is None:
        return past
    if x.shape[1] == 1:
        # One token: a choice between two orders, which fuses with what follows.
        return jnp.where((padding == 1)[:, None, None], jnp.concatenate([x, before], axis=1), past)
    move = jax.vmap(lambda row, own, start: lax.dynamic_update_slice_in_dim(row, own, start, axis=0))
    return move(past, before, padding)


def delayed(past: Float[Array, "b p f"], delay: int, inside: UInt32[Array, "b t"]) -> Float[Array, "b t f"]:
    """x_{t - delay} of ``past = with_tail(x, size >= delay, ...)``; 0 before a segment."""
    t = inside.shape[1]
    begin = past.shape[1] - t - delay
    x = past[:, begin : begin + t]
    return x if delay == 0 else jnp.where((inside >= delay)[..., None], x, jnp.zeros((), x.dtype))


def next_tail(past: Float[Array, "b p f"], size: int, inside: UInt32[Array, "b t"]) -> Float[Array, "b k f"]:
    """The last ``size`` inputs of the current segment, zeros where the segment is younger."""
    age = jnp.arange(size - 1, -1, -1, dtype=jnp.uint32)
    return jnp.where((inside[:, -1:] >= age[None])[..., None], past[:, -size:], jnp.zeros((), past.dtype))


def short_convolution(
    past: Float[Array, "b p f"], taps: Float[Array, "k f"], inside: UInt32[Array, "b t"]
) -> Float[Array, "b t f"]:
    """Causal depthwise convolution y_t = sum_j taps[k-1-j] x_{t-j}, within each segment.

    ``past = with_tail(x, k - 1, ...)``.
    """
    return short_convolutions(past, (taps,), inside)[0]


def short_convolutions(
    past: Float[Array, "b p f"], taps: tuple[Float[Array, "k f"], ...], inside: UInt32[Array, "b t"]
) -> tuple[Float[Array, "b t f"], ...]:
    """Several ``short_convolution`` of the same input, whose backward pass reads that input once.

    Reverse mode only. The gradients of all taps are one reduction with many results; compiled one by one
    they are passes over input and cotangent each.
    """
    past, taps, inside = vary_together((past, taps, inside))
    return _convolve(past, taps, inside)


@jax.custom_vjp
def _convolve(past: Array, taps: tuple[Array, ...], inside: Array) -> tuple[Array, ...]:
    k = taps[0].shape[0]
    shifted = [delayed(past, delay, inside) for delay in range(k)]
    results = []
    for own in taps:
        y = own[k - 1][None, None] * shifted[0]
        for delay in range(1, k):
            y = y + own[k - 1 - delay][None, None] * shifted[delay]
        results.append(y)
    return tuple(results)


def _convolve_fwd(past: Array, taps: tuple[Array, ...], inside: Array) -> tuple[tuple[Array, ...], Any]:
    return _convolve(past, taps, inside), (past, taps, inside)


def _convolve_bwd(saved: Any, cotangents: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...], None]:
    past, taps, inside = saved
    k, t = taps[0].shape[0], inside.shape[1]
    wide = jnp.promote_types(past.dtype, jnp.float32)
    shifted = [delayed(past, delay, inside).astype(wide) for delay in reversed(range(k))]
    products = [x * cotangent.astype(wide) for cotangent in cotangents for x in shifted]
    zero = jnp.zeros((), wide)
    sums = lax.reduce(
        products, [zero] * len(products), lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (0, 1)
    )
    d_taps = [jnp.stack(sums[i : i + k]).astype(taps[0].dtype) for i in range(0, len(sums), k)]
    d_past = jnp.zeros_like(past, wide)
    for delay in range(k):
        flow = sum(
            own[k - 1 - delay][None, None].astype(wide) * c for own, c in zip(taps, cotangents, strict=True)
        )
        flow = flow if delay == 0 else jnp.where((inside >= delay)[..., None], flow, zero)
        begin = past.shape[1] - t - delay
        d_past = d_past + lax.pad(flow, zero, ((0, 0, 0), (begin, delay, 0), (0, 0, 0)))
    return d_past.astype(past.dtype), tuple(d_taps), None


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def positions_in_segments(segment_ids: Int[Array, "b t"]) -> UInt32[Array, "b t"]:
    """Position of each token inside its segment; the ids may be a device's part of the sequence."""
    axis = sequence_axis()
    if axis is None:
        return segment_positions(segment_starts(segment_ids))
    first = lax.axis_index(axis) == 0
    starts = segment_starts(segment_ids, from_device_before(segment_ids[:, -1], axis))
    starts = starts.at[:, 0].set(starts[:, 0] | first)
    own = segment_positions(starts)
    # Of every device: whether a segment begins in it, and how far the last segment has come at its end.
    begins, length = lax.all_gather((jnp.any(starts, axis=1), own[:, -1] + 1), axis)

    def visit(carried: Array, item: tuple[Array, Array]) -> tuple[Array, Array]:
        has, reached = item
        return jnp.where(has, reached, carried + reached), carried

    _, offsets = lax.scan(visit, jnp.zeros_like(length[0]), (begins, length))
    return segment_positions(starts, offsets[lax.axis_index(axis)])


def from_device_before(x: Array, axis: str) -> Array:
    """``x`` of the device before along a mesh axis; zeros on the first."""
    return lax.ppermute(x, axis, [(i, i + 1) for i in range(lax.axis_size(axis) - 1)])


def tail_before(
    x: Float[Array, "b t f"], size: int, tail: Float[Array, "b k f"] | None
) -> Float[Array, "b k f"] | None:
    """The ``size`` inputs before x: ``tail``, or the last ones of the device before.

    Raises:
      ValueError: if a device has fewer inputs than that.
    """
    axis = sequence_axis()
    if axis is None:
        return tail
    if x.shape[1] < size:
        raise ValueError(f"a device has {x.shape[1]} tokens of each row; it must have at least {size}")
    received = from_device_before(x[:, -size:], axis)
    if tail is None:
        return received
    return jnp.where(lax.axis_index(axis) == 0, tail.astype(x.dtype), received)


def of_last_device(x: Array) -> Array:
    """``x`` of the device with the end of the sequence, on all that share it."""
    axis = sequence_axis()
    if axis is None:
        return x
    last = lax.axis_index(axis) == lax.axis_size(axis) - 1
    return lax.psum(jnp.where(last, x, jnp.zeros_like(x)), axis)
