"""Binding is an isometry that unbinding inverts; retrieval scales count what was written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holo_jax.functional import bind, retrieval_scale, unbind

BINDINGS = ("hadamard", "outer")
scale_of = jax.jit(retrieval_scale, static_argnames=("kind", "eps"))
FINITE = st.floats(-1e3, 1e3, width=32)
VECTOR = st.lists(FINITE, min_size=4, max_size=4).map(lambda x: np.asarray(x, np.float32))


@pytest.mark.parametrize("binding", BINDINGS)
@settings(deadline=None, derandomize=True, max_examples=30)
@given(phases=VECTOR, values=VECTOR)
def test_bind_preserves_norms_and_unbind_inverts_it(binding, phases, values):
    bound = bind(jnp.asarray(phases), jnp.asarray(values), binding=binding)
    norm = np.linalg.norm(values.astype(np.float64))
    assert bound.dtype == jnp.complex64
    assert abs(np.linalg.norm(np.asarray(bound, np.complex128)) - norm) <= 1e-6 * norm
    read = unbind(jnp.asarray(phases), bound, binding=binding)
    assert read.dtype == jnp.float32
    np.testing.assert_allclose(read, values, rtol=0, atol=1e-6 * np.abs(values).max())


@settings(deadline=None, derandomize=True, max_examples=30)
@given(a=VECTOR, b=VECTOR, values=VECTOR)
def test_reading_another_key_scales_by_the_kernel(a, b, values):
    """outer: unbind(b, bind(a, v)) = mean cos(a - b) v; hadamard: cos(a - b) v."""
    a, b = a % 6.0, b % 6.0
    for binding in BINDINGS:
        kernel = np.cos(a.astype(np.float64) - b)
        kernel = kernel.mean() if binding == "outer" else kernel
        read = unbind(
            jnp.asarray(b), bind(jnp.asarray(a), jnp.asarray(values), binding=binding), binding=binding
        )
        np.testing.assert_allclose(read, kernel * values, rtol=0, atol=2e-6 * (np.abs(values).max() + 1e-30))


def test_hand_written_bindings():
    phases, values = jnp.asarray([0.0, np.pi / 2], jnp.float32), jnp.asarray([2.0, 3.0])
    np.testing.assert_allclose(bind(phases, values, binding="hadamard"), [2.0, 3.0j], atol=1e-6)
    want = np.asarray([[2.0, 3.0], [2.0j, 3.0j]]) / np.sqrt(2.0)
    np.testing.assert_allclose(bind(phases, values, binding="outer"), want, atol=1e-6)


def test_narrow_values_are_widened_exactly():
    phases = jnp.zeros((3,))
    values = jnp.asarray([0.1, -7.0, 300.0], jnp.bfloat16)
    bound = bind(phases, values, binding="hadamard")
    assert bound.dtype == jnp.complex64
    np.testing.assert_array_equal(bound.real, values.astype(jnp.float32))


def test_scales_by_hand():
    gates = jnp.asarray([1.0, 0.5, 0.0, 1.0, 0.5]).reshape(1, 5, 1)
    segments = jnp.asarray([[4, 4, 4, 2, 2]], jnp.int32)
    time = scale_of("sqrt_time", gates, segment_ids=segments, initial_steps=jnp.asarray([3]))
    np.testing.assert_allclose(time.ravel() ** 2, [4, 5, 6, 1, 2], rtol=1e-6)
    writes = scale_of("sqrt_writes", gates, segment_ids=segments, initial_writes=jnp.asarray([[2.0]]))
    np.testing.assert_allclose(writes.ravel() ** 2, [3, 3.25, 3.25, 1, 1.25], rtol=1e-5)
    np.testing.assert_array_equal(scale_of("none", gates), jnp.ones((1, 5, 1)))
    np.testing.assert_allclose(scale_of("sqrt_time", gates).ravel() ** 2, [1, 2, 3, 4, 5], rtol=1e-6)


def test_scales_agree_for_open_gates_and_do_not_leak():
    gates = jnp.ones((2, 9, 3))
    time, writes = (scale_of(kind, gates) for kind in ("sqrt_time", "sqrt_writes"))
    np.testing.assert_allclose(time, writes, rtol=1e-6)
    segments = jnp.asarray([[0] * 5 + [1] * 4] * 2, jnp.int32)

    def later(gates, initial):
        scale = scale_of("sqrt_writes", gates, segment_ids=segments, initial_writes=initial)
        return jnp.sum(scale[:, 5:])

    gradient = jax.jit(jax.grad(later, argnums=(0, 1)))
    to_gates, to_initial = gradient(gates, jnp.ones((2, 3)))
    assert not np.any(to_gates[:, :5]) and not np.any(to_initial) and np.all(to_gates[:, 5:] != 0)


def test_silent_gate_has_a_finite_scale_and_gradient():
    gates = jnp.zeros((1, 3, 1))
    scale, pull = jax.vjp(lambda g: scale_of("sqrt_writes", g, eps=1e-4), gates)
    np.testing.assert_allclose(scale, np.full((1, 3, 1), 1e-2), rtol=1e-6)
    assert np.all(np.isfinite(pull(scale)[0]))
