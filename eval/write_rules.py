"""Rules of writing into an outer memory: plain sum, erase, delta, and least squares as the bound.

    plain          M <- M + k v^T                                    e = 0
    erase          M <- M + k (v - e Re(k^H M))^T                    0 < e < 1
    delta          the same with e = 1
    least squares  the M that minimises sum |v_i - Re(k_i^H M)|^2 over everything (keys kept: not a memory of
                   constant size, the bound for any linear read-out of m phasors)

Two tasks. "distinct": every key is written once and asked for once. "rebound": the same keys are written a
second time with new values in a new order; the second value is asked for (least squares sees only those).
"""

import functools
import math

import jax
import jax.numpy as jnp

from eval.codebook import best_word, codes
from holo_jax.array_types import Array
from holo_jax.functional import accumulate, retrieve

RULES = ("plain", "erase", "delta", "least_squares")
TASKS = ("distinct", "rebound")


@functools.partial(jax.jit, static_argnames=("m", "d", "pairs", "vocabulary", "task"))
def measure(
    key: Array, share: Array, *, m: int, d: int, pairs: int, vocabulary: int, task: str
) -> tuple[Array, Array]:
    """Fills one memory by the rule with erase share ``share`` (0 plain, 1 delta) and by least squares.

    Args:
      key: random key of keys, values and codebook.
      share: erase gate e in [0, 1], a scalar.
      m, d: phasors of a key, channels of a value.
      pairs: keys.
      vocabulary: words.
      task: see the module's docstring.

    Returns:
      (correct by the rule, correct by least squares), each bool [pairs], in the order of the first writing.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    key_phase, key_words, key_book, key_order = jax.random.split(key, 4)
    phases = jax.random.uniform(key_phase, (pairs, m), maxval=2 * math.pi)
    words = jax.random.randint(key_words, (2, pairs), 0, vocabulary)
    order = jax.random.permutation(key_order, pairs)
    values = codes(key_book, words.reshape(-1), d).reshape(2, pairs, d)
    if task == "distinct":
        wanted, written, stored = words[0], phases, values[0]
    else:
        wanted = words[1]
        written = jnp.concatenate([phases, phases[order]])
        stored = jnp.concatenate([values[0], values[1][order]])
    erase = jnp.full((1, stored.shape[0], 1), share)
    addresses = written[None, :, None, :]
    _, state = accumulate(addresses, addresses, stored[None, :, None, :], erase=erase, binding="outer")
    reads = retrieve(state, phases[None, :, None, :], binding="outer")[0, :, 0]

    features = jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=1) / math.sqrt(m)
    last = values[0] if task == "distinct" else values[1]
    # A whisper of ridge keeps the Gram matrix invertible when there are more pairs than 2 m features.
    gram = features.T @ features + 1e-6 * jnp.eye(2 * m)
    bound = features @ jnp.linalg.solve(gram, features.T @ last)

    best, _, _ = best_word(key_book, jnp.concatenate([reads, bound]), vocabulary)
    correct = best.reshape(2, pairs) == wanted[None]
    return correct[0], correct[1]
