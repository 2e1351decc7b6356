"""Monte Carlo of superpositions: pairs are bound and summed, then read back and cleaned up.

Nothing is trained. Keys are random phasors, values are codes of a random vocabulary (+-1 per channel), so a
read is cleaned up by the largest inner product. Shapes are static (``Shape``), what is written is not
(``Load``), so that a whole sweep over loads compiles once.

Theory (normal scores). Hadamard with D phasors, N pairs, unit gates: the right word's score is 1 with
variance (N - 1) / 2D, a wrong word's 0 with variance (N + 1) / 2D (one term from its own overlap with the
right value, N - 1 from the other pairs): the signal-to-noise ratio tends to sqrt(2D / N), whatever the
scale of the read. Outer with m phasors and d channels has 2 m d numbers in place of 2D, and 1 / d for a
word's own overlap; a word that other pairs hold too adds a share (d - 1) / vocabulary. With gates g, N - 1
becomes the sum of the other g^2, and the signal the pair's own g. The accuracy also takes the scores as
independent: with few channels they are not, and the outer memory recalls somewhat more than the formula.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from eval.codebook import best_word, codes, top1_theory
from eval.state_dtypes import store
from holo_jax.functional import bind, unbind

_BLOCK = 64  # pairs bound at one time
_MEMORIES = 16  # memories filled by one run, at most


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is fixed when the measurement is compiled.

    Attributes:
      binding: "hadamard" or "outer".
      m: phasors of a key.
      d: channels of a value (equal to m for hadamard).
      vocabulary: words a read is compared with.
      dtype: storage of the memory, see ``state_dtypes``.
      each_write: store in that dtype after every write, as a decoder does, not only at the end.
      queries: reads of one run, spread over as many memories as they fill.
    """

    binding: str
    m: int
    d: int
    vocabulary: int
    dtype: str = "float32"
    each_write: bool = False
    queries: int = 128

    @property
    def floats(self) -> int:
        """Real numbers of one memory."""
        return 2 * self.m * (1 if self.binding == "hadamard" else self.d)


@dataclasses.dataclass(frozen=True)
class Load:
    """What is written into one memory.

    Attributes:
      pairs: pairs that are asked for.
      distractors: further pairs that are never asked for.
      gate, distractor_gate: how strongly the two kinds are written.
    """

    pairs: int
    distractors: int = 0
    gate: float = 1.0
    distractor_gate: float = 1.0


def theory(shape: Shape, load: Load) -> dict[str, float]:
    """Expected ratio, error and accuracy of a memory kept in float32 (see the module's docstring)."""
    others = (load.pairs - 1) * load.gate**2 + load.distractors * load.distractor_gate**2
    # Another pair may hold the very word that is scored: its crosstalk then does not average over channels.
    repeated = 1 + (shape.d - 1) / shape.vocabulary if shape.binding == "outer" else 1.0
    right = repeated * others / shape.floats
    wrong = right + load.gate**2 / shape.d
    return {
        "snr": load.gate / math.sqrt(wrong),
        "mse": others * shape.d / shape.floats + (1.0 - load.gate) ** 2,
        "accuracy": top1_theory(load.gate, math.sqrt(wrong), math.sqrt(right), shape.vocabulary),
    }


def measure(key, shape: Shape, load: Load) -> dict[str, jax.Array]:
    """Fills memories with fresh keys, values and codebook, and reads ``shape.queries`` pairs.

    As many memories are filled as the queries need (one, if the load has more pairs than queries).

    Returns:
      per query, shape [queries]: "correct" (bool), "mse" (of the read against its value), "score" (of the
      right word) and "wrong" (mean square score of the wrong words).

    Raises:
      ValueError: unless ``pairs`` divides the number of queries or exceeds it, and is not too small for the
        number of memories.
    """
    if load.pairs < 1 or (shape.queries % load.pairs and load.pairs < shape.queries):
        raise ValueError(f"pairs is {load.pairs}; it must divide queries ({shape.queries}) or exceed it")
    memories = max(1, shape.queries // load.pairs)
    if memories > _MEMORIES:
        raise ValueError(
            f"pairs is {load.pairs}; below {shape.queries // _MEMORIES} it needs too many memories"
        )
    return _measure(key, shape, memories, load.pairs, load.distractors, load.gate, load.distractor_gate)


@functools.partial(jax.jit, static_argnums=1)
def _measure(key, shape: Shape, memories, pairs, distractors, gate, distractor_gate):
    key_words, key_book, key_phases, key_noise, key_store = jax.random.split(key, 5)

    def each(draw_key, numbers):
        return jax.vmap(lambda number: jax.random.fold_in(draw_key, number))(numbers)

    def words(numbers):
        draw = jax.vmap(lambda k: jax.random.randint(k, (), 0, shape.vocabulary))
        return draw(each(key_words, numbers))

    def phases(numbers):
        return jax.vmap(lambda k: jax.random.uniform(k, (shape.m,), maxval=2 * math.pi))(
            each(key_phases, numbers)
        )

    def write(memory, numbers, values, strengths, rows, store_key):
        bound = bind(phases(numbers), values * strengths[:, None], binding=shape.binding)
        memory = memory.at[rows].add(bound)
        if not shape.each_write:
            return memory
        return memory.at[rows[0]].set(store(memory[rows[0]], shape.dtype, store_key))

    block = 1 if shape.each_write else _BLOCK

    def facts(index, memory):
        numbers = index * block + jnp.arange(block)
        strengths = jnp.where(numbers < memories * pairs, gate, 0.0)
        rows = jnp.minimum(numbers // pairs, memories - 1)
        values = codes(key_book, words(numbers), shape.d)
        return write(memory, numbers, values, strengths, rows, jax.random.fold_in(key_store, index))

    def noise(index, memory):
        # A random word's code is a vector of random signs; drawing the signs directly is the same.
        numbers = index * block + jnp.arange(block)
        value_key = jax.random.fold_in(key_noise, index)
        values = jax.random.rademacher(value_key, (block, shape.d), jnp.float32)
        strengths = jnp.where(numbers < memories * distractors, distractor_gate, 0.0)
        rows = jnp.minimum(numbers // jnp.maximum(distractors, 1), memories - 1)
        store_key = jax.random.fold_in(value_key, 1)
        return write(memory, 2**20 + numbers, values, strengths, rows, store_key)

    def blocks(count):
        return (memories * count + block - 1) // block

    size = (shape.m,) if shape.binding == "hadamard" else (shape.m, shape.d)
    memory = jnp.zeros((_MEMORIES, *size), jnp.complex64)
    memory = jax.lax.fori_loop(0, blocks(pairs), facts, memory)
    memory = jax.lax.fori_loop(0, blocks(distractors), noise, memory)
    if not shape.each_write:
        memory = jax.vmap(lambda one: store(one, shape.dtype))(memory)

    # The first pairs of one memory, or all pairs of all of them.
    asked = jnp.arange(shape.queries)
    wanted = words(asked)
    truth = codes(key_book, wanted, shape.d)
    owner = jnp.minimum(asked // pairs, memories - 1)
    reads = unbind(phases(asked), memory[owner], binding=shape.binding)
    winner, average, variance = best_word(key_book, reads, shape.vocabulary)
    score = jnp.mean(reads * truth, axis=1)
    squares = shape.vocabulary * (variance + jnp.square(average)) - jnp.square(score)
    return {
        "correct": winner == wanted,
        "mse": jnp.mean(jnp.square(reads - truth), axis=1),
        "score": score,
        "wrong": squares / (shape.vocabulary - 1),
    }
