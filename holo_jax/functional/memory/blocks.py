"""A loop over blocks of time whose gradient keeps the inputs and one state per block, nothing else.

``lax.scan`` over a rematerialised body would keep the same, but needs its inputs with the block axis first:
a transposed copy of every input, held until the backward pass. Here blocks are cut out of, and gradients
written into, arrays in their own layout.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from holo_jax.array_types import Array
from holo_jax.functional.varying import vary_together

Tree = Any
Body = Callable[[Tree, Tree, Tree], tuple[Tree, Array]]


def _cut(tree: Tree, index: Array | int, length: int) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index * length, length, axis=1), tree)


def _paste(tree: Tree, blocks: Tree, index: Array, length: int) -> Tree:
    return jax.tree.map(
        lambda x, y: lax.dynamic_update_slice_in_dim(x, y, index * length, axis=1), tree, blocks
    )


def _count(inputs: Tree, length: int) -> int:
    return jax.tree.leaves(inputs)[0].shape[1] // length


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan_blocks(body: Body, length: int, state: Tree, inputs: Tree, aux: Tree) -> tuple[Array, Tree]:
    """Runs ``state, output = body(state, inputs_block, aux_block)`` over consecutive blocks of time.

    Args:
      body: a function of its arguments alone (no captured arrays); its output is ``[b, length, ...]``.
      length: block length; divides the time of every input.
      state: tree of floating-point arrays.
      inputs: tree of floating-point arrays with time on axis 1; differentiated.
      aux: tree of integer arrays with time on axis 1, or None; not differentiated.

    Returns:
      Outputs ``[b, t, ...]`` and the last state. Reverse mode only, once: the backward pass walks the blocks
      from last to first, recomputes each from its saved state, and is not itself differentiable.
    """
    return _forward(body, length, state, inputs, aux)[0]


def _forward(
    body: Body, length: int, state: Tree, inputs: Tree, aux: Tree
) -> tuple[tuple[Array, Tree], Tree]:
    count = _count(inputs, length)
    if count == 1:
        last, output = body(state, inputs, aux)
        return (output, last), jax.tree.map(lambda x: x[None], state)
    shape = jax.eval_shape(body, state, _cut(inputs, 0, length), _cut(aux, 0, length))[1]
    outputs = jnp.zeros((shape.shape[0], count * length, *shape.shape[2:]), shape.dtype)
    outputs = vary_together((outputs, inputs))[0]

    def visit(carry: tuple[Tree, Array], index: Array) -> tuple[tuple[Tree, Array], Tree]:
        state, outputs = carry
        new, output = body(state, _cut(inputs, index, length), _cut(aux, index, length))
        return (new, _paste(outputs, output, index, length)), state

    (last, outputs), states = lax.scan(visit, (state, outputs), jnp.arange(count))
    return (outputs, last), states


def _fwd(body: Body, length: int, state: Tree, inputs: Tree, aux: Tree) -> tuple[tuple[Array, Tree], tuple]:
    result, states = _forward(body, length, state, inputs, aux)
    return result, (states, inputs, aux)


def _bwd(body: Body, length: int, saved: tuple, cotangent: tuple[Array, Tree]) -> tuple[Tree, Tree, None]:
    states, inputs, aux = saved
    d_outputs, d_state = cotangent
    count = _count(inputs, length)

    def pull(state: Tree, block: Tree, aux_block: Tree, d_state: Tree, d_output: Array) -> tuple[Tree, Tree]:
        _, vjp = jax.vjp(lambda s, x: body(s, x, aux_block), state, block)
        return vjp((d_state, d_output))

    if count == 1:
        d_state, d_inputs = pull(jax.tree.map(lambda x: x[0], states), inputs, aux, d_state, d_outputs)
        return d_state, d_inputs, None

    def visit(carry: tuple[Tree, Tree], item: tuple[Array, Tree]) -> tuple[tuple[Tree, Tree], None]:
        d_state, d_inputs = carry
        index, state = item
        d_state, d_block = pull(
            state,
            _cut(inputs, index, length),
            _cut(aux, index, length),
            d_state,
            _cut(d_outputs, index, length),
        )
        return (d_state, _paste(d_inputs, d_block, index, length)), None

    start = (d_state, vary_together((jax.tree.map(jnp.zeros_like, inputs), inputs))[0])
    (d_state, d_inputs), _ = lax.scan(visit, start, (jnp.arange(count), states), reverse=True)
    return d_state, d_inputs, None


scan_blocks.defvjp(_fwd, _bwd)
