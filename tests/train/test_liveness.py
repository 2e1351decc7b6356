"""Live bytes of functions small enough to count by hand; every array is 1,000 float32, 4 kB."""

import jax
import jax.numpy as jnp
import pytest

from train.planning.liveness import live_bytes
from train.planning.packing import Interval, packed_bytes

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


def summed_products(x, w):
    """A product that is added to what nothing else reads goes where that is."""
    y = w @ x
    return y + w @ y


def cut(x, w):
    """A product reads a piece of an array where it lies."""
    return w[: N // 2] @ x


def filled_twice(x, w):
    """Stacks of two loops that begin as the same zeros; the first is read before the second loop."""

    def stack(y):
        return jnp.sum(jax.lax.scan(lambda c, _: (c, w @ c), y, length=5)[1], 0)

    return stack(jnp.sin(stack(x)))


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(
    ("function", "arrays"),
    [
        (chain, 1),  # the result
        (called, 2),  # one product and the next
        (summed, 1 / N),  # the sum
        (carried, 2),  # what is carried, and the new one
        (collected, 7),  # the stack that is read, what is carried and the new one
        (placed, 4),  # the whole and a part
        (summed_products, 2),  # both products, the sum in the place of one
        (cut, 1 / 2),  # the product
        (filled_twice, 11),  # both stacks, and what the first loop carries
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_live_bytes_are_those_counted_by_hand(function, arrays: float, gpu: bool) -> None:
    arguments = (ROW, SQUARE)[: function.__code__.co_argcount]
    assert live_bytes(jax.make_jaxpr(function)(*arguments).jaxpr, gpu=gpu) == arrays * 4 * N


def gated(x, w):
    """The logistic and the gate of a product are made again in each step that reads them."""
    y = w @ x
    gate = y * jax.nn.sigmoid(y)
    return w @ (gate * x), y + gate


def exchanged(x, w):
    """What only a result needs waits for a loop that exchanges."""
    y = w @ x
    apart = w @ jnp.sin(y)
    return jax.lax.scan(lambda c, _: (w @ jax.lax.psum(c, "seq"), None), jnp.cos(x), length=3)[0], apart


def computed_again(x, w):
    """What the second loop computes again and sends is there before what lies between the two."""

    def sent(c):
        return jax.lax.ppermute(c, "seq", [(0, 1)])

    kept = jax.lax.scan(lambda c, _: (w @ sent(c), c), x, length=5)[1]
    between = jax.lax.scan(lambda c, _: (c, w @ c), kept[4], length=20)[1]

    def back(g, c):
        made = w @ c
        return w @ (g * sent(made)) + made, None

    return jax.lax.scan(back, jnp.sum(between, 0), kept)[0]


@pytest.mark.parametrize(
    ("function", "traced", "arrays"),
    [
        (read_twice, 3, 2),  # y, its cosine and the product; the sine of an argument is made again
        (gated, 4, 3),  # the product, what is multiplied by and its product; the gate, as traced
        (exchanged, 4, 3),  # a product beside the loop's three; or results and the sine
        (computed_again, 26, 28),  # what is kept, the stack and a product; what is sent and what comes
    ],
)
def test_a_gpu_makes_again_and_moves(function, traced: float, arrays: float) -> None:
    jaxpr = jax.make_jaxpr(function, axis_env=[("seq", 2)])(ROW, SQUARE).jaxpr
    assert live_bytes(jaxpr, gpu=False) == traced * 4 * N
    assert live_bytes(jaxpr, gpu=True) == arrays * 4 * N


def test_arrays_are_placed_into_gaps_largest_first() -> None:
    """Two of 3 do not meet; each of 2 meets one of them, and the other of 2."""
    found = [Interval(4, 4, 3), Interval(2, 4, 2), Interval(0, 3, 2), Interval(1, 1, 3)]
    assert packed_bytes(found) == 7, "no more than 5 are there at one time"
    assert packed_bytes(found[:2]) == 5
    assert packed_bytes([]) == 0
