"""A recurrence whose parts are on the devices along a mesh axis, each part read once.

To a part, whatever came before is one state, and the part is an affine map of it, ``S_out = A S_in + B``. The
maps are found first, without outputs, and exchanged; every device then begins with its true state. Backwards,
the gradient of a state is such a map too: with ``D`` the gradient of a part's outputs by the state that it
begins with,

    G_in = D + A^T G_out,

so devices exchange their ``D`` and end with their true gradient. Both exchanges are of the size of a state.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from holo_jax.array_types import Array, Bool, Float
from holo_jax.functional.memory.chunks import keep


class Part(NamedTuple):
    """How a device computes its part; each step hands the next what it has found. Hashable.

    Attributes:
      map: ``(operands, fixed) -> (A [b, h, k, k], B [b, h, k, d], found)``.
      read: ``(operands, fixed, found, state) -> (outputs, saved)``, from the state before the part.
      gradient: ``(saved, d_outputs) -> (D [b, h, k, d], found)``.
      finish: ``(saved, found, d_outputs, d_state) -> d_operands``, with the gradient of the state after the
        part.
    """

    map: Callable[[Any, Any], tuple[Array, Array, Any]]
    read: Callable[[Any, Any, Any, Array], tuple[Any, Any]]
    gradient: Callable[[Any, Any], tuple[Array, Any]]
    finish: Callable[[Any, Any, Any, Array], Any]


class _Saved(NamedTuple):
    """Residuals; ``transitions`` and ``continues`` are those of all parts, in their order."""

    of_part: Any
    transitions: Array
    continues: Array


def chain(
    part: Part,
    axis: str,
    operands: Any,
    fixed: Any,
    continues: Bool[Array, " b"],
    initial: Float[Array, "b h k d"],
) -> tuple[Any, Float[Array, "b h k d"], Float[Array, "b h k d"]]:
    """Outputs of this device's part, the state before it, and the state after the last part.

    Equal to reading all parts one after the other, in values and in gradients by ``operands`` and ``initial``
    (reverse mode). Communication is an all-gather of ``A`` and ``B`` in the forward pass and of ``D`` in the
    backward pass, whatever the length of a part.

    Args:
      part: how a part is computed.
      axis: name of the mesh axis, inside ``jax.shard_map``.
      operands: differentiable arrays of this part.
      fixed: arrays without gradient, such as segment ids.
      continues: whether the part goes on with the state before it, else it begins with zeros.
      initial: state before the first part, equal on all devices.
    """
    return _chain(part, axis, operands, fixed, continues, initial)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chain(
    part: Part, axis: str, operands: Any, fixed: Any, continues: Array, initial: Array
) -> tuple[Any, Array, Array]:
    return _compute(part, axis, operands, fixed, continues, initial)[0]


def _compute(
    part: Part, axis: str, operands: Any, fixed: Any, continues: Array, initial: Array
) -> tuple[tuple[Any, Array, Array], _Saved]:
    transition, added, found = part.map(operands, fixed)
    transitions, increments, goes_on = lax.all_gather((transition, added, continues), axis)
    state, before = initial, []
    for each in range(goes_on.shape[0]):
        state = keep(goes_on[each], state)
        before.append(state)
        state = _product("bhij,bhjd->bhid", transitions[each], state) + increments[each]
    own = own_part(before, axis)
    outputs, saved = part.read(operands, fixed, found, own)
    return (outputs, own, state), _Saved(saved, transitions, goes_on)


def _forward(part: Part, axis: str, *inputs: Any) -> tuple[tuple[Any, Array, Array], _Saved]:
    return _compute(part, axis, *jax.tree.map(lambda x: x.value, inputs))


def _backward(
    part: Part, axis: str, saved: _Saved, cotangents: tuple[Any, Any, Any]
) -> tuple[Any, None, None, Array]:
    unused = isinstance(cotangents[2], SymbolicZero)
    of_outputs, of_own, of_last = jax.tree.map(_instantiated, cotangents)
    local, found = part.gradient(saved.of_part, of_outputs)
    locals_ = lax.all_gather(local + of_own, axis)
    # Every device holds the last state, so each has a part of its gradient.
    gradient, after = of_last if unused else lax.psum(of_last, axis), []
    for each in reversed(range(locals_.shape[0])):
        after.append(gradient)
        gradient = locals_[each] + _product("bhij,bhid->bhjd", saved.transitions[each], gradient)
        gradient = keep(saved.continues[each], gradient)
    of_operands = part.finish(saved.of_part, found, of_outputs, own_part(after[::-1], axis))
    first = lax.axis_index(axis) == 0
    return of_operands, None, None, jnp.where(first, gradient, 0)


_chain.defvjp(_forward, _backward, symbolic_zeros=True)


def _instantiated(cotangent: Any) -> Array:
    return jnp.zeros(cotangent.shape, cotangent.dtype) if isinstance(cotangent, SymbolicZero) else cotangent


def _product(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, precision=lax.Precision.HIGHEST)


def own_part(of_parts: list[Array], axis: str) -> Array:
    """What belongs to this device of what was found for every part, in their order."""
    return lax.dynamic_index_in_dim(jnp.stack(of_parts), lax.axis_index(axis), 0, keepdims=False)
