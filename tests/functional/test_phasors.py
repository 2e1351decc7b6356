"""Turns and exact phases, against Python's integers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holo_jax.functional import (
    generate_multiscale_phasors,
    generate_random_phasors,
    phases_at,
    rope_frequencies,
    rotors,
)

KEY = jax.random.key(0)
UINT32 = st.integers(0, 2**32 - 1)


def _exact(turns, position):
    units = turns * position % 2**32
    return 2 * math.pi * (units - 2**32 if units >= 2**31 else units) / 2**32


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(UINT32, min_size=3, max_size=3), st.lists(UINT32, min_size=4, max_size=4))
def test_phase_is_exact_at_any_position(turns, positions):
    got = phases_at(jnp.asarray(turns, jnp.uint32), jnp.asarray([positions], jnp.uint32))
    want = [[[_exact(n, t) for n in turns] for t in positions]]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-7)


def test_phase_at_the_last_position():
    turns, positions = (
        jnp.asarray([[1, 2**31], [3, 2**32 - 1]], jnp.uint32),
        jnp.asarray([[2**32 - 1]], jnp.uint32),
    )
    quarter = 2 * math.pi / 2**32
    want = [[[[-quarter, -math.pi], [-3 * quarter, quarter]]]]
    np.testing.assert_allclose(phases_at(turns, positions), want, rtol=1e-6)


def test_quarter_turns():
    """A frequency of a quarter turn: 1, i, -1, -i, 1."""
    got = rotors(jnp.asarray([2**30], jnp.uint32), jnp.arange(5, dtype=jnp.uint32)[None])
    assert got.dtype == jnp.complex64
    np.testing.assert_allclose(got[0, :, 0], [1, 1j, -1, -1j, 1], atol=2e-7)


def test_phases_of_other_integers_are_refused():
    turns, positions = jnp.zeros((2,), jnp.uint32), jnp.zeros((1, 3), jnp.uint32)
    with pytest.raises(TypeError):
        phases_at(turns, positions.astype(jnp.int32))
    with pytest.raises(TypeError):
        phases_at(turns.astype(jnp.int32), positions)


def test_uniform_turns_fill_the_circle():
    turns = np.asarray(generate_random_phasors(KEY, (4, 5000)))
    assert turns.dtype == np.uint32 and turns.shape == (4, 5000)
    assert abs(np.mean(np.exp(2j * np.pi * turns / 2**32))) < 3 / np.sqrt(turns.size)


@pytest.mark.parametrize("std", [0.1, 0.5, 1.0])
def test_normal_turns_have_the_given_deviation(std):
    turns = np.asarray(generate_random_phasors(KEY, (20000,), distribution="normal", std=std))
    radians = turns.astype(np.int32) * (2 * np.pi / 2**32)
    # E e^{ix} = exp(-std^2 / 2) for x ~ N(0, std^2), wrapped or not.
    assert abs(np.mean(np.exp(1j * radians)) - np.exp(-(std**2) / 2)) < 3 / np.sqrt(turns.size)


def test_normal_turns_use_all_bits():
    """Each low bit varies, so the period of a frequency is long; a rounded normal variate has zeros there."""
    turns = np.asarray(generate_random_phasors(KEY, (20000,), distribution="normal", std=10.0))
    for bit in range(8):
        assert abs(np.mean(turns >> bit & 1) - 0.5) < 0.05


def test_multiscale_heads():
    turns = generate_multiscale_phasors(KEY, 3, 20000, std_max=1.0, std_min=0.01)
    assert turns.shape == (3, 20000) and turns.dtype == jnp.uint32
    radians = np.asarray(turns).astype(np.int32) * (2 * np.pi / 2**32)
    np.testing.assert_allclose(np.std(radians[1:], axis=1), [0.1, 0.01], rtol=0.03)
    assert abs(np.mean(np.cos(radians[0])) - np.exp(-0.5)) < 0.02
    assert generate_multiscale_phasors(KEY, 1, 4).shape == (1, 4)


def test_rope_frequencies():
    np.testing.assert_allclose(rope_frequencies(4, 10000.0), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: generate_random_phasors(KEY, (2,), distribution="cauchy"), "distribution is 'cauchy'"),
        (lambda: generate_random_phasors(KEY, (2,), distribution="normal", std=0.0), "std is 0.0"),
        (lambda: generate_multiscale_phasors(KEY, 0, 4), "heads is 0"),
        (lambda: generate_multiscale_phasors(KEY, 2, 4, std_min=2.0, std_max=1.0), "std_min is 2.0"),
        (lambda: rope_frequencies(0), "n is 0"),
        (lambda: rope_frequencies(4, 1.0), "base is 1.0"),
    ],
)
def test_errors_name_field_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
