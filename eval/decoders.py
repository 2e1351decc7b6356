"""Associative recall as regression: how small is the error of a read-out, linear or with an MLP?

Protocol. A value is a vector x of R^channels with unit variance: one of ``words`` fixed Gaussian vectors
("codebook", as token embeddings are), or a fresh Gaussian vector ("gaussian": nothing but the memory knows
it). A fixed random matrix P raises it to the D channels of a hadamard memory, where it is bound to a random
phasor key; N pairs are summed. A read r of one key is brought back by the transpose, z = P r / (scale), and
decoded to x:

    linear   y = A z, the least-squares A over the training reads (what training would converge to)
    mlp      y = A z, then y + W2 gelu(W1 norm(y) + b1) + b2: the published denoiser, trained by Adam
    nearest  the nearest word of the codebook (codebook only; the ideal decoder)

The error is the mean square over channels on fresh memories; answering zero scores 1. No decoder of
Gaussian values beats ``s / (1 + s)`` with ``s = (N - 1) channels / 2D``, the linear optimum.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax

from holo_jax.array_types import Array, Float
from holo_jax.functional import bind, unbind

VALUES = ("codebook", "gaussian")
DECODERS = ("linear", "mlp", "nearest")


def linear_bound(dimension: int, channels: int, pairs: int) -> float:
    """Least mean square error of a linear decoder, and of any decoder of Gaussian values."""
    noise = (pairs - 1) * channels / (2 * dimension)
    return noise / (1 + noise)


def make_book(key: Array, words: int, channels: int) -> Float[Array, "w c"]:
    """Fixed Gaussian word vectors of unit variance."""
    return jax.random.normal(key, (words, channels))


@functools.partial(jax.jit, static_argnames=("dimension", "pairs", "memories", "values"))
def draw(
    key: Array, book: Float[Array, "w c"], *, dimension: int, pairs: int, memories: int, values: str
) -> tuple[Float[Array, "n c"], Float[Array, "n c"]]:
    """Fills memories and reads every pair.

    Args:
      key: of everything but the book; the projection depends on the book's size only.
      book: word vectors (read for "codebook"; its width is the number of channels).
      dimension: D.
      pairs, memories: N, and how many memories are filled (one at a time).
      values: see the module's docstring.

    Returns:
      (z, x): reads brought back to the channels, and true values; [memories * pairs, channels].
    """
    if values not in VALUES:
        raise ValueError(f"values is {values!r}; it must be one of {', '.join(VALUES)}")
    words, channels = book.shape
    projection = jax.random.normal(jax.random.key(dimension), (channels, dimension)) / math.sqrt(channels)

    def one(number):
        key_phase, key_value = jax.random.split(jax.random.fold_in(key, number))
        phases = jax.random.uniform(key_phase, (pairs, dimension), maxval=2 * math.pi)
        if values == "codebook":
            x = book[jax.random.randint(key_value, (pairs,), 0, words)]
        else:
            x = jax.random.normal(key_value, (pairs, channels))
        memory = bind(phases, x @ projection, binding="hadamard").sum(0, keepdims=True)
        read = unbind(phases, memory, binding="hadamard")
        return read @ projection.T * (channels / dimension), x

    z, x = jax.lax.map(one, jnp.arange(memories))
    return z.reshape(-1, channels), x.reshape(-1, channels)


def error(predicted: Float[Array, "n c"], true: Float[Array, "n c"]) -> Float[Array, " n"]:
    """Mean square over the channels of each sample."""
    return jnp.mean(jnp.square(predicted - true), axis=-1)


def least_squares(z: Float[Array, "n c"], x: Float[Array, "n c"]) -> Float[Array, "c c"]:
    """The A that minimises |z A - x|^2 over the samples."""
    return jnp.linalg.solve(z.T @ z + 1e-6 * z.shape[0] * jnp.eye(z.shape[1]), z.T @ x)


def nearest(y: Float[Array, "n c"], book: Float[Array, "w c"]) -> Float[Array, "n c"]:
    """The word of the book nearest to each row."""
    distances = jnp.sum(jnp.square(book), axis=1)[None] - 2 * y @ book.T
    return book[jnp.argmin(distances, axis=1)]


def mlp(params: dict[str, Array], y: Float[Array, "n c"]) -> Float[Array, "n c"]:
    """The residual denoiser on the linear read."""
    centred = y - y.mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    hidden = jax.nn.gelu(normal @ params["w1"] + params["b1"][None])
    return y + hidden @ params["w2"] + params["b2"][None]


@functools.partial(jax.jit, static_argnames=("steps", "batch"))
def train_mlp(
    key: Array,
    y: Float[Array, "n c"],
    x: Float[Array, "n c"],
    rates: Float[Array, " r"],
    *,
    steps: int,
    batch: int,
) -> dict[str, Array]:
    """Trains one denoiser per learning rate (Adam, cosine decay) on linear reads y of values x.

    Returns:
      parameters with a leading axis over the rates.
    """
    init_key, batch_key = jax.random.split(key)
    channels = y.shape[1]
    wide = 4 * channels
    one_key, two_key = jax.random.split(init_key)
    start = {
        "w1": jax.random.normal(one_key, (channels, wide)) / math.sqrt(channels),
        "b1": jnp.zeros(wide),
        "w2": 0.1 * jax.random.normal(two_key, (wide, channels)) / math.sqrt(wide),
        "b2": jnp.zeros(channels),
    }
    adam = optax.scale_by_adam(b2=0.99)

    def train(rate):
        def step(carry, number):
            params, moments = carry
            rows = jax.random.randint(jax.random.fold_in(batch_key, number), (batch,), 0, y.shape[0])
            loss = lambda p: error(mlp(p, y[rows]), x[rows]).mean()  # noqa: E731
            update, moments = adam.update(jax.grad(loss)(params), moments)
            size = rate * 0.5 * (1 + jnp.cos(math.pi * number / steps))
            return (jax.tree.map(lambda p, u: p - size * u, params, update), moments), None

        return jax.lax.scan(step, (start, adam.init(start)), jnp.arange(steps))[0][0]

    return jax.vmap(train)(rates)


def measure(
    key: Array,
    *,
    dimension: int,
    pairs: int,
    channels: int,
    words: int,
    values: str,
    samples: int,
    rates: tuple[float, ...],
    steps: int,
    batch: int,
) -> dict[str, Array]:
    """Errors of every decoder on fresh memories.

    The denoiser's learning rate is the best one on a validation set apart from the test set.

    Returns:
      {decoder: error per test memory}, each [test memories].
    """
    book_key, *keys = jax.random.split(key, 5)
    book = make_book(book_key, words, channels)
    sizes = dict(dimension=dimension, pairs=pairs, values=values)
    memories = -(-samples // pairs)
    held_out = max(8, memories // 4)
    z, x = draw(keys[0], book, memories=memories, **sizes)
    z_valid, x_valid = draw(keys[1], book, memories=held_out, **sizes)
    z_test, x_test = draw(keys[2], book, memories=held_out, **sizes)
    a = least_squares(z, x)
    trained = train_mlp(keys[3], z @ a, x, jnp.array(rates), steps=steps, batch=batch)
    valid = jax.vmap(lambda p: error(mlp(p, z_valid @ a), x_valid).mean())(trained)
    best = jax.tree.map(lambda p: p[jnp.argmin(valid)], trained)
    errors = {"linear": error(z_test @ a, x_test), "mlp": error(mlp(best, z_test @ a), x_test)}
    if values == "codebook":
        errors["nearest"] = error(nearest(z_test @ a, book), x_test)
    return {name: e.reshape(held_out, pairs).mean(1) for name, e in errors.items()}
