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

Run = Callable[[Any, Any, Array], tuple[Any, Array]]
Total = Callable[[Any, Any], tuple[Array, Array]]


class _Saved(NamedTuple):
    """Residuals; ``transitions`` and ``continues`` are those of all parts, in their order."""

    pull: Any
    transitions: Array
    continues: Array


def chain(
    run: Run,
    total: Total,
    axis: str,
    operands: Any,
    fixed: Any,
    continues: Bool[Array, " b"],
    initial: Float[Array, "b h k d"],
) -> tuple[Any, Float[Array, "b h k d"], Float[Array, "b h k d"]]:
    """Outputs of this device's part, the state before it, and the state after the last part.

    Equal to ``run`` over all parts one after the other, in values and in gradients by ``operands`` and
    ``initial`` (reverse mode). Communication is an all-gather of ``A`` and ``B`` in the forward pass and of
    ``D`` in the backward pass, whatever the length of a part.

    Args:
      run: ``(operands, fixed, state) -> (outputs, state after)``, differentiable; called once.
      total: ``(operands, fixed) -> (A [b, h, k, k], B [b, h, k, d])`` of this part; not differentiated.
      axis: name of the mesh axis, inside ``jax.shard_map``.
      operands: differentiable arrays of this part.
      fixed: arrays without gradient, such as segment ids.
      continues: whether the part goes on with the state before it, else it begins with zeros.
      initial: state before the first part, equal on all devices.
    """
    return _chain(run, total, axis, operands, fixed, continues, initial)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chain(
    run: Run, total: Total, axis: str, operands: Any, fixed: Any, continues: Array, initial: Array
) -> tuple[Any, Array, Array]:
    return _compute(run, total, axis, operands, fixed, continues, initial)[0]


def _compute(
    run: Run, total: Total, axis: str, operands: Any, fixed: Any, continues: Array, initial: Array
) -> tuple[tuple[Any, Array, Array], _Saved]:
    transitions, added, goes_on = lax.all_gather((*total(operands, fixed), continues), axis)
    state, before = initial, []
    for part in range(goes_on.shape[0]):
        state = keep(goes_on[part], state)
        before.append(state)
        state = _product("bhij,bhjd->bhid", transitions[part], state) + added[part]
    own = _own(before, axis)
    (outputs, _), pull = jax.vjp(lambda x, s: run(x, fixed, s), operands, own)
    return (outputs, own, state), _Saved(pull, transitions, goes_on)


def _forward(run: Run, total: Total, axis: str, *inputs: Any) -> tuple[tuple[Any, Array, Array], _Saved]:
    return _compute(run, total, axis, *jax.tree.map(lambda x: x.value, inputs))


def _backward(
    run: Run, total: Total, axis: str, saved: _Saved, cotangents: tuple[Any, Any, Any]
) -> tuple[Any, None, None, Array]:
    del run, total
    unused = isinstance(cotangents[2], SymbolicZero)
    of_outputs, of_own, of_last = jax.tree.map(_instantiated, cotangents)
    _, local = saved.pull((of_outputs, jnp.zeros_like(of_own)))
    locals_ = lax.all_gather(local + of_own, axis)
    # Every device holds the last state, so each has a part of its gradient.
    gradient, after = of_last if unused else lax.psum(of_last, axis), []
    for part in reversed(range(locals_.shape[0])):
        after.append(gradient)
        gradient = locals_[part] + _product("bhij,bhid->bhjd", saved.transitions[part], gradient)
        gradient = keep(saved.continues[part], gradient)
    of_operands, _ = saved.pull((of_outputs, _own(after[::-1], axis)))
    first = lax.axis_index(axis) == 0
    return of_operands, None, None, jnp.where(first, gradient, 0)


_chain.defvjp(_forward, _backward, symbolic_zeros=True)


def _instantiated(cotangent: Any) -> Array:
    return jnp.zeros(cotangent.shape, cotangent.dtype) if isinstance(cotangent, SymbolicZero) else cotangent


def _product(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, precision=lax.Precision.HIGHEST)


def _own(of_parts: list[Array], axis: str) -> Array:
    return lax.dynamic_index_in_dim(jnp.stack(of_parts), lax.axis_index(axis), 0, keepdims=False)
