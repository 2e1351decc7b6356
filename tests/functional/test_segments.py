"""Runs of segment ids and sums that restart, on arrays small enough to check by eye."""

import jax
import jax.numpy as jnp
import numpy as np

from holo_jax.functional.segments import borders, make_runs, run_index, segmented_scan_sum, segmented_sum

IDS = jnp.asarray([[5, 5, 0, 0, 5], [1, 2, 3, 3, 3]], jnp.int32)


def test_borders():
    np.testing.assert_array_equal(borders(IDS), [[0, 0, 1, 0, 1], [0, 1, 1, 0, 0]])


def test_run_index_tells_a_returning_id_apart():
    np.testing.assert_array_equal(run_index(IDS), [[0, 0, 1, 1, 2], [0, 1, 2, 2, 2]])
    runs = make_runs(IDS)
    np.testing.assert_array_equal(runs.here, run_index(IDS))
    np.testing.assert_array_equal(runs.before, [[0, 0, 0, 1, 1], [0, 0, 1, 2, 2]])


def test_segmented_sum():
    values = jnp.asarray([[1.0, 2, 4, 8, 16], [1, 2, 4, 8, 16]])[..., None]
    np.testing.assert_array_equal(
        jax.jit(segmented_sum)(values, run_index(IDS))[..., 0], [[1, 3, 4, 12, 16], [1, 2, 4, 12, 28]]
    )
    np.testing.assert_array_equal(segmented_sum(values, None)[0, :, 0], [1, 3, 7, 15, 31])


def test_segmented_sum_of_complex_values_on_another_axis():
    values = jnp.asarray([[[1.0 + 1j], [2.0], [4.0j]]])[:, None]
    reset = jnp.asarray([[[False, False, True]]])
    np.testing.assert_array_equal(segmented_scan_sum(values, reset, 2)[0, 0, :, 0], [1 + 1j, 3 + 1j, 4j])
