"""Live bytes of functions small enough to count by hand; every array is 1,000 float32, 4 kB."""

import jax
import jax.numpy as jnp
import pytest

from train.planning.liveness import live_bytes

N = 1000
ROW, SQUARE = jax.ShapeDtypeStruct((N,), jnp.float32), jax.ShapeDtypeStruct((N, N), jnp.float32)


def chain(x):
    return jnp.tanh(jnp.sin(x) + 1)


def called(x, w):
    """Products in calls are those of the caller; what dies inside is not held until they return."""
    inner = jax.jit(lambda x: w @ (w @ x))
    return jax.jit(lambda x: inner(inner(x)))(x)


def read_twice(x, w):
    y = jnp.sin(x)
    return w @ jnp.cos(y) + y


def summed(x):
    return jnp.sum(jnp.sin(x) * x)


def carried(x, w):
    return jax.lax.scan(lambda c, _: (w @ c, None), w @ x, length=3)[0]


def collected(x, w):
    """Of two stacks one is never read."""
    found = jax.lax.scan(lambda c, _: (w @ c, (c, jnp.sin(c))), x, length=5)[1]
    return jax.lax.scan(lambda c, y: (c + y[1], None), x, found)[0]


def placed(x, w):
    whole = jax.lax.empty((3, N), jnp.float32)
    for i in range(3):
        whole = jax.lax.dynamic_update_index_in_dim(whole, w @ x, i, 0)
    return whole


@pytest.mark.parametrize(
    ("function", "arrays"),
    [
        (chain, 1),  # the result
        (called, 2),  # one product and the next
        (read_twice, 3),  # y, its cosine and the product
        (summed, 1 / N),  # the sum
        (carried, 2),  # what is carried, and the new one
        (collected, 7),  # the stack that is read, what is carried and the new one
        (placed, 4),  # the whole and a part
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_live_bytes_are_those_counted_by_hand(function, arrays: float) -> None:
    arguments = (ROW, SQUARE)[: function.__code__.co_argcount]
    assert live_bytes(jax.make_jaxpr(function)(*arguments).jaxpr) == arrays * 4 * N
