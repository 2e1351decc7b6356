"""Products of rows with weights, and their gradients, left to the compiler."""

from typing import Any

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array


def product(x: Array, weight: Array, dtype: Any) -> Array:
    """``[n, i] @ [i, o]``, operands in the dtype of x."""
    return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=dtype)


def back(cotangent: Array, weight: Array, dtype: Any) -> Array:
    """The gradient of the input of a product, ``[n, o] @ [i, o]^T``."""
    axes = (((1,), (1,)), ((), ()))
    operands = cotangent.astype(dtype), weight.astype(dtype)
    return jax.lax.dot_general(*operands, axes, preferred_element_type=dtype)


def of_weight(x: Array, cotangent: Array, weight: Array) -> Array:
    """The gradient of a weight, ``[n, i]^T @ [n, o]``, in the dtype of the weight."""
    axes = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(x, cotangent.astype(x.dtype), axes, preferred_element_type=weight.dtype)


def apart(x: Array, cotangent: Array) -> tuple[Array, Array]:
    """Operands of a product of its own: the compiler would join those that share one, and copy the others."""
    return jax.lax.optimization_barrier((x, cotangent))


def products(x: Array, weights: Any, dtypes: Any) -> tuple[Array, ...]:
    """Products of x, each of its own as in ``apart``; weights stay where the compiler can slice them."""
    found = []
    for weight, dtype in zip(weights, dtypes, strict=True):
        found.append(product(x, weight, dtype))
        x = jax.lax.optimization_barrier(x)
    return tuple(found)


def like(gradients: Any, arrays: Any) -> Any:
    """Gradients in the dtypes of what they are of."""
    return jax.tree.map(lambda g, x: g.astype(x.dtype), tuple(gradients), tuple(arrays))
