"""Gumbel noise for drawing tokens, of Philox, whose blocks are four words.

A token drawn is the one of the highest score, its logit plus ``-log(-log u)`` with ``u`` uniform. Making the
noise is most of what drawing costs. Philox-4x32 of 10 rounds takes 10 instructions a word, Threefry-2x32 of
20 takes 38 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011); keys stay Threefry's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from holo_jax.array_types import Array, Float, UInt32

WORDS = 4
_ROUNDS = 10
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Product = Callable[[int, Array], tuple[Array, Array]]


def blocks(size: int) -> int:
    """Blocks that noise for ``size`` ids takes: id i has word ``i // blocks`` of block ``i % blocks``."""
    return -(-size // WORDS)


def row_noise(key: UInt32[Array, "2"], size: int) -> Float[Array, " v"]:
    """Noise of a row's ids, one after the other."""
    counter = jnp.arange(blocks(size), dtype=jnp.uint32)
    zero = jnp.zeros_like(counter)
    words = philox((key[0], key[1]), (counter, zero, zero, zero))
    return gumbel(jnp.concatenate(words)[:size])


def wide(factor: int, x: UInt32[Array, "*s"]) -> tuple[UInt32[Array, "*s"], UInt32[Array, "*s"]]:
    """Upper and lower word of a product, without numbers of 64 bits."""
    low, high = (jnp.uint32(half) for half in (factor & 0xFFFF, factor >> 16))
    x_low, x_high = x & jnp.uint32(0xFFFF), x >> jnp.uint32(16)
    first = high * x_low + ((low * x_low) >> jnp.uint32(16))
    second = low * x_high + (first & jnp.uint32(0xFFFF))
    upper = high * x_high + (first >> jnp.uint32(16)) + (second >> jnp.uint32(16))
    return upper, jnp.uint32(factor) * x


def philox(
    key: tuple[Array, Array], counter: tuple[Array, Array, Array, Array], product: Product = wide
) -> tuple[Array, Array, Array, Array]:
    """Philox-4x32 of 10 rounds: the words of a block.

    Args:
      key, counter: words, uint32.
      product: as ``wide``; kernels have an instruction for it.
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(_ROUNDS):
        (high_a, low_a), (high_c, low_c) = (
            product(factor, x) for factor, x in zip(_FACTORS, (a, c), strict=True)
        )
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
        first, second = (x + jnp.uint32(step) for x, step in zip((first, second), _WEYL, strict=True))
    return a, b, c, d


def gumbel(bits: UInt32[Array, "*s"]) -> Float[Array, "*s"]:
    """``-log(-log u)`` with ``u`` of ``uniform``, as ``jax.random.gumbel`` has it."""
    return -jnp.log(-jnp.log(uniform(bits)))


def uniform(bits: UInt32[Array, "*s"]) -> Float[Array, "*s"]:
    """In (0, 1), multiples of 2^-23 of the upper 23 bits; the least normal number in place of 0."""
    tiny = float(np.finfo(np.float32).tiny)
    ones = (bits >> jnp.uint32(9)) | jnp.uint32(0x3F800000)
    fraction = jax.lax.bitcast_convert_type(ones, jnp.float32) - 1.0
    return jnp.maximum(fraction + tiny, tiny)
