"""Long coherent sums: 131,072 times the same write, where every rounding error points the same way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.functional import accumulate, init_memory, step

TOKENS, WIDTH = 131_072, 2
PHASE, VALUE = 0.7, np.float32(0.1)


def _sequence(dtype="float32"):
    phases = jnp.full((1, TOKENS, 1, WIDTH), PHASE, "float32")
    return phases, jnp.full((1, TOKENS, 1, WIDTH), VALUE, dtype)


def _error(state, binding):
    norm = np.sqrt(WIDTH) if binding == "outer" else 1.0
    want = TOKENS * np.float64(VALUE) * np.exp(1j * np.float64(np.float32(PHASE))) / norm
    total = np.asarray(state.memory, "complex128") + np.asarray(state.residue, "complex128")
    return np.max(np.abs(total - want)) / np.abs(want)


@pytest.mark.parametrize("binding", ["hadamard", "outer"])
def test_chunked_sum_keeps_every_write(binding):
    phases, values = _sequence()
    outputs, state = jax.jit(lambda p, v: accumulate(p, p, v, binding=binding))(phases, values)
    assert _error(state, binding) < 1e-5
    want = np.float64(VALUE) * np.arange(1, TOKENS + 1)
    assert np.max(np.abs(outputs[0, :, 0, 0] / want - 1.0)) < 1e-5


def test_associative_scan_keeps_every_write():
    phases, values = _sequence()
    _, state = jax.jit(lambda p, v: accumulate(p, p, v, binding="hadamard", method="associative_scan"))(
        phases, values
    )
    assert _error(state, "hadamard") < 1e-5


@pytest.mark.parametrize("binding", ["hadamard", "outer"])
def test_step_by_step_keeps_every_write(binding):
    """The compensated recurrence; the same sum without compensation drifts a hundred times further."""
    phase = jnp.full((1, 1, WIDTH), PHASE, "float32")
    value = jnp.full((1, 1, WIDTH), VALUE)

    def compensated(state, _):
        return step(state, phase, phase, value)[1], None

    def plain(state, _):
        after = step(state, phase, phase, value)[1]
        return after._replace(residue=jnp.zeros_like(after.residue)), None

    start = init_memory(1, 1, WIDTH, WIDTH, binding=binding)
    run = jax.jit(lambda s, body: jax.lax.scan(body, s, None, length=TOKENS)[0], static_argnums=1)
    assert _error(run(start, compensated), binding) < 1e-6
    assert _error(run(start, plain), binding) > 1e-4


def test_many_pieces_do_not_drift():
    """2,048 calls of 64 positions, each continuing the state of the last."""
    phases, values = (x[:, :64] for x in _sequence())

    def piece(state, _):
        return accumulate(phases, phases, values, binding="outer", initial_state=state)[1], None

    start = init_memory(1, 1, WIDTH, WIDTH, binding="outer")
    state, _ = jax.jit(lambda s: jax.lax.scan(piece, s, None, length=TOKENS // 64))(start)
    assert _error(state, "outer") < 1e-6


def test_bfloat16_accumulation_loses_the_signal():
    """What the float32 memory is for: the same sum in bfloat16 stops growing after a few hundred writes."""

    def add(total, _):
        return total + jnp.bfloat16(VALUE), None

    total, _ = jax.jit(lambda s: jax.lax.scan(add, s, None, length=TOKENS))(jnp.zeros((), jnp.bfloat16))
    assert abs(float(total) / (TOKENS * float(jnp.bfloat16(VALUE))) - 1.0) > 0.1


def test_bfloat16_values_are_not_accumulated_in_bfloat16():
    phases, values = _sequence("bfloat16")
    zero = jnp.zeros_like(phases)
    _, state = jax.jit(lambda p, v: accumulate(p, p, v, binding="hadamard"))(zero, values)
    want = TOKENS * float(jnp.bfloat16(VALUE))
    assert np.max(np.abs(np.asarray(state.memory) / want - 1.0)) < 1e-5


def test_delta_rule_at_equal_keys_reads_the_last_value():
    """e = g = 1 and one key: the hardest triangular systems. Each read is exactly what was just written."""
    values = jax.random.normal(jax.random.key(0), (1, 4096, 1, 3))
    phases = jnp.full((1, 4096, 1, 4), PHASE, "float32")
    ones = jnp.ones((1, 4096, 1))
    outputs, _ = jax.jit(lambda *x: accumulate(*x, binding="outer"))(phases, phases, values, ones, ones)
    assert float(jnp.max(jnp.abs(outputs - values))) < 1e-5
