"""Arrays taken apart: the parts, and the gradient that is put together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.functional.stacks import unstacked


@pytest.mark.parametrize("shape", [(1, 3), (4,), (3, 2, 5)])
def test_parts_and_gradient(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    weights = jax.random.normal(jax.random.key(1), shape)

    def loss(x, apart):
        parts = unstacked(x) if apart else [x[i] for i in range(shape[0])]
        assert len(parts) == shape[0] and all(part.shape == shape[1:] for part in parts)
        return sum(jnp.sum(jnp.sin(part) * w) for part, w in zip(parts, weights, strict=True))

    value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(x, True)
    wanted, expected = jax.value_and_grad(loss)(x, False)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_a_part_nobody_reads_has_no_gradient():
    gradient = jax.grad(lambda x: jnp.sum(unstacked(x)[1] ** 2))(jnp.ones((3, 2)))
    np.testing.assert_array_equal(gradient, [[0, 0], [2, 2], [0, 0]])
