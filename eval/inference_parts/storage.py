"""Capacity of stored bytes: one superposition of N pairs in a fixed number of bytes, by dtype.

``M = sum_i e^{i a_i} * x_{w_i}`` with D random phasors and values of +-1; pair i is read as the codeword with
the largest ``<x_k, Re(e^{-i a_i} M)>`` among K. In theory the signal-to-noise ratio is ``sqrt(2 D / N)``, so
fewer bits for a number, spent on more phasors, hold more until rounding costs more than D gains. "once"
rounds the finished memory; "every" rounds after every write, as a decode loop does.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from eval.common import Reporter
from eval.results import exact, proportion
from eval.speed_parts.timing import say
from holo_jax.array_types import Array
from holo_jax.generate.state_precision import StoredMemory, restore, store

ROW = 64  # channels that share an exponent, as head_dim has by default
_QUERIES = 128
# Bytes of a row of complex numbers; "compensated" is the float32 state with its residue.
ROW_BYTES = {
    "compensated": 16 * ROW,
    "float32": 8 * ROW,
    "bfloat16": 4 * ROW,
    "int8": 2 * ROW + 2,
    "int4": ROW + 2,
}


def run(
    reporter: Reporter, *, total_bytes: int, pairs: Sequence[int], alternatives: int, trials: int, seed: int
) -> None:
    """Accuracy of every dtype and way of rounding at every number of pairs."""
    for dtype, row_bytes in ROW_BYTES.items():
        rows = total_bytes // row_bytes
        where = {"part": "storage", "state_dtype": dtype}
        reporter.add(exact("phasors", rows * ROW, **where))
        for mode in ("once", "every") if dtype in ("bfloat16", "int8", "int4") else ("once",):
            for count in pairs:
                keys = jax.random.split(jax.random.key(seed), trials)
                right = sum(int(_trial(key, rows, count, alternatives, dtype, mode)) for key in keys)
                queries = trials * min(count, _QUERIES)
                reporter.add(proportion("accuracy", right, queries, mode=mode, pairs=count, **where))
                say(f"{dtype} {mode}: {count} pairs in {total_bytes} bytes: {right / queries:.3f}")


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _trial(key: Array, rows: int, count: int, alternatives: int, dtype: str, mode: str) -> Array:
    """How many of the first queries are read right."""
    d = rows * ROW
    key_codes, key_words, key_phases, key_round = jax.random.split(key, 4)
    codebook = jax.random.rademacher(key_codes, (alternatives, d), jnp.int8)
    words = jax.random.randint(key_words, (count,), 0, alternatives)

    def phasor(index: Array) -> Array:
        angle = jax.random.uniform(jax.random.fold_in(key_phases, index), (d,), maxval=2 * np.pi)
        return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))

    def written(index: Array) -> Array:
        return (phasor(index) * codebook[words[index]]).reshape(rows, ROW)

    if mode == "once" or dtype in ("float32", "compensated"):
        zeros = jnp.zeros((rows, ROW), jnp.complex64)
        memory = jax.lax.fori_loop(0, count, lambda i, m: m + written(i), zeros)
        if dtype not in ("float32", "compensated"):
            memory = restore(store(memory, dtype, key_round), is_complex=True)
    else:
        empty = store(jnp.zeros((rows, ROW), jnp.complex64), dtype, key_round)

        def write(index: Array, stored: StoredMemory) -> StoredMemory:
            memory = restore(stored, is_complex=True) + written(index)
            return store(memory, dtype, jax.random.fold_in(key_round, index), stored.exponents)

        memory = restore(jax.lax.fori_loop(0, count, write, empty), is_complex=True)
    asked = jnp.arange(min(count, _QUERIES))
    values = jax.lax.map(lambda i: jnp.real(jnp.conj(phasor(i)) * memory.reshape(d)), asked)
    scores = jnp.einsum("nd,kd->nk", values.astype(jnp.bfloat16), codebook.astype(jnp.bfloat16))
    return jnp.sum(jnp.argmax(scores, axis=-1) == words[asked])
