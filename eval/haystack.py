"""The synthetic needle: one fact in a stream of random tokens, asked for at the end.

A sequence of ``length`` tokens holds, at a given depth, the needle ``MARK key value``; it ends with the
question ``ASK key``, after which ``value`` is the answer. Everything else is filler: random ids from
``filler_from`` on. With ``filler_from = KEYS`` the filler holds keys and values too, and only MARK tells the
needle; with ``filler_from = KEYS + 2 * kinds`` it does not.

A token is a function of (row key, position), so that any piece of a sequence of any length can be made where
it is needed: a million tokens are read without ever being stored.
"""

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Int

MARK, ASK, KEYS = 0, 1, 2  # keys are KEYS .. KEYS + kinds - 1, values the next `kinds` ids
NEEDLE, QUESTION = 3, 2  # tokens of each


def facts(key: Array, rows: int, kinds: int) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
    """The key and the value of each row."""
    key_key, value_key = jax.random.split(key)
    keys = KEYS + jax.random.randint(key_key, (rows,), 0, kinds, jnp.int32)
    values = KEYS + kinds + jax.random.randint(value_key, (rows,), 0, kinds, jnp.int32)
    return keys, values


def needle_start(depth: Array, length: Array) -> Array:
    """Position of MARK: ``depth`` in [0, 1] over the places where the needle fits before the question."""
    return jnp.round(depth * (length - QUESTION - NEEDLE)).astype(jnp.int32)


def piece(
    key: Array,
    keys: Int[Array, " b"],
    values: Int[Array, " b"],
    start: Int[Array, " b"],
    length: Array,
    first: Array,
    *,
    size: int,
    vocab_size: int,
    filler_from: int,
) -> Int[Array, "b t"]:
    """Tokens ``first .. first + size - 1`` of every row; what lies beyond ``length`` is filler.

    Args:
      key: of the filler; the same for every piece of a sequence, whose pieces must have the same size.
      keys, values: see ``facts``.
      start: see ``needle_start``.
      length: of the sequences.
      first: position of the piece's first token, a multiple of ``size``.
    """
    rows = keys.size
    filler = jax.random.randint(
        jax.random.fold_in(key, first), (rows, size), filler_from, vocab_size, jnp.int32
    )
    position = (first + jnp.arange(size, dtype=jnp.int32))[None]
    tokens = filler
    for offset, token in ((0, jnp.full(rows, MARK, jnp.int32)), (1, keys), (2, values)):
        tokens = jnp.where(position == start[:, None] + offset, token[:, None], tokens)
    tokens = jnp.where(position == length - 2, ASK, tokens)
    return jnp.where(position == length - 1, keys[:, None], tokens)


def oracle(tokens: Int[Array, "b t"]) -> Int[Array, " b"]:
    """The right answer of whole sequences: what stands two places after the first MARK."""
    place = jnp.argmax(tokens == MARK, axis=1)
    return jnp.take_along_axis(tokens, place[:, None] + 2, axis=1)[:, 0]
