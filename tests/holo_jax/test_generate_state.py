"""States in fewer bits: exact formats, unbiased rounding, bounded logit error, and the right size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.generate import (
    Sampling,
    compress_state,
    decode_step,
    expand_state,
    generate,
    init_state,
    prefill,
    state_bytes,
)
from holo_jax.generate.forms import split_state, stack_state
from holo_jax.generate.state_precision import StoredMemory, restore, store, stored_dtype
from tests.holo_jax.models import VOCAB, variant

SHORT = ("bfloat16", "int8", "int4")


def memory(shape: tuple[int, ...] = (3, 8), seed: int = 0) -> jax.Array:
    parts = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    return jax.lax.complex(jnp.asarray(parts[0]), jnp.asarray(parts[1]))


def test_every_code_survives_packing() -> None:
    codes = np.arange(-7, 8, dtype=np.float32)
    row = jnp.asarray(np.append(codes, 0.0) * 2.0**-3)
    packed = store(row, "int4", jax.random.key(0))
    assert packed.codes.dtype == jnp.uint8 and packed.codes.shape == (8,) and packed.exponents == -3
    np.testing.assert_array_equal(restore(packed), row)
    row = jnp.arange(-127, 129, 1, dtype=jnp.float32).at[-1].set(0) * 2.0**40
    wide = store(row, "int8", jax.random.key(0))
    assert wide.codes.dtype == jnp.int8 and wide.exponents == 40
    np.testing.assert_array_equal(restore(wide), row)


@pytest.mark.parametrize("dtype,steps", [("bfloat16", None), ("int8", 127), ("int4", 7)])
def test_rounding_is_to_a_neighbour_and_unbiased(dtype: str, steps: int | None) -> None:
    """Mean over 4,000 roundings is the number itself within 5 standard errors; no code is off by a step."""
    numbers, n = memory(), 4000
    stored = jax.jit(jax.vmap(lambda key: restore(store(numbers, dtype, key), is_complex=True)))
    samples = np.asarray(stored(jax.random.split(jax.random.key(1), n)))
    if steps is None:
        step = np.abs(np.asarray(numbers.real)) * 2.0**-7
    else:
        largest = np.abs(np.asarray(numbers.real)).max(-1, keepdims=True)
        step = np.broadcast_to(2.0 ** np.ceil(np.log2(largest / steps)), numbers.shape)
    error = samples.real - np.asarray(numbers.real)
    assert (np.abs(error) < step).all()
    assert (np.abs(error.mean(0)) < 5 * 0.5 * step / np.sqrt(n)).all()
    assert np.abs(error).max() > 0.3 * step.min()


@pytest.mark.parametrize("dtype", SHORT)
def test_storing_what_was_stored_changes_nothing(dtype: str) -> None:
    """Rows that nothing is written to cost no noise, token after token."""
    state = prefill(variant("holo"), [[1, 2, 3, 4]], piece_size=4).state
    once = compress_state(state, dtype)
    assert stored_dtype(once) == dtype
    values = expand_state(once)
    again = values._replace(position=values.position + 1)
    twice = compress_state(again, dtype, previous=once)
    jax.tree.map(np.testing.assert_array_equal, expand_state(twice).layers, values.layers)


def test_grids_grow_when_needed_and_do_not_flap() -> None:
    key, row = jax.random.key(0), jnp.linspace(-1, 1, 8)
    first = store(row, "int8", key)
    assert first.exponents == -6
    assert store(row * 0.6, "int8", key).exponents == -7
    kept = store(row * 0.6, "int8", key, first.exponents)
    assert kept.exponents == -6
    assert store(row * 0.2, "int8", key, first.exponents).exponents == -9
    assert store(row * 3, "int8", key, first.exponents).exponents == -5


def test_extreme_rows() -> None:
    for dtype in SHORT:
        restored = jax.jit(lambda row, dtype=dtype: restore(store(row, dtype, jax.random.key(0))))
        again = lambda row, restored=restored: np.asarray(restored(np.float32(row)))  # noqa: E731
        assert (again([0.0] * 4) == 0).all()
        tiny = again([1e-38] * 4)
        assert np.isfinite(tiny).all() and (np.abs(tiny) < 1e-29).all()
        for bad in (np.nan, np.inf):
            assert not np.isfinite(again([1.0, bad, 1.0, 1.0])).all()
        np.testing.assert_allclose(again([1e38] * 4), 1e38, rtol=0.25)


def test_bytes_are_those_of_the_dtype() -> None:
    """Memory of one row and layer: 2 heads x 6 phasors x 8 channels, complex."""
    config = variant("holo").config
    numbers, layers = 2 * 2 * 6 * 8, config.num_hidden_layers
    rest = state_bytes(init_state(config, 1)) - layers * 2 * 4 * numbers
    expected = {"float32": 2 * 4 * numbers, "bfloat16": 2 * numbers}
    expected["int8"], expected["int4"] = numbers + numbers // 8, numbers // 2 + numbers // 8
    for dtype, size in expected.items():
        assert state_bytes(init_state(config, 1, state_dtype=dtype)) == rest + layers * size


IDS = np.random.default_rng(0).integers(0, VOCAB, (3, 24)).astype(np.int32)


def spread(logits: jax.Array, exact: jax.Array) -> float:
    """Root mean square error over the spread of the exact logits."""
    return np.sqrt(np.mean(np.asarray(logits - exact) ** 2)) / np.asarray(exact).std()


@pytest.mark.parametrize("name", ["holo", "dual", "ssm"])
def test_logit_error_by_dtype(name: str) -> None:
    """A state stored once after 23 tokens; the logits of the next one."""
    model = variant(name)
    state = prefill(model, IDS[:, :23], piece_size=8).state
    exact = decode_step(model, IDS[:, 23], state).logits
    kept = {dtype: expand_state(compress_state(state, dtype)) for dtype in SHORT}
    errors = [spread(decode_step(model, IDS[:, 23], kept[dtype]).logits, exact) for dtype in SHORT]
    assert 0 < errors[0] < 0.02 and 0 < errors[1] < 0.03 and errors[1] < errors[2] < 0.4


def test_a_state_that_is_stored_between_pieces_keeps_its_dtype() -> None:
    model = variant("holo")
    exact = prefill(model, IDS, piece_size=8)
    stored = prefill(model, IDS, piece_size=8, state_dtype="int4")
    assert (stored_dtype(exact.state), stored_dtype(stored.state)) == ("float32", "int4")
    assert 0 < spread(stored.logits, exact.logits) < 0.4


def test_generation_with_a_stored_state_does_not_depend_on_the_batch() -> None:
    model = variant("holo")
    options = dict(max_new_tokens=8, sampling=Sampling(temperature=2.0), block_size=4, piece_size=4)
    prompts = [[3, 1, 4, 1], [2, 7, 1, 8]]
    both = generate(model, prompts, seeds=[1, 2], state_dtype="int8", **options)
    assert stored_dtype(both.state) == "int8"
    alone = generate(model, prompts[1:], seeds=2, state_dtype="int8", **options)
    assert alone.tokens[0] == both.tokens[1]
    codes = both.state.layers[0].content.memory.codes
    apart = np.abs(np.asarray(codes[:, 1:], int) - np.asarray(alone.state.layers[0].content.memory.codes))
    assert apart.max() <= 1 and apart.mean() < 0.02  # a batched product rounds differently


def test_split_and_stacked_states_are_stored_alike() -> None:
    state = prefill(variant("dual"), [[1, 2, 3], [4, 5, 6]], piece_size=4).state
    stacked, split = compress_state(state, "int4"), compress_state(split_state(state), "int4")
    jax.tree.map(np.testing.assert_array_equal, stacked, stack_state(split))
    memories = [stacked.layers[0].content.memory, stacked.layers[0].position.memory]
    assert all(isinstance(stored, StoredMemory) for stored in memories)


def test_bad_dtypes_are_named() -> None:
    state = init_state(variant("holo").config, 1)
    with pytest.raises(ValueError, match="state_dtype is 'float16'; it must be one of float32"):
        compress_state(state, "float16")
    with pytest.raises(ValueError, match="stored as int8 already"):
        compress_state(compress_state(state, "int8"), "int4")
    with pytest.raises(ValueError, match="head_dim is 3; storing a state as int4 needs an even one"):
        store(jnp.zeros(3), "int4", jax.random.key(0))
