"""Runs of equal segment ids in a packed row, and sums that restart at their borders.

A *border* is a position whose segment id differs from that of the position before it. The number of
borders up to a position is its *run index*: positions see each other exactly if their run indices are
equal, and what precedes position 0 belongs to run 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Bool, Float, Int


def borders(segment_ids: Int[Array, "b t"]) -> Bool[Array, "b t"]:
    """True where a new segment begins; never at position 0, which continues the initial state."""
    first = jnp.zeros((segment_ids.shape[0], 1), bool)
    return jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)


def run_index(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Number of borders up to and including each position; int32, 0 at position 0."""
    return jnp.cumsum(borders(segment_ids).astype(jnp.int32), axis=1)


class Runs(NamedTuple):
    """Run indices as the chunked forms need them; both arrays are int32 ``[b, t]``.

    Attributes:
      here: run index of the position.
      before: run index of the position before it (0 before position 0).
    """

    here: Array
    before: Array


def make_runs(segment_ids: Int[Array, "b t"]) -> Runs:
    """Run indices of a packed row."""
    index = run_index(segment_ids)
    return Runs(index, jnp.concatenate([jnp.zeros_like(index[:, :1]), index[:, :-1]], axis=1))


def _expand(mask: Array, ndim: int) -> Array:
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def segmented_scan_sum(values: Array, reset: Bool[Array, "..."], axis: int) -> Array:
    """Inclusive prefix sums along ``axis`` that restart where ``reset`` is true.

    The operator ``(x, r) . (y, s) = (s ? y : x + y, r | s)`` is associative, so the sum is a tree: its
    rounding grows with the logarithm of the length. Position t is computed from positions <= t alone, and
    nothing crosses a reset, in values or gradients.

    Args:
      values: real or complex values.
      reset: booleans over the leading dimensions of ``values``, at least up to ``axis``.
      axis: the summed axis, non-negative.
    """

    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, r), (y, s) = left, right
        return jnp.where(_expand(s, y.ndim), y, x + y), r | s

    return jax.lax.associative_scan(combine, (values, reset), axis=axis)[0]


def segmented_sum(values: Float[Array, "b t ..."], runs: Int[Array, "b t"] | None) -> Float[Array, "b t ..."]:
    """Inclusive prefix sums over time (axis 1) within each run; over the whole row if ``runs`` is None."""
    if runs is None:
        return jax.lax.associative_scan(jnp.add, values, axis=1)
    changed = runs[:, 1:] != runs[:, :-1]
    reset = jnp.concatenate([jnp.zeros_like(changed[:, :1]), changed], axis=1)
    return segmented_scan_sum(values, reset, 1)
