"""What a computation traced now will run on: the default device, or a card that is not here and is told.

Kernels are chosen while a program is traced, by what the process sees. A plan for another card traces inside
``kernels.capability.planned_for`` instead. What is told is part of the key of jax's own caches, so no trace
made for a card is used for the devices present, nor the other way round, and it holds in its thread alone.
"""

from typing import Any, NamedTuple

import jax


class Card(NamedTuple):
    """A GPU that a trace is made for.

    Attributes:
      compute_capability: CUDA compute capability, (9, 0) for Hopper.
      multiprocessors: how many programs run side by side.
    """

    compute_capability: tuple[int, int]
    multiprocessors: int


TOLD: Any = jax.make_user_context(default_value=None)


def told() -> Card | None:
    """The card that the trace made now is for, or None: it is for the devices present."""
    card: Card | None = TOLD.value
    return card


def platform() -> str:
    """``"gpu"``, ``"cpu"``, ...: of the told card, else of the default backend."""
    return jax.default_backend() if told() is None else "gpu"
