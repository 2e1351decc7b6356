"""What a mixer knows about the tokens it is given, besides their vectors."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from holo_jax.array_types import Array, Bool, Float, Int, UInt32
from holo_jax.parallel import DATA, layout


class Context(NamedTuple):
    """Positions and segments of one call.

    Attributes:
      inside: position of each token inside its segment, [b or 1, t].
      segment_ids: document of each token, or None where each row is one document. With a state, padding
        at the beginning of a row carries the id of the first token after it.
      continues: per row, whether the first token goes on with the state's segment; None without state
        or where every row does.
      padding: with a state, how many tokens at the beginning of each row are padding, which must leave
        the state as it is; None where none are.
      segment: with a state, the id of each row's segment before this call.
      signal: where gradients of other blocks are summed meanwhile, what tells the sums that the memory's own
        kernels have run back (``holo_jax.ordered_sums.summed_meanwhile``), ``[data]``; else None.
    """

    inside: UInt32[Array, "b t"]
    segment_ids: Int[Array, "b t"] | None = None
    continues: Bool[Array, "b"] | None = None
    padding: Int[Array, "b"] | None = None
    segment: Int[Array, "b"] | None = None
    signal: Float[Array, "n"] | None = None

    @property
    def layout(self) -> Any:
        """Where each field lies on a mesh; see ``holo_jax.parallel.layout``."""
        rows = layout("_ t" if self.inside.shape[0] == 1 else "b t")
        every: tuple[Any, ...] = (rows, layout("b t"), layout("b"), layout("b"), layout("b"))
        every += (P(DATA),)
        present = [at if field is not None else None for at, field in zip(every, self, strict=True)]
        return Context._make(present)

    @property
    def real(self) -> Bool[Array, "b t"] | None:
        """False for the padding that a state must not see; None where all tokens are real."""
        if self.padding is None:
            return None
        return jnp.arange(self.inside.shape[1], dtype=jnp.int32)[None] >= self.padding[:, None]


def keep_rows(state: Array, continues: Bool[Array, "b"] | None) -> Array:
    """The state where a row's segment goes on, zeros where another one begins."""
    if continues is None:
        return state
    rows = continues.reshape(continues.shape + (1,) * (state.ndim - 1))
    return jnp.where(rows, state, jnp.zeros((), state.dtype))
