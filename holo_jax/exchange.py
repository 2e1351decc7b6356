"""What the devices along one mesh axis send each other, and by which means; for use inside ``shard_map``.

``"collectives"`` are those of the compiler, on GPUs kernels of NCCL. They hold multiprocessors while they
send, so a product beside them that needs all of those in one go takes two. ``"copies"`` sends by all-to-alls,
gradients between two devices by permutations (which the compiler joins), and adds up what was received in a
pass of its own; a GPU's copy engines can do the sending (``train.compilation``). The bytes are the same.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from holo_jax.array_types import Array

TRANSPORTS = ("collectives", "copies")
REDUCE_DTYPES = ("float32", "bfloat16")
_ALIGNED = 128  # elements: what is copied begins on a border of a memory's lines
_SHORT = 2**18  # elements of an array worth a place of its own beside others


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How weights and gradients are sent.

    Attributes:
      reshard_after_forward: whether weights that were gathered over ``fsdp`` are dropped after the forward
        pass and gathered again (Rajbhandari et al., 2020, stage 3), or kept in the dtype of the products
        until the backward pass (stage 2). The name is PyTorch's (``fully_shard``).
      reduce_dtype: in which gradients are sent. ``"bfloat16"`` rounds what each device found, to 8 bits; by
        copies the sum is float32, by collectives it is rounded after every addition as well.
      transport: one of ``TRANSPORTS``.
      in_order: whether gradients over ``data`` alone are summed in an order of their own, those of each part
        of unrolled blocks while the part before it runs back (``holo_jax.ordered_sums.summed_meanwhile``).

    Raises:
      ValueError: for another dtype or transport.
    """

    reshard_after_forward: bool = True
    reduce_dtype: str = "float32"
    transport: str = "collectives"
    in_order: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("reduce_dtype", REDUCE_DTYPES), ("transport", TRANSPORTS)):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} is {value!r}; it must be {' or '.join(choices)}")


def all_gather(x: Array, axis: str, dimension: int, exchange: Exchange) -> Array:
    """The parts that all devices of ``axis`` hold, joined along ``dimension`` in their order."""
    if exchange.transport == "collectives":
        return lax.all_gather(x, axis, axis=dimension, tiled=True)
    count = lax.axis_size(axis)
    parts = lax.all_to_all(jnp.broadcast_to(x[None], (count, *x.shape)), axis, 0, 0, tiled=True)
    return _joined(parts, dimension)


def reduce_scatter(x: Array, axis: str, dimension: int, exchange: Exchange) -> Array:
    """This device's part along ``dimension`` of the sum over ``axis``, in the dtype of ``x``."""
    sent = _rounded(x, exchange.reduce_dtype)
    if exchange.transport == "collectives":
        return lax.psum_scatter(sent, axis, scatter_dimension=dimension, tiled=True).astype(x.dtype)
    return _own_part(sent, axis, dimension).astype(x.dtype)


def all_reduce(x: Array, axis: str, exchange: Exchange) -> Array:
    """The sum over ``axis`` in the dtype of ``x``, the same bits on every device.

    By copies two devices send each other all they have; more, one part after the other, and then the sums. By
    collectives where the first dimension does not divide.
    """
    sent, count = _rounded(x, exchange.reduce_dtype), lax.axis_size(axis)
    if exchange.transport == "collectives" or x.shape[0] % count:
        return lax.psum(sent, axis).astype(x.dtype)
    if count == 2:
        return (sent.astype(jnp.float32) + _other(sent, axis).astype(jnp.float32)).astype(x.dtype)
    part = _rounded(_own_part(sent, axis, 0), exchange.reduce_dtype)
    return all_gather(part, axis, 0, exchange).astype(x.dtype)


def side_by_side(arrays: Sequence[Array], count: int, exchange: Exchange) -> Array:
    """``[count, ...]``: the arrays one after the other as ``exchange`` sends them, in equal parts."""
    flat = [_rounded(arrays[i], exchange.reduce_dtype).reshape(-1) for i in _longest_first(arrays)]
    rest = -sum(x.size for x in flat) % (count * _ALIGNED)
    side = [x for x in flat if x.size >= _SHORT]
    if short := [x for x in flat if x.size < _SHORT] + [jnp.zeros(rest, flat[0].dtype)] * bool(rest):
        # Where XLA joins more than ten arrays it reads number by number, so it may not join all in one go.
        side.append(lax.optimization_barrier(jnp.concatenate(short)))
    return jnp.concatenate(side).reshape(count, -1)


def all_reduce_parts(parts: Array, axis: str, exchange: Exchange, after: Array) -> Array:
    """The sum over ``axis`` of ``[axis size, ...]``, which ``exchange`` sends by copies, flat.

    By two all-to-alls: each device receives its part from all, adds up in float32 once the number ``after``
    is known, rounds, and sends the sum to all, which so have the same bits. The first is sent beside what
    ends with that number, the second beside what follows.
    """
    received = lax.all_to_all(parts, axis, 0, 0, tiled=True)
    part = jnp.sum(received, axis=0, dtype=jnp.float32)
    part = _rounded(jnp.where(jnp.isnan(after), after, part), exchange.reduce_dtype)
    return lax.all_to_all(jnp.broadcast_to(part, parts.shape), axis, 0, 0, tiled=True).reshape(-1)


def apart(joined: Array, like: Sequence[jax.ShapeDtypeStruct]) -> tuple[Array, ...]:
    """The arrays that lie ``side_by_side`` in ``joined``, flat, by their shapes and dtypes."""
    order = _longest_first(like)
    ends = itertools.accumulate(like[i].size for i in order)
    found = {
        i: joined[end - like[i].size : end].reshape(like[i].shape).astype(like[i].dtype)
        for i, end in zip(order, ends, strict=True)
    }
    return tuple(found[i] for i in range(len(like)))


def _longest_first(arrays: Sequence[Any]) -> list[int]:
    return sorted(range(len(arrays)), key=lambda i: -arrays[i].size)


def _own_part(x: Array, axis: str, dimension: int) -> Array:
    """The sum over ``axis`` of this device's part, accumulated in float32."""
    count = lax.axis_size(axis)
    shape = list(x.shape)
    shape[dimension : dimension + 1] = [count, shape[dimension] // count]
    pieces = jnp.moveaxis(x.reshape(shape), dimension, 0)
    if count == 2:
        index = lax.axis_index(axis)
        own, other = (lax.dynamic_index_in_dim(pieces, i, keepdims=False) for i in (index, 1 - index))
        return own.astype(jnp.float32) + _other(other, axis).astype(jnp.float32)
    received = lax.all_to_all(pieces, axis, 0, 0, tiled=True)
    return jnp.sum(received, axis=0, dtype=jnp.float32)


def _other(x: Array, axis: str) -> Array:
    """What the other one of two devices holds."""
    return lax.ppermute(x, axis, ((0, 1), (1, 0)))


def _joined(parts: Array, dimension: int) -> Array:
    shape = list(parts.shape[1:])
    shape[dimension] *= parts.shape[0]
    return jnp.moveaxis(parts, 0, dimension).reshape(shape)


def _rounded(x: Array, dtype: str) -> Array:
    """``x`` in the dtype in which it is sent; a compiler may not skip the rounding."""
    if dtype == "bfloat16" and x.dtype == jnp.float32:
        x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)
