"""Unit lower triangular inverse: values, gradient, and the case that breaks the Neumann product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.functional.memory.triangular import unit_lower_inverse

inverse = jax.jit(unit_lower_inverse)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_matches_numpy(size):
    strict = np.tril(np.random.default_rng(0).uniform(-1, 1, (2, 3, size, size)), -1) / np.sqrt(size)
    got = inverse(jnp.asarray(strict, jnp.float32))
    np.testing.assert_allclose(got, np.linalg.inv(np.eye(size) + strict), atol=1e-5)


def test_equal_keys():
    """All ones below the diagonal: powers of it reach 1e18, its unit inverse has entries 1, -1 and 0."""
    got = inverse(jnp.tril(jnp.ones((64, 64)), -1))
    np.testing.assert_array_equal(got, np.eye(64) - np.eye(64, k=-1))


def test_zero_blocks_stay_zero():
    """Two runs of positions that do not interact: no trace of one in the other."""
    strict = jnp.tril(jax.random.normal(jax.random.key(0), (16, 16)), -1)
    same = jnp.arange(16) < 5
    got = inverse(jnp.where(same[:, None] == same[None, :], strict, 0.0))
    assert not np.any(np.asarray(got)[5:, :5])


def test_gradient():
    with jax.enable_x64(True):
        strict, weight = (jnp.asarray(x) for x in np.random.default_rng(0).normal(size=(2, 7, 7)) * 0.3)
        got = jax.jit(jax.grad(lambda x: jnp.sum(weight * unit_lower_inverse(x))))(strict)
        direct = jax.grad(lambda x: jnp.sum(weight * jnp.linalg.inv(jnp.eye(7) + jnp.tril(x, -1))))(strict)
        np.testing.assert_allclose(got, direct, atol=1e-12)
