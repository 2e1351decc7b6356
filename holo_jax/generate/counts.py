"""The small numbers that a token changes, of all rows, as one array: so that one kernel changes them.

A kernel for each of them costs as much as the kernel: about 2 us, of which a token has few.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Bool, Int, UInt32


class Counts(NamedTuple):
    """Of a group of ``C`` tokens, before one of them; all but the last as of ``decode_choose.ROWS``.

    Attributes:
      before: tokens of the group before it, the same in all rows.
      active: whether a row reads it.
      position: tokens that each row has read.
      launch: see ``stack.Moving``, the same in all rows.
      token: what it is.
      remaining: tokens that a row may still generate.
      limit: tokens that the group may have, the same in all rows.
      finite: whether all its logits were finite.
      tokens: the group's, ``[C, b]``.
    """

    before: Int[Array, "b"]
    active: Bool[Array, "b"]
    position: UInt32[Array, "b"]
    launch: Int[Array, "b"]
    token: Int[Array, "b"]
    remaining: Int[Array, "b"]
    limit: Int[Array, "b"]
    finite: Bool[Array, "b"]
    tokens: Int[Array, "c b"]

    def packed(self) -> Int[Array, "n b"]:
        """As one array of int32."""
        rows = [self.token, self.remaining, self.limit, self.finite.astype(jnp.int32)]
        first = numbers(self.before, self.active, self.position, self.launch)
        return jnp.concatenate([first, jnp.stack(rows), self.tokens])

    def after(
        self, token: Int[Array, "b"], finite: Bool[Array, "b"], stop_tokens: Int[Array, "s"]
    ) -> "Counts":
        """Before the next token.

        Args:
          token: the next one.
          finite: whether the logits that it was drawn from were.
          stop_tokens: ids that end a row.
        """
        remaining = left(self.remaining, self.token, self.active, stop_tokens)
        here = jnp.arange(self.tokens.shape[0], dtype=jnp.int32)[:, None] == self.before[None]
        return Counts(
            before=self.before + 1,
            active=(remaining > 0) & (self.before + 1 < self.limit),
            position=self.position + self.active.astype(jnp.uint32),
            launch=self.launch + 1,
            token=token,
            remaining=remaining,
            limit=self.limit,
            finite=self.finite & finite,
            tokens=jnp.where(here & self.active[None], self.token[None], self.tokens),
        )


def left(
    remaining: Int[Array, "b"], token: Int[Array, "b"], active: Bool[Array, "b"], stop_tokens: Int[Array, "s"]
) -> Int[Array, "b"]:
    """Tokens that rows may still generate, after ``token`` where they are active."""
    stops = functools.reduce(jnp.logical_or, [token == stop for stop in stop_tokens])
    return jnp.where(active, jnp.where(stops, 0, remaining - 1), remaining)


def numbers(
    before: Int[Array, "b"], active: Bool[Array, "b"], position: UInt32[Array, "b"], launch: Int[Array, "b"]
) -> Int[Array, "4 b"]:
    """The first rows of ``Counts``."""
    bits = jax.lax.bitcast_convert_type(position, jnp.int32)
    return jnp.stack([before, active.astype(jnp.int32), bits, launch])


def unpacked(array: Int[Array, "n b"]) -> Counts:
    """Inverse of ``Counts.packed``."""
    before, active, bits, launch, token, remaining, limit, finite = array[:8]
    position = jax.lax.bitcast_convert_type(bits, jnp.uint32)
    return Counts(before, active != 0, position, launch, token, remaining, limit, finite != 0, array[8:])
