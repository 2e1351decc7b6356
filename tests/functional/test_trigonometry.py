"""Sine and cosine together, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.functional.trigonometry import MAX_PHASE, sincos


@pytest.mark.parametrize("limit", [1.0, 10.0, 8192.0, MAX_PHASE])
def test_close_to_exact(limit):
    """Random angles, and the float32 numbers nearest to multiples of pi/4, where the quadrant changes."""
    random = np.random.default_rng(0).uniform(-limit, limit, 200_000)
    edges = (
        np.arange(-int(limit / np.pi * 4), int(limit / np.pi * 4) + 1)[:: max(1, int(limit / 1000))]
        * np.pi
        / 4
    )
    angles = np.concatenate([random, edges]).astype(np.float32)
    sin, cos = jax.jit(sincos)(angles)
    exact = angles.astype(np.float64)
    assert np.max(np.abs(np.asarray(sin) - np.sin(exact))) < 1e-7
    assert np.max(np.abs(np.asarray(cos) - np.cos(exact))) < 1e-7


def test_exact_at_zero():
    sin, cos = sincos(jnp.zeros((1,)))
    assert float(sin[0]) == 0.0 and float(cos[0]) == 1.0


def test_angles_without_meaning_are_nan():
    angles = jnp.asarray([MAX_PHASE * 1.01, -1e30, np.inf, -np.inf, np.nan], jnp.float32)
    for part in sincos(angles):
        assert np.all(np.isnan(part))


def test_derivatives():
    angles = jnp.asarray([-3.0, 0.1, 2.0, 50.0])
    sin, cos = sincos(angles)
    d_sin, d_cos = jax.jvp(sincos, (angles,), (jnp.ones(4),))[1]
    np.testing.assert_array_equal(d_sin, cos)
    np.testing.assert_array_equal(d_cos, -sin)


def test_float64_is_the_library():
    with jax.enable_x64(True):
        angles = jnp.linspace(-1e6, 1e6, 100)
        sin, cos = sincos(angles)
        np.testing.assert_array_equal(sin, jnp.sin(angles))
        np.testing.assert_array_equal(cos, jnp.cos(angles))
