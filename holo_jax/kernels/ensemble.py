"""Any backend under ``jax.vmap``: members of an ensemble become rows of the batch.

``accumulate`` has no parameters, so models that are trained side by side by ``jax.vmap`` differ in its
arguments only, and their rows are one larger batch. Kernels, which have no batching rule, can then be used,
and portable products stay as large as they can be. Under ``jax.grad`` the backward pass computes the forward
pass again, because what a kernel keeps for it need not have the batch first.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from holo_jax.array_types import Array
from holo_jax.functional import MemoryState
from holo_jax.kernels.call import Call

Tree = Any
Run = Callable[[Call], tuple[Array, MemoryState]]


def accumulate(run: Run, call: Call) -> tuple[Array, MemoryState]:
    """``run(call)``, where every enclosing ``jax.vmap`` merges its axis into the batch of the call.

    Args:
      run: a backend.
      call: its arguments, well formed.
    """
    rows = call.values.shape[0]
    write, read = (jnp.broadcast_to(p, (rows, *p.shape[1:])) for p in (call.write_phases, call.read_phases))

    def forward(inputs: Tree, segment_ids: Array | None) -> tuple[Array, MemoryState]:
        write, read, values, gates, erase, state = inputs
        return run(
            Call(
                write,
                read,
                values,
                gates,
                erase,
                binding=call.binding,
                method=call.method,
                segment_ids=segment_ids,
                initial_state=state,
                chunk_size=call.chunk_size,
            )
        )

    def backward(inputs: Tree, segment_ids: Array | None, cotangent: Tree) -> Tree:
        return jax.vjp(lambda x: forward(x, segment_ids), inputs)[1](cotangent)[0]

    merged_forward, merged_backward = _merged(forward), _merged(backward)

    @jax.custom_vjp
    def op(inputs: Tree, segment_ids: Array | None) -> tuple[Array, MemoryState]:
        return merged_forward(inputs, segment_ids)

    def op_forward(inputs: Tree, segment_ids: Array | None) -> tuple[Tree, Tree]:
        return op(inputs, segment_ids), (inputs, segment_ids)

    def op_backward(saved: Tree, cotangent: Tree) -> tuple[Tree, None]:
        return merged_backward(*saved, cotangent), None

    op.defvjp(op_forward, op_backward)
    return op((write, read, call.values, call.gates, call.erase, call.initial_state), call.segment_ids)


def _merged(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """A function of arrays with rows first, all equally many, that vmaps by having more rows."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, batched: Tree, *arguments: Tree) -> tuple[Tree, Tree]:
        def merge(x: Array, is_batched: bool) -> Array:
            whole = x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))
            return whole.reshape(size * whole.shape[1], *whole.shape[2:])

        results = mapped(*jax.tree.map(merge, arguments, tuple(batched)))
        split = jax.tree.map(lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, results)

    return mapped
