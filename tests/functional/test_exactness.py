"""Exact zeros: nothing from the future, nothing across a border, in values and in gradients."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.functional.cases import BATCH, FAST_COMPILE, METHODS, RULES, forward, make_inputs, run

TIME, HERE, CUT = 63, 37, 41
PER_TIME = ("write", "read", "values", "gates", "erase")
# Two chunks of 8 in the middle of a chunk see the border and the reading position.
CHUNK = {"recurrent": None, "associative_scan": None, "chunked": 8}


@cache
def _gradient_at(rule, method):
    """Gradient of the outputs at one (traced) position."""

    def chosen(inputs, segments, position):
        outputs, _ = run(inputs, rule, method, segments, CHUNK[method])
        return jnp.sum(jnp.sin(jax.lax.dynamic_index_in_dim(outputs, position, 1)))

    return jax.jit(jax.grad(chosen), compiler_options=FAST_COMPILE)


def _zero(x):
    return not np.any(np.asarray(x))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_reaches_the_past_and_not_the_future(rule, method):
    inputs = make_inputs(rule, TIME, dtype="float32")
    gradient = _gradient_at(rule, method)(inputs, np.zeros((BATCH, TIME), np.int32), HERE)
    for name in PER_TIME:
        if name in inputs:
            assert _zero(gradient[name][:, HERE + 1 :]), name
            start = HERE if name == "read" else 0
            assert all(np.any(np.asarray(gradient[name][:, t])) for t in range(start, HERE + 1)), name
    assert not _zero(gradient["memory"])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_does_not_cross_a_border(rule, method):
    inputs = make_inputs(rule, TIME, dtype="float32")
    segments = np.where(np.arange(TIME) < CUT, 3, 1).astype(np.int32)[None].repeat(BATCH, 0)
    gradient = _gradient_at(rule, method)(inputs, segments, TIME - 1)
    for name in PER_TIME:
        if name in inputs:
            assert _zero(gradient[name][:, :CUT]), name
            assert not _zero(gradient[name][:, CUT:]), name
    assert _zero(gradient["memory"]) and _zero(gradient["residue"])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_changed_future_leaves_outputs_bit_for_bit(rule, method):
    inputs, other = make_inputs(rule, TIME, dtype="float32"), make_inputs(rule, TIME, dtype="float32", seed=9)
    changed = dict(inputs)
    for name in PER_TIME:
        if name in inputs:
            changed[name] = np.concatenate([inputs[name][:, :HERE], 100 * other[name][:, HERE:]], axis=1)
    segments = np.zeros((BATCH, TIME), np.int32)
    before, after = (forward(rule, method, CHUNK[method])(x, segments)[0] for x in (inputs, changed))
    np.testing.assert_array_equal(before[:, :HERE], after[:, :HERE])
    assert np.all(np.any(np.asarray(before[:, HERE:] != after[:, HERE:]), axis=(2, 3)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_changed_segment_leaves_the_next_bit_for_bit(rule, method):
    """The second segment and the final state do not see the first one, nor the initial state."""
    inputs, other = make_inputs(rule, TIME, dtype="float32"), make_inputs(rule, TIME, dtype="float32", seed=9)
    changed = {k: 100 * other[k] for k in inputs}
    for name in PER_TIME:
        if name in inputs:
            changed[name] = np.concatenate([100 * other[name][:, :CUT], inputs[name][:, CUT:]], axis=1)
    segments = np.where(np.arange(TIME) < CUT, 3, 1).astype(np.int32)[None].repeat(BATCH, 0)
    results = [forward(rule, method, CHUNK[method])(x, segments) for x in (inputs, changed)]
    (before, state), (after, changed_state) = results
    np.testing.assert_array_equal(before[:, CUT:], after[:, CUT:])
    assert np.any(np.asarray(before[:, :CUT] != after[:, :CUT]))
    for x, y in zip(state, changed_state, strict=True):
        np.testing.assert_array_equal(x, y)
