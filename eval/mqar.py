"""Multi-query associative recall (MQAR): key-value pairs, then every key asked again, far or near.

A sequence of ``length`` tokens opens with ``pairs`` keys, each followed by its value. The rest is filled:
each key returns once at a random place, and the model must answer with its value there. Query places are
``2 pairs + 2 gap``, the gaps drawn without replacement with probability proportional to
``(gap + 1)^(power - 1)``, so that most queries come early and some very late. All other places are zero, or
random tokens of the whole vocabulary (``random_non_queries``). Keys are ``1 .. v/2 - 1``, values
``v/2 .. v - 1``; in a sequence no key and no value repeats.

The value is not in the input after its query: nothing is learned from a previous answer.

Several sequences are packed into rows of equal length with segment ids, so that one compiled program takes
any mix of settings.

Source: Arora et al., "Zoology: Measuring and improving recall in efficient language models",
arXiv:2312.04927 (task, distribution of gaps, non-queries).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Float, Int


class Task(NamedTuple):
    """``examples`` sequences of ``length`` tokens with ``pairs`` pairs each."""

    length: int
    pairs: int
    examples: int


class Examples(NamedTuple):
    """Sequences [n, length]; places of the queries and their answers [n, pairs], in the order of the keys."""

    tokens: Int[Array, "n t"]
    places: Int[Array, "n p"]
    answers: Int[Array, "n p"]


class Packed(NamedTuple):
    """Rows of packed sequences and a flat list of queries.

    Attributes:
      tokens, segment_ids: int32 [rows, width]; segment 0 is padding.
      rows, places: int32 [q], where each query stands.
      answers: int32 [q].
      weights: float32 [q], those of a mean over sequences of the mean over their queries; their sum is 1.
    """

    tokens: Int[Array, "b t"]
    segment_ids: Int[Array, "b t"]
    rows: Int[Array, " q"]
    places: Int[Array, " q"]
    answers: Int[Array, " q"]
    weights: Float[Array, " q"]


def check(length: int, pairs: int, vocab_size: int) -> None:
    """Refuses sizes the task is not defined for.

    Raises:
      ValueError: naming the size.
    """
    if pairs < 1:
        raise ValueError(f"pairs is {pairs}; it must be at least 1")
    if length % 2 or length < 4 * pairs:
        raise ValueError(f"length is {length}; it must be even and at least 4 x pairs ({4 * pairs})")
    if vocab_size % 2 or vocab_size // 2 - 1 < pairs:
        raise ValueError(f"vocab_size is {vocab_size}; half of it must hold more than {pairs} keys")


def generate(
    key: Array,
    *,
    examples: int,
    length: int,
    pairs: int,
    vocab_size: int,
    power: float = 0.01,
    random_non_queries: bool = True,
) -> Examples:
    """Draws sequences (pure, to be called inside jit; sizes are static).

    Raises:
      ValueError: for sizes the task is not defined for.
    """
    check(length, pairs, vocab_size)
    key_keys, key_values, key_gaps, key_fill = jax.random.split(key, 4)
    half, context = vocab_size // 2, 2 * pairs
    space = (length - context) // 2

    def distinct(draw_key: Array, log_weights: Array) -> Array:
        # The largest of log-weight plus Gumbel noise, in order: sampling one by one without replacement.
        noise = jax.random.gumbel(draw_key, (examples, log_weights.size))
        return jax.lax.top_k(noise + log_weights[None], pairs)[1].astype(jnp.int32)

    keys = 1 + distinct(key_keys, jnp.zeros(half - 1))
    values = half + distinct(key_values, jnp.zeros(vocab_size - half))
    gaps = distinct(key_gaps, (power - 1.0) * jnp.log(jnp.arange(1, space + 1, dtype=jnp.float32)))
    places = context + 2 * gaps
    if random_non_queries:
        tokens = jax.random.randint(key_fill, (examples, length), 0, vocab_size, jnp.int32)
    else:
        tokens = jnp.zeros((examples, length), jnp.int32)
    tokens = tokens.at[:, 0:context:2].set(keys).at[:, 1:context:2].set(values)
    tokens = tokens.at[jnp.arange(examples)[:, None], places].set(keys)
    return Examples(tokens, places, values)


def pack(parts: list[Examples], width: int) -> Packed:
    """Packs sequences into rows of ``width`` tokens, each part into rows of its own.

    Sequences of a part fill ``width // length`` to a row, in order; what is left of a row is padding.

    Raises:
      ValueError: for a sequence longer than a row.
    """
    packed = []
    first_row = 0
    sequences = sum(part.tokens.shape[0] for part in parts)
    for part in parts:
        examples, length = part.tokens.shape
        per_row = width // length
        if per_row < 1:
            raise ValueError(f"a sequence of {length} tokens does not fit into rows of {width}")
        rows = -(-examples // per_row)
        missing = rows * per_row - examples
        tokens = jnp.pad(part.tokens, ((0, missing), (0, 0))).reshape(rows, per_row * length)
        index = jnp.arange(rows * per_row, dtype=jnp.int32)
        segments = jnp.where(index < examples, index % per_row + 1, 0).reshape(rows, per_row)
        segments = jnp.repeat(segments, length, axis=1)
        margin = ((0, 0), (0, width - per_row * length))
        number = jnp.arange(examples, dtype=jnp.int32)[:, None]
        packed.append(
            Packed(
                jnp.pad(tokens, margin),
                jnp.pad(segments, margin),
                jnp.broadcast_to(first_row + number // per_row, part.places.shape).reshape(-1),
                (number % per_row * length + part.places).reshape(-1),
                part.answers.reshape(-1),
                jnp.full((part.answers.size,), 1.0 / (sequences * part.answers.shape[1]), jnp.float32),
            )
        )
        first_row += rows
    return Packed(*(jnp.concatenate(arrays) for arrays in zip(*packed, strict=True)))


def batch(key: Array, tasks: tuple[Task, ...], *, width: int, vocab_size: int, **options) -> Packed:
    """A packed batch with the sequences of every task; ``options`` as in ``generate``."""
    parts = [
        generate(
            jax.random.fold_in(key, number),
            examples=task.examples,
            length=task.length,
            pairs=task.pairs,
            vocab_size=vocab_size,
            **options,
        )
        for number, task in enumerate(tasks)
    ]
    return pack(parts, width)


def oracle(tokens: Int[Array, "b t"], segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """The perfect answer at every place: what followed the first occurrence of its token in its segment.

    At a query this is the value, since the pairs come first. Elsewhere it is of no account.
    """
    same = (tokens[:, :, None] == tokens[:, None, :]) & (segment_ids[:, :, None] == segment_ids[:, None, :])
    first = jnp.argmax(same, axis=2)
    following = jnp.minimum(first + 1, tokens.shape[1] - 1)
    return jnp.take_along_axis(tokens, following, axis=1)
