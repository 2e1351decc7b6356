"""The small numbers that a token changes, of all rows, as one array: so that one kernel changes them.

A kernel for each of them costs as much as the kernel: about 2 us, of which a token has few.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Bool, Int, UInt32


class Counts(NamedTuple):
    """Of a group of ``C`` tokens.

    Attributes:
      position: tokens that each row has read.
      remaining: tokens that it may still generate.
      finite: whether all its logits were finite.
      tokens: the group's, ``[C, b]``.
    """

    position: UInt32[Array, "b"]
    remaining: Int[Array, "b"]
    finite: Bool[Array, "b"]
    tokens: Int[Array, "c b"]

    def packed(self) -> Int[Array, "n b"]:
        """As one array of int32."""
        position = jax.lax.bitcast_convert_type(self.position, jnp.int32)
        rows = jnp.stack([position, self.remaining, self.finite.astype(jnp.int32)])
        return jnp.concatenate([rows, self.tokens])


def unpacked(array: Int[Array, "n b"]) -> Counts:
    """Inverse of ``Counts.packed``."""
    position = jax.lax.bitcast_convert_type(array[0], jnp.uint32)
    return Counts(position, array[1], array[2] != 0, array[3:])
