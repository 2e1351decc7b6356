"""Denoiser and loss by backend: what runs where, and that the kernels are given the right arguments."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.blocks import rematerialised
from holo_jax.functional.cross_entropy import IGNORE, chunked_cross_entropy
from holo_jax.kernels import linear_cross_entropy, swiglu
from holo_jax.kernels import linear_cross_entropy as loss_entry
from tests.holo_jax.kernel_package import install


@pytest.fixture
def kernels(monkeypatch):
    """Calls of the package that stands in for the kernels, as on one device."""
    calls = install(monkeypatch)
    for module in ("holo_jax.kernels.products.swiglu", "holo_jax.kernels.products.linear_cross_entropy"):
        monkeypatch.setattr(sys.modules[module], "partitioned", lambda: False)
    return calls


def draw(dtype=jnp.bfloat16, width=64, hidden=256, rows=64):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, rows, width), dtype)
    gate, up = (jax.random.normal(k, (width, hidden)) / 8 for k in keys[1:3])
    return x, gate, up, jax.random.normal(keys[3], (hidden, width)) / 16


def test_the_kernel_computes_the_denoiser(kernels):
    x, gate, up, down = draw()
    found = swiglu(x, gate, up, down)
    assert kernels == [("swiglu", (2, 64, 64), (64, 2, 256))]
    wanted = swiglu(x, gate, up, down, backend="portable")
    assert len(kernels) == 1 and found.dtype == wanted.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), wanted.astype(jnp.float32), atol=0.02)


@pytest.mark.parametrize(
    "changes", [dict(dtype=jnp.float32), dict(hidden=192), dict(rows=63), dict(width=48)]
)
def test_other_calls_of_the_denoiser_are_portable(kernels, changes):
    swiglu(*draw(**changes))
    assert kernels == []


def test_the_kernel_computes_the_loss(kernels):
    hidden = jax.random.normal(jax.random.key(1), (2, 8, 64), jnp.bfloat16)
    weights = jax.random.normal(jax.random.key(2), (64, 50)) / 8
    targets = jax.random.randint(jax.random.key(3), (2, 8), 0, 50).at[:, -1].set(IGNORE)
    total, count = loss_entry(hidden, weights, targets, chunk_tokens=256)
    assert kernels == [("loss", (16, 64), (50, 64), 256)]
    wanted, counted = chunked_cross_entropy(hidden, weights, targets, chunk_tokens=256)
    assert count == counted == 14
    np.testing.assert_allclose(total, wanted, rtol=2e-2)
    linear_cross_entropy(hidden, weights, targets, chunk_tokens=256, backend="portable")
    linear_cross_entropy(hidden.astype(jnp.float32), weights, targets, chunk_tokens=256)
    assert len(kernels) == 1


@pytest.mark.parametrize("rows, chunk", [(9, 256), (40, 32), (32, 7)])
def test_the_gradient_of_the_loss_is_formed_by_chunks(kernels, rows, chunk):
    """Rows and vocabulary that are no multiples of the kernels', in one chunk or several."""
    hidden = jax.random.normal(jax.random.key(1), (2, rows, 64), jnp.bfloat16)
    weights = jax.random.normal(jax.random.key(2), (64, 50)) / 8
    targets = jax.random.randint(jax.random.key(3), (2, rows), 0, 50).at[:, -1].set(IGNORE)

    def mean(hidden, weights, backend):
        total, count = loss_entry(hidden, weights, targets, chunk_tokens=chunk, backend=backend)
        return total / count

    both = jax.jit(jax.value_and_grad(mean, (0, 1)), static_argnums=2)
    value, gradients = both(hidden, weights, "auto")
    padded, step = -(-2 * rows // 16) * 16, -(-chunk // 16) * 16
    lengths = [min(step, padded - start) for start in range(0, padded, step)]
    assert kernels == [("chunk", (length, 64), (64, 64)) for length in lengths]
    assert [x.dtype for x in gradients] == [hidden.dtype, weights.dtype]
    rounded = weights.astype(hidden.dtype).astype(weights.dtype)
    wanted, expected = both(hidden.astype(jnp.float32), rounded, "portable")
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for found, exact in zip(gradients, expected, strict=True):
        assert found.shape == exact.shape
        found, exact = np.asarray(found, np.float32), np.asarray(exact)
        assert np.linalg.norm(found - exact) < 2**-8 * np.linalg.norm(exact)


@pytest.mark.parametrize("remat, runs", [("dots", 1), ("full", 2)])
def test_what_kernels_made_is_not_computed_twice(remat, runs):
    """Residuals of a kernel with a batching rule are kept by "dots", made again by "full"."""

    @jax.custom_batching.custom_vmap
    def kernel(x):
        return jnp.sin(x)

    kernel.def_vmap(lambda size, batched, x: (kernel(x), batched[0]))

    @jax.custom_vjp
    def op(x):
        return kernel(x)

    op.defvjp(lambda x: (kernel(x),) * 2, lambda y, cotangent: (y * cotangent,))

    def loss(x):
        body = rematerialised(lambda x: jnp.cos(op(jnp.exp(x))), remat, looped=False)
        return jnp.sum(body(x))

    text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones(3)))
    assert text.count("custom_vmap_call") == runs
