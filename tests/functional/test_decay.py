"""The decay baseline: chunked against the recurrence and a NumPy loop, at decays that break clamped forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.functional import decayed_accumulate
from holo_jax.functional.decay import segment_sums
from tests.functional.cases import FAST_COMPILE, make_segments, relative_error
from tests.functional.oracle import decay_loop

B, T, H, M, D = 2, 63, 2, 3, 5


def _inputs(scale, seed=0):
    rng = np.random.default_rng(seed)
    keys, queries = rng.normal(size=(2, B, T, H, M))
    logs = -scale * rng.exponential(size=(B, T, H))
    return keys, queries, rng.normal(size=(B, T, H, D)), logs, rng.normal(size=(B, H, M, D))


def _loss(method, segments, *arrays):
    outputs, state = decayed_accumulate(
        *arrays[:4],
        segment_ids=segments,
        initial_state=arrays[4],
        chunk_size=None if method == "recurrent" else 16,
        method=method,
    )
    return jnp.sum(jnp.sin(outputs)) + jnp.sum(state**2), (outputs, state)


GRADIENT = {
    method: jax.jit(
        jax.value_and_grad(partial(_loss, method), argnums=(1, 2, 3, 4, 5), has_aux=True),
        compiler_options=FAST_COMPILE,
    )
    for method in ("recurrent", "chunked")
}


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 300.0])
def test_chunked_is_the_recurrence(scale):
    """From no decay to a state that is gone after one step (e^-300 per position)."""
    with jax.enable_x64(True):
        arrays, segments = _inputs(scale), make_segments(T)
        (_, want), want_gradients = GRADIENT["recurrent"](segments, *arrays)
        (_, got), got_gradients = GRADIENT["chunked"](segments, *arrays)
        loop = decay_loop(*arrays[:4], segment_ids=segments, state=arrays[4])
        for x, y, z in zip(got, want, loop, strict=True):
            assert relative_error(x, z) < 1e-12 and relative_error(y, z) < 1e-12
        for x, y in zip(got_gradients, want_gradients, strict=True):
            scale_of_gradient = max(np.max(np.abs(y)), 1e-6)
            assert np.max(np.abs(np.asarray(x) - np.asarray(y))) < 1e-11 * scale_of_gradient


def test_nothing_crosses_a_border_or_comes_from_the_future():
    arrays = [jnp.asarray(x, jnp.float32) for x in _inputs(0.1)]
    segments = jnp.asarray(np.where(np.arange(T) < 20, 1, 2)[None].repeat(B, 0), jnp.int32)

    def chosen(*arrays):
        outputs, _ = decayed_accumulate(
            *arrays[:4], segment_ids=segments, initial_state=arrays[4], chunk_size=16
        )
        return jnp.sum(outputs[:, 40])

    gradients = jax.jit(jax.grad(chosen, argnums=(0, 1, 2, 3, 4)), compiler_options=FAST_COMPILE)(*arrays)
    for gradient in gradients[:4]:
        assert not np.any(gradient[:, :20]) and not np.any(gradient[:, 41:]) and np.any(gradient[:, 20:41])
        assert np.all(np.isfinite(gradient))
    assert not np.any(gradients[4])


def test_segment_sums_by_hand():
    got = segment_sums(jnp.asarray([-1.0, -2.0, -np.inf]))
    inf = np.inf
    np.testing.assert_array_equal(got, [[0, -inf, -inf], [-2, 0, -inf], [-inf, -inf, 0]])


def test_sums_do_not_cancel():
    """A huge decay in the chunk leaves the small ones after it exact; a difference of prefixes would not."""
    logs = jnp.asarray([-1e6, -1e-4, -1e-4])
    np.testing.assert_allclose(segment_sums(logs)[2, 0], -2e-4, rtol=1e-6)


def test_bfloat16_values_keep_a_float32_state():
    arrays = [jnp.asarray(x, jnp.float32) for x in _inputs(0.1)]
    arrays[2] = arrays[2].astype(jnp.bfloat16)
    outputs, state = jax.jit(decayed_accumulate)(*arrays[:4])
    exact = [np.asarray(x, np.float64) for x in arrays]
    want, _ = decay_loop(*exact[:4], segment_ids=None, state=0 * exact[4])
    assert outputs.dtype == state.dtype == jnp.float32
    assert relative_error(outputs, want) < 2e-2
