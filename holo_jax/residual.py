"""What a block leaves to be added to the residual stream by the kernel that norms it next."""

from typing import NamedTuple

from holo_jax.array_types import Array, Float
from holo_jax.parallel import divides_tokens, layout, sharded


class Pending(NamedTuple):
    """``delta + offset``, to be added to the residual stream.

    Attributes:
      delta: ``[b, t, e]``.
      offset: the bias behind it, where it has one, as it is kept: ``[1, 1, e]`` on every device. It lies as
        ``delta`` does, so its gradient stays a device's own until the parameter's is summed.
    """

    delta: Float[Array, "b t e"]
    offset: Float[Array, "_ _ e"] | None = None


def summands(pending: Pending | None) -> tuple[Array | None, Array | None]:
    """(delta, offset ``[e]``) for kernels, where a block runs."""
    if pending is None:
        return None, None
    return pending.delta, None if pending.offset is None else pending.offset[0, 0]


def added(x: Float[Array, "b t e"], pending: Pending | None) -> Float[Array, "b t e"]:
    """x with what is pending, where a block runs."""
    if pending is None:
        return x
    delta, offset = pending
    return x + (delta if offset is None else delta + offset.astype(delta.dtype))


def settled(x: Float[Array, "b t e"], pending: Pending | None) -> Float[Array, "b t e"]:
    """The same between blocks."""
    if pending is None or pending.offset is None or not divides_tokens():
        return added(x, pending)
    rows = layout("b t")
    return sharded(added, (rows, rows), rows)(x, pending)
