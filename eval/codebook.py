"""A random codebook that is never stored: each word's code is a function of the key and the word.

Codes are vectors of +-1. A vocabulary of 32,000 words of 16,384 channels would fill 2 GiB; here a block of
words is made when its scores are taken.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from holo_jax.array_types import Array, Float, Int

_LANES = 32  # random bits per word of the generator


def codes(key: Array, words: Int[Array, " n"], channels: int) -> Float[Array, "n d"]:
    """Codes of the given words, float32 of +-1.

    Args:
      key: of the codebook.
      words: word indices.
      channels: length of a code.
    """

    def one(word):
        bits = jax.random.bits(jax.random.fold_in(key, word), (math.ceil(channels / _LANES),), jnp.uint32)
        lanes = jnp.arange(_LANES, dtype=jnp.uint32)
        signs = (bits[:, None] >> lanes[None, :]) & jnp.uint32(1)
        return 2.0 * signs.reshape(-1)[:channels].astype(jnp.float32) - 1.0

    return jax.vmap(one)(words)


def best_word(
    key: Array, reads: Float[Array, "q d"], vocabulary: int, *, block: int = 1024
) -> tuple[Int[Array, " q"], Float[Array, " q"], Float[Array, " q"]]:
    """The word whose code has the largest inner product with each read, over the whole vocabulary.

    Returns:
      (word, mean, variance): the winner, and mean and variance of the score ``code . read / d`` over all
      words of the vocabulary.
    """
    queries, channels = reads.shape

    def visit(carry, start):
        score, word, total, squares = carry
        candidates = start + jnp.arange(block)
        scores = reads @ codes(key, candidates, channels).T / channels
        inside = (candidates < vocabulary)[None, :]
        best = jnp.argmax(jnp.where(inside, scores, -jnp.inf), axis=1)
        best_score = jnp.take_along_axis(scores, best[:, None], axis=1)[:, 0]
        wins = best_score > score
        kept = jnp.where(inside, scores, 0.0)
        return (
            jnp.where(wins, best_score, score),
            jnp.where(wins, start + best, word),
            total + kept.sum(1),
            squares + jnp.square(kept).sum(1),
        ), None

    zeros = jnp.zeros(queries, jnp.float32)
    start = (zeros - jnp.inf, jnp.zeros(queries, jnp.int32), zeros, zeros)
    (_, word, total, squares), _ = jax.lax.scan(visit, start, jnp.arange(0, vocabulary, block))
    average = total / vocabulary
    return word, average, squares / vocabulary - jnp.square(average)


def top1_theory(signal: float, wrong: float, right: float, vocabulary: int) -> float:
    """Probability that the right word wins, for normal and independent scores.

    With the right score ``N(signal, right^2)`` and ``vocabulary - 1`` wrong ones ``N(0, wrong^2)``:
    ``P = E_x[Phi((signal + right x) / wrong)^(vocabulary - 1)]``, x standard normal, by Gauss-Hermite
    quadrature.

    Source: Frady, Kleyko, Sommer, "A theory of sequence indexing and working memory in recurrent neural
    networks", Neural Computation 30(6), 2018.
    """
    if wrong == 0.0:
        return 1.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    below = np.array([0.5 * math.erfc(-(signal + right * x) / wrong / math.sqrt(2)) for x in nodes])
    log_power = np.where(below > 0, (vocabulary - 1) * np.log(np.maximum(below, 1e-300)), -np.inf)
    return float(np.clip((weights / weights.sum() * np.exp(log_power)).sum(), 0.0, 1.0))
