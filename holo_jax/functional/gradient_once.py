"""A border for the compiler in the backward pass."""

import jax

from holo_jax.array_types import Array
from holo_jax.target import told


@jax.custom_vjp
def gradient_once(x: Array) -> Array:
    """x itself; on CPUs its gradient is computed once and stored. Reverse mode only.

    For results of matrix products, whose gradients go into two more products. Left alone, XLA on CPUs
    computes what leads to such a gradient (a silu, a gate) anew for each of them, once in transposed order: a
    quarter of the quick start's step. Elsewhere nothing changes.
    """
    return x


def _forward(x: Array) -> tuple[Array, None]:
    return x, None


def _backward(_: None, gradient: Array) -> tuple[Array]:
    if told() is not None:
        return (gradient,)
    stored = jax.lax.platform_dependent(gradient, cpu=jax.lax.optimization_barrier, default=lambda g: g)
    return (stored,)


gradient_once.defvjp(_forward, _backward)
