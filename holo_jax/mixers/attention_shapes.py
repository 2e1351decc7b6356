"""cuDNN's attention in a trace for a card that is not here: what it is given, keeps and returns, by shape.

JAX asks the device and its libraries when it traces the real one. This one counts as a kernel as that does,
and cannot run.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.array_types import Array, Float


@jax.custom_vjp
def attention_shapes(
    queries: Float[Array, "b t h d"],
    keys: Float[Array, "b t h d"],
    values: Float[Array, "b t h d"],
    bias: Float[Array, "b _ t t"] | None,
) -> Float[Array, "b t h d"]:
    """The shape of softmax attention; ``bias``, which a mask becomes, has no gradient."""
    return _forward(queries, keys, values, bias)[0]


def _forward(queries: Array, keys: Array, values: Array, bias: Array | None) -> tuple[Array, Any]:
    b, t, h, _ = queries.shape
    sums = jax.ShapeDtypeStruct((b, h, t), jnp.float32)
    given = [queries, keys, values, *(() if bias is None else (bias,))]
    outputs, normalisers = _kernel("attention", (queries, sums), *given)
    return outputs, (*given, normalisers, outputs)


def _backward(saved: Any, cotangent: Array) -> Any:
    return *_kernel("attention_backward", saved[:3], *saved, cotangent), None


def _kernel(name: str, results: Any, *given: Array) -> Any:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results]
    return pl.pallas_call(lambda *_: None, out_shape=shapes, name=name)(*given)


attention_shapes.defvjp(_forward, _backward)
