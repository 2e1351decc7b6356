"""Wrong arguments raise typed errors that name field, value and constraint."""

import jax.numpy as jnp
import jaxtyping
import pytest

from holo_jax.functional import (
    accumulate,
    bind,
    decayed_accumulate,
    init_memory,
    retrieval_scale,
    retrieve,
    step,
    unbind,
)

B, T, H, M, D = 2, 3, 2, 4, 4


@pytest.fixture(autouse=True)
def _without_annotation_checks():
    """The functions' own checks, as users meet them; the import hook would refuse some shapes first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def _accumulate(**changes):
    arguments = {
        "write_phases": jnp.zeros((B, T, H, M)),
        "read_phases": jnp.zeros((B, T, H, M)),
        "values": jnp.zeros((B, T, H, D)),
        "gates": jnp.ones((B, T, H)),
        "binding": "outer",
    }
    return accumulate(**(arguments | changes))


def _state(**changes):
    return init_memory(B, H, M, D, binding="outer")._replace(**changes)


VALUE_ERRORS = [
    ({"binding": "inner"}, "binding is 'inner'; it must be one of 'hadamard', 'outer'"),
    ({"method": "fast"}, "method is 'fast'"),
    ({"binding": "hadamard", "erase": jnp.ones((B, T, H))}, "erase is given with binding 'hadamard'"),
    ({"binding": "hadamard", "values": jnp.zeros((B, T, H, 5))}, "m is 4 and d is 5"),
    ({"write_phases": jnp.zeros((3, T, H, M))}, r"write_phases has shape \(3, 3, 2, 4\)"),
    ({"read_phases": jnp.zeros((B, T, H, 5))}, "read_phases has shape"),
    ({"gates": jnp.ones((B, T, 1))}, r"gates has shape \(2, 3, 1\); it must be \(2, 3, 2\)"),
    ({"erase": jnp.ones((B, T))}, "erase has shape"),
    ({"segment_ids": jnp.zeros((B, T + 1), jnp.int32)}, "segment_ids has shape"),
    ({"chunk_size": 0}, "chunk_size is 0"),
    ({"values": jnp.zeros((B, 0, H, D))}, "time >= 1"),
    ({"initial_state": init_memory(B, H, M, 5, binding="outer")}, "initial_state.memory has shape"),
    ({"initial_state": init_memory(B, H, M, D, binding="hadamard")}, "initial_state.memory has shape"),
    ({"initial_state": _state(writes=jnp.zeros((B, 1)))}, "initial_state.writes has shape"),
]
TYPE_ERRORS = [
    ({"write_phases": jnp.zeros((B, T, H, M), jnp.bfloat16)}, "write_phases has dtype bfloat16"),
    ({"read_phases": jnp.zeros((B, T, H, M), jnp.float16)}, "read_phases has dtype float16"),
    ({"values": jnp.zeros((B, T, H, D), jnp.int32)}, "values has dtype int32"),
    ({"gates": jnp.ones((B, T, H), bool)}, "gates has dtype bool"),
    ({"segment_ids": jnp.zeros((B, T))}, "segment_ids has dtype float32"),
    (
        {"initial_state": _state(writes=jnp.zeros((B, H), jnp.bfloat16))},
        "initial_state.writes has dtype bfloat16",
    ),
    ({"initial_state": _state(memory=jnp.zeros((B, H, M, D)))}, "initial_state.memory has dtype float32"),
]


@pytest.mark.parametrize("changes,message", VALUE_ERRORS)
def test_accumulate_value_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        _accumulate(**changes)


@pytest.mark.parametrize("changes,message", TYPE_ERRORS)
def test_accumulate_type_errors(changes, message):
    with pytest.raises(TypeError, match=message):
        _accumulate(**changes)


PHASE, VALUE = jnp.zeros((B, H, M)), jnp.zeros((B, H, D))
OTHERS = [
    (lambda: init_memory(2, 2, 3, 4, binding="hadamard"), ValueError, "m is 3 and d is 4"),
    (lambda: init_memory(0, 2, 3, 4, binding="outer"), ValueError, "batch is 0"),
    (lambda: init_memory(1, 1, 1, 1, binding="outer", dtype="bfloat16"), TypeError, "bfloat16"),
    (lambda: step(_state(), PHASE, PHASE[:1, :1], VALUE), ValueError, "read_phase has shape"),
    (lambda: step(_state(), PHASE, PHASE, VALUE, jnp.ones((B, 1))), ValueError, "gate has shape"),
    (lambda: step(_state(), PHASE.astype("bfloat16"), PHASE, VALUE), TypeError, "bfloat16"),
    (
        lambda: step(
            init_memory(B, H, M, M, binding="hadamard"), PHASE, PHASE, VALUE, None, jnp.ones((B, H))
        ),
        ValueError,
        "erase is given",
    ),
    (lambda: retrieve(_state(), PHASE[:, None], binding="hadamard"), ValueError, "it must be 'outer'"),
    (lambda: retrieve(_state(), PHASE[:, None, :1], binding="outer"), ValueError, "read_phases has shape"),
    (lambda: bind(PHASE, VALUE[..., :3], binding="hadamard"), ValueError, "m is 4 and d is 3"),
    (lambda: bind(PHASE, VALUE[0], binding="outer"), ValueError, "values has rank 2"),
    (lambda: unbind(PHASE, _state().memory[0], binding="outer"), ValueError, "memory has rank 3"),
    (lambda: unbind(PHASE[..., :3], _state().memory, binding="outer"), ValueError, "phases has 3 components"),
    (lambda: retrieval_scale("log", jnp.ones((B, T, H))), ValueError, "kind is 'log'"),
    (lambda: retrieval_scale("none", jnp.ones((B, T, H)), eps=0.0), ValueError, "eps is 0.0"),
    (lambda: retrieval_scale("none", jnp.ones((B, T))), ValueError, "gates has shape"),
]


@pytest.mark.parametrize("call,error,message", OTHERS)
def test_other_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


DECAY_ERRORS = [
    ({"method": "fast"}, ValueError, "method is 'fast'"),
    ({"chunk_size": 0}, ValueError, "chunk_size is 0"),
    ({"queries": jnp.zeros((B, T, H, 5))}, ValueError, "queries has shape"),
    ({"log_decay": jnp.zeros((B, T))}, ValueError, "log_decay has shape"),
    ({"initial_state": jnp.zeros((B, H, M, D), jnp.bfloat16)}, TypeError, "initial_state has dtype bfloat16"),
]


@pytest.mark.parametrize("changes,error,message", DECAY_ERRORS)
def test_decay_errors(changes, error, message):
    arguments = {
        "keys": jnp.zeros((B, T, H, M)),
        "queries": jnp.zeros((B, T, H, M)),
        "values": jnp.zeros((B, T, H, D)),
        "log_decay": jnp.zeros((B, T, H)),
    }
    with pytest.raises(error, match=message):
        decayed_accumulate(**(arguments | changes))
