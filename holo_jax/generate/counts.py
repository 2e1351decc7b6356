"""The small numbers that a token changes, of all rows, as one array: so that one kernel changes them.

A kernel for each of them costs as much as the kernel: about 2 us, of which a token has few.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Bool, Int, UInt32


class Counts(NamedTuple):
    """Of a group of ``C`` tokens, before one of them; the first rows are what kernels are given.

    Attributes:
      before: tokens of the group before it, the same in all rows.
      active: whether a row reads it.
      position: tokens that each row has read.
      launch: see ``stack.Moving``, the same in all rows.
      remaining: tokens that a row may still generate.
      finite: whether all its logits were finite.
      tokens: the group's, ``[C, b]``.
    """

    before: Int[Array, "b"]
    active: Bool[Array, "b"]
    position: UInt32[Array, "b"]
    launch: Int[Array, "b"]
    remaining: Int[Array, "b"]
    finite: Bool[Array, "b"]
    tokens: Int[Array, "c b"]

    def packed(self) -> Int[Array, "n b"]:
        """As one array of int32."""
        rows = [
            numbers(self.before, self.active, self.position, self.launch),
            self.remaining[None],
            self.finite.astype(jnp.int32)[None],
            self.tokens,
        ]
        return jnp.concatenate(rows)


def numbers(
    before: Int[Array, "b"], active: Bool[Array, "b"], position: UInt32[Array, "b"], launch: Int[Array, "b"]
) -> Int[Array, "4 b"]:
    """The rows of ``Counts`` that kernels are given."""
    bits = jax.lax.bitcast_convert_type(position, jnp.int32)
    return jnp.stack([before, active.astype(jnp.int32), bits, launch])


def unpacked(array: Int[Array, "n b"]) -> Counts:
    """Inverse of ``Counts.packed``."""
    before, active, bits, launch, remaining, finite = array[:6]
    position = jax.lax.bitcast_convert_type(bits, jnp.uint32)
    return Counts(before, active != 0, position, launch, remaining, finite != 0, array[6:])
