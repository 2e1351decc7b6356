"""The one-token form against the definition: values, gradients, and long coherent decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.functional import MemoryState, accumulate, init_memory, step
from holo_jax.functional.memory.decode import decode_step
from tests.functional.cases import RULES, binding_of, make_inputs


def token(rule, dtype="float64"):
    inputs = make_inputs(rule, 1, dtype=dtype)
    names = ("write", "read", "values", "gates")
    state = MemoryState(inputs["memory"], inputs["residue"], inputs["writes"])
    erase = inputs["erase"][:, 0] if rule == "erase" else None
    return jax.tree.map(jnp.asarray, (state, *(inputs[name][:, 0] for name in names), erase))


@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_step_of_the_definition_in_values_and_gradients(rule):
    with jax.enable_x64(True):
        arguments = token(rule)

        def loss(form):
            def total(arguments):
                output, state = form(*arguments)
                whole = state.memory + state.residue
                return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(jnp.abs(whole))) + jnp.sum(state.writes)

            return jax.jit(jax.value_and_grad(total))(arguments)

        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12),
            loss(decode_step),
            loss(step),
        )


@pytest.mark.parametrize("rule", RULES)
def test_decoding_a_hundred_thousand_coherent_tokens_reads_what_the_definition_reads(rule):
    """Equal keys and values of one sign: sums grow linearly, which is where float32 sums drift."""
    m = d = 4
    binding = binding_of(rule)
    steps = 100_000

    def decode(dtype):
        write, read = (jnp.full((1, 1, 1, m), a, dtype) for a in (0.3, 0.5))
        value, gate = jnp.full((1, 1, 1, d), 0.7, dtype), jnp.full((1, 1, 1), 0.9, dtype)
        erase = jnp.full((1, 1, 1), 1e-5, dtype) if rule == "erase" else None

        def body(carry, _):
            return accumulate(
                write, read, value, gate, erase, binding=binding, method="recurrent", initial_state=carry[1]
            ), None

        start = init_memory(1, 1, m, d, binding=binding, dtype=dtype)
        return jax.jit(
            lambda: jax.lax.scan(body, (jnp.zeros((1, 1, 1, d), dtype), start), length=steps)[0][0]
        )()

    found = np.asarray(decode(jnp.float32), np.float64)
    with jax.enable_x64(True):
        wanted = np.asarray(decode(jnp.float64))
    assert np.abs(wanted).min() > 1e4
    np.testing.assert_allclose(found, wanted, rtol=2e-6)
