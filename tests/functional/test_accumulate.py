"""The three forms of the memory against a NumPy loop and against each other, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.functional import MemoryState, accumulate, init_memory, retrieve, step, unbind
from tests.functional.cases import (
    FAST_COMPILE,
    METHODS,
    RULES,
    arguments,
    binding_of,
    forward,
    make_inputs,
    make_segments,
    relative_error,
    value_and_grad,
)
from tests.functional.oracle import memory_loop

# Small chunks: several blocks of several chunks, the last one padded.
CHUNK = {"recurrent": None, "associative_scan": None, "chunked": 4}


def oracle(inputs, rule, segments):
    return memory_loop(
        *arguments(inputs),
        binding=binding_of(rule),
        segment_ids=segments,
        memory=inputs["memory"] + inputs["residue"],
        writes=inputs["writes"],
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_matches_numpy_loop(rule, method):
    with jax.enable_x64(True):
        for kind in ("random", "coherent"):
            inputs, segments = make_inputs(rule, 63, kind=kind), make_segments(63)
            results = value_and_grad(rule, method, CHUNK[method])(inputs, segments)[0][1]
            for got, want in zip(results, oracle(inputs, rule, segments), strict=True):
                assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["associative_scan", "chunked"])
def test_gradients_match_recurrence(rule, method):
    with jax.enable_x64(True):
        for kind in ("random", "coherent"):
            inputs, segments = make_inputs(rule, 63, kind=kind), make_segments(63)
            want = value_and_grad(rule, "recurrent", None)(inputs, segments)[1]
            got = value_and_grad(rule, method, CHUNK[method])(inputs, segments)[1]
            for name in inputs:
                assert relative_error(got[name], want[name]) < 1e-11, (kind, name)


@pytest.mark.parametrize("rule", RULES)
def test_recurrence_gradient_is_the_derivative_of_the_numpy_loop(rule):
    """Central differences of the loop along a random direction of all inputs."""
    inputs, segments = make_inputs(rule, 63), make_segments(63)
    rng = np.random.default_rng(5)
    direction = {k: rng.normal(size=v.shape) for k, v in inputs.items()}
    for name in ("memory", "residue"):
        direction[name] = direction[name] + 1j * rng.normal(size=inputs[name].shape)

    def weigh(x):
        return np.sum(x * np.cos(1.7 * np.arange(x.size).reshape(x.shape)))

    def value(scale):
        moved = {k: v + scale * direction[k] for k, v in inputs.items()}
        outputs, memory, writes = oracle(moved, rule, segments)
        return weigh(outputs) + weigh(memory.real) + weigh(memory.imag**2) + weigh(writes)

    numeric = (value(1e-5) - value(-1e-5)) / 2e-5
    with jax.enable_x64(True):
        (total, _), gradients = value_and_grad(rule, "recurrent", None)(inputs, segments)
        assert float(total) == pytest.approx(value(0.0), rel=1e-12)
    # For a real function of z = x + iy, jax.grad returns df/dx - i df/dy.
    exact = sum(np.sum((np.asarray(gradients[k]) * direction[k]).real) for k in inputs)
    assert exact == pytest.approx(numeric, rel=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_default_chunks_long_and_unsegmented(rule):
    """257 positions with default chunks and phases shared over the batch, values and gradients."""
    with jax.enable_x64(True):
        inputs = make_inputs(rule, 257, shared_phases=True)
        (_, want), want_grads = value_and_grad(rule, "recurrent", None)(inputs, None)
        (_, got), got_grads = value_and_grad(rule, "chunked", None)(inputs, None)
        for x, y in zip(jax.tree.leaves((got, got_grads)), jax.tree.leaves((want, want_grads)), strict=True):
            assert relative_error(x, y) < 1e-11


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_one_position_is_step(rule, method):
    with jax.enable_x64(True):
        inputs = {k: jnp.asarray(v) for k, v in make_inputs(rule, 1).items()}
        outputs, state = forward(rule, method)(inputs, make_segments(1))
        token = [
            inputs[k][:, 0] if k in inputs else None for k in ("write", "read", "values", "gates", "erase")
        ]
        state_before = MemoryState(inputs["memory"], inputs["residue"], inputs["writes"])
        value, after = jax.jit(step, compiler_options=FAST_COMPILE)(state_before, *token)
        assert relative_error(outputs[:, 0], value) < 1e-14
        assert relative_error(state.memory + state.residue, after.memory + after.residue) < 1e-14
        assert relative_error(state.writes, after.writes) < 1e-14


@pytest.mark.parametrize("rule", RULES)
def test_split_sequence_gives_the_same(rule):
    """Pieces of 1, 20 and 42 positions, each continuing the state of the one before."""
    with jax.enable_x64(True):
        inputs, segments = make_inputs(rule, 63), make_segments(63)
        outputs, state = forward(rule, "chunked")(inputs, segments)
        piece, pieces = dict(inputs), []
        names = [k for k in ("write", "read", "values", "gates", "erase") if k in inputs]
        for start, stop in ((0, 1), (1, 21), (21, 63)):
            by_time = {k: inputs[k][:, start:stop] for k in names}
            # A border between two pieces is the caller's to see: the first position continues the state.
            if start and np.any(segments[:, start] != segments[:, start - 1]):
                changed = segments[:, start] != segments[:, start - 1]
                for name in ("memory", "residue", "writes"):
                    piece[name] = np.where(changed.reshape(-1, *[1] * (piece[name].ndim - 1)), 0, piece[name])
            result, after = forward(rule, "chunked")(piece | by_time, segments[:, start:stop])
            piece = inputs | dict(zip(("memory", "residue", "writes"), map(np.asarray, after), strict=True))
            pieces.append(result)
        assert relative_error(np.concatenate(pieces, axis=1), outputs) < 1e-12
        assert relative_error(piece["memory"] + piece["residue"], state.memory + state.residue) < 1e-12
        assert relative_error(piece["writes"], state.writes) < 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("values_dtype,tolerance", [("float32", 3e-6), ("bfloat16", 3e-2)])
def test_low_precision_values_keep_a_float32_memory(rule, values_dtype, tolerance):
    inputs, segments = make_inputs(rule, 63, dtype="float32"), make_segments(63)
    inputs["values"] = jnp.asarray(inputs["values"], values_dtype)
    outputs, state = forward(rule, "chunked")(inputs, segments)
    exact = {k: np.asarray(v, "complex128" if np.iscomplexobj(v) else "float64") for k, v in inputs.items()}
    want, memory, _ = oracle(exact, rule, segments)
    assert (
        outputs.dtype == "float32" and state.memory.dtype == "complex64" and state.writes.dtype == "float32"
    )
    assert relative_error(outputs, want) < tolerance
    assert relative_error(state.memory + state.residue, memory) < tolerance
    gradients = value_and_grad(rule, "chunked")(inputs, segments)[1]
    assert {k: g.dtype for k, g in gradients.items()} == {k: v.dtype for k, v in inputs.items()}


def test_no_gates_means_gates_of_one():
    inputs = make_inputs("outer", 63, dtype="float32")
    arrays = [jnp.asarray(inputs[k]) for k in ("write", "read", "values")]
    ones = jnp.ones(inputs["gates"].shape)
    outer = jax.jit(partial(accumulate, binding="outer"), compiler_options=FAST_COMPILE)
    without, with_ones = (outer(*arrays, gates) for gates in (None, ones))
    for x, y in zip(jax.tree.leaves(without), jax.tree.leaves(with_ones), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("binding", ["hadamard", "outer"])
def test_retrieve_reads_without_writing(binding):
    state = init_memory(2, 2, 5, 5, binding=binding)
    rng = np.random.default_rng(0)
    memory = (rng.normal(size=state.memory.shape) + 1j * rng.normal(size=state.memory.shape)).astype(
        "complex64"
    )
    state = state._replace(memory=jnp.asarray(memory), residue=jnp.asarray(memory * 0.5))
    phases = jnp.asarray(rng.normal(size=(1, 7, 2, 5)), "float32")
    got = jax.jit(partial(retrieve, binding=binding))(state, phases)
    read = jax.jit(partial(unbind, binding=binding))
    for t in range(7):
        assert relative_error(got[:, t], read(phases[:, t], state.memory * 1.5)) < 1e-6


def test_hand_written_outer_memory():
    """One head, one phasor, one channel: write 2 at angle 0, 3 at pi/2; read 0, then both halves at pi/4."""
    write = jnp.asarray([0.0, np.pi / 2], "float32").reshape(1, 2, 1, 1)
    read = jnp.asarray([0.0, np.pi / 4], "float32").reshape(1, 2, 1, 1)
    values = jnp.asarray([2.0, 3.0], "float32").reshape(1, 2, 1, 1)
    outer = jax.jit(partial(accumulate, binding="outer"), compiler_options=FAST_COMPILE)
    outputs, state = outer(write, read, values)
    np.testing.assert_allclose(outputs.ravel(), [2.0, 5.0 / np.sqrt(2.0)], rtol=1e-6)
    np.testing.assert_allclose(state.memory.ravel(), [2.0 + 3.0j], rtol=1e-6)
    np.testing.assert_array_equal(state.writes, [[2.0]])
