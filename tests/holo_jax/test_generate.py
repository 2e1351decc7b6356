"""Reading and generating: the same function as the forward pass, in any pieces, alone or in a batch."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from holo_jax.generate import (
    Reading,
    Sampling,
    decode_step,
    generate,
    init_state,
    prefill,
    state_bytes,
    take_rows,
)
from holo_jax.generate.decoding import decode_block
from holo_jax.generate.forms import decoding_form, training_form
from holo_jax.generate.reading import _pieces, _read_piece, read
from holo_jax.precision import FULL, MIXED, Precision
from tests.holo_jax.models import VOCAB, variant

LENGTH, WIDTH = 24, 8
ROWS = 3


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)


def difference(ours: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference over that of the expected logits' spread."""
    expected = np.asarray(expected, np.float64)
    return np.sqrt(np.mean((np.asarray(ours, np.float64) - expected) ** 2)) / expected.std()


@jax.jit
def forward(model: nnx.Module, ids: jax.Array) -> jax.Array:
    return model(ids).logits


@jax.jit
def read_all(model: nnx.Module, ids: jax.Array, segment_ids: jax.Array, state: object) -> tuple:
    outputs = model(ids, segment_ids=segment_ids, state=state)
    return outputs.logits, outputs.state


def in_ragged_pieces(model: nnx.Module, ids: np.ndarray, lengths: list[int], seed: int) -> np.ndarray:
    """Logits of all rows, each read in pieces of its own random lengths (0 to WIDTH)."""
    rng = np.random.default_rng(seed)
    state = init_state(model.config, ROWS, cache_length=LENGTH)
    logits = np.zeros((*ids.shape, VOCAB), np.float32)
    done = np.zeros(ROWS, int)
    while (done < lengths).any():
        take = np.minimum(rng.integers(0, WIDTH + 1, ROWS), np.asarray(lengths) - done)
        piece, segment_ids = np.zeros((2, ROWS, WIDTH), np.int32)
        for row, (start, n) in enumerate(zip(done, take, strict=True)):
            piece[row, WIDTH - n :] = ids[row, start : start + n]
            segment_ids[row, WIDTH - n :] = 1
        new, state = read_all(model, piece, segment_ids, state)
        for row, (start, n) in enumerate(zip(done, take, strict=True)):
            logits[row, start : start + n] = new[row, WIDTH - n :]
        done += take
    assert state.position.tolist() == list(lengths)
    return logits


PRESETS = ["holo", "seed", "dual", "attention", "ssm"]
CASES = [(name, FULL) for name in (*PRESETS, "attention-window", "hybrid", "holo-local")]
CASES += [(name, MIXED) for name in PRESETS]


@pytest.mark.parametrize("name,precision", CASES, ids=lambda v: v if isinstance(v, str) else v.storage)
def test_full_forward_pieces_and_steps_are_one_function(name: str, precision: Precision) -> None:
    """Tolerances are relative to the spread of the logits; bfloat16 has 8 bits in two different orders."""
    tolerance = 2e-5 if precision == FULL else 0.1
    model, ids = variant(name, precision), tokens()
    full = np.asarray(forward(model, ids))
    assert difference(in_ragged_pieces(model, ids, [LENGTH] * ROWS, seed=0), full) < tolerance
    state = init_state(model.config, ROWS, cache_length=LENGTH)
    steps = []
    for t in range(LENGTH):
        logits, state = decode_step(model, ids[:, t], state)
        steps.append(logits)
    assert difference(np.stack(steps, axis=1), full) < tolerance


@pytest.mark.parametrize("name,precision", [("holo", MIXED), ("hybrid", FULL), ("ssm", FULL), ("seed", FULL)])
def test_the_decoding_form_is_the_same_function(name: str, precision: Precision) -> None:
    """Weights joined, cast and unstacked; and stacked again, as prompts are read with it."""
    model, ids = variant(name, precision), tokens()
    fast = decoding_form(model)
    assert decoding_form(fast) is fast and training_form(model) is model
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(fast, nnx.Param)) if leaf.ndim > 1}
    assert jnp.dtype(precision.storage) in dtypes
    full = np.asarray(forward(model, ids))
    start = prefill(model, ids[:, :-1], piece_size=WIDTH, cache_length=LENGTH)
    for other in (fast, training_form(fast)):
        assert difference(forward(other, ids), full) < (2e-5 if precision == FULL else 0.02)
    again = prefill(fast, ids[:, :-1], piece_size=WIDTH, cache_length=LENGTH)
    for state in (start.state, again.state):
        logits = decode_step(fast, ids[:, -1], state).logits
        assert difference(logits, full[:, -1]) < (2e-5 if precision == FULL else 0.1)


@pytest.mark.parametrize("name", ["attention", "attention-window"])
def test_no_cache_is_scattered_to_what_may_repeat_or_be_outside(name: str) -> None:
    """XLA's deterministic form of such a scatter gave wrong caches on a GPU."""
    model, ids = variant(name), tokens()
    state = init_state(model.config, ROWS, cache_length=LENGTH)
    program = str(read_all.trace(model, ids, np.ones_like(ids), state).jaxpr)
    pattern = r"scatter\[.*?mode=GatherScatterMode\.(\w+).*?unique_indices=(\w+)"
    found = re.findall(pattern, program, re.DOTALL)
    assert len(found) == program.count("scatter[") >= 4
    assert all(mode != "FILL_OR_DROP" and unique == "True" for mode, unique in found)


@pytest.mark.parametrize("name", ["holo", "hybrid"])
def test_prefill_gives_the_logits_and_state_of_its_steps(name: str) -> None:
    model, ids = variant(name), tokens()
    state = init_state(model.config, ROWS, cache_length=LENGTH)
    for t in range(LENGTH):
        logits, state = decode_step(model, ids[:, t], state)
    whole = prefill(model, ids, piece_size=WIDTH)
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)  # noqa: E731
    jax.tree.map(compare, whole, Reading(logits, state))


@pytest.mark.parametrize("name", ["holo", "dual", "ssm", "hybrid", "attention-window"])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, LENGTH), min_size=ROWS, max_size=ROWS), seed=st.integers(0, 99))
def test_any_split_points_give_the_full_forward(name: str, lengths: list[int], seed: int) -> None:
    model, ids = variant(name), tokens(seed)
    full = np.asarray(forward(model, ids))
    ours = in_ragged_pieces(model, ids, lengths, seed)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(ours[row, :length], full[row, :length], rtol=5e-4, atol=2e-5)


@settings(deadline=None, derandomize=True)
@given(length=st.integers(1, 500), size=st.integers(1, 64))
def test_pieces_cover_the_prompt_in_few_shapes(length: int, size: int) -> None:
    pieces = _pieces(length, size)
    assert pieces[0][0] <= 0 < pieces[0][1] and pieces[-1][1] == length
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    widths = {end - begin for begin, end in pieces}
    assert widths <= {size, *(2**k for k in range(7))} and len(widths) <= 2
    assert pieces[0][1] - pieces[0][0] < 2 * pieces[0][1]


PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1], [4, 4, 8, 3]]
SIZES = dict(block_size=4, piece_size=4)  # few shapes to compile


@pytest.mark.parametrize("name", ["holo", "hybrid"])
def test_a_batch_of_different_lengths_equals_singles(name: str) -> None:
    model = variant(name)
    options = dict(max_new_tokens=6, sampling=Sampling(temperature=2.0), **SIZES)
    batch = generate(model, PROMPTS, seeds=[7, 8, 9], **options)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, (7, 8, 9), strict=True)):
        alone = generate(model, [prompt], seeds=seed, **options)
        assert alone.tokens[0] == batch.tokens[row]
        np.testing.assert_allclose(alone.logits[0], batch.logits[row], rtol=1e-4, atol=1e-5)
    assert len({tuple(row) for row in batch.tokens}) == 3


@pytest.mark.parametrize("name", ["holo", "hybrid"])
def test_a_document_is_read_once_and_questioned_twice(name: str) -> None:
    """Questions of different lengths on a forked state == each question after the whole document."""
    model, document = variant(name), tokens(3)[0]
    options = dict(max_new_tokens=5, sampling=Sampling(temperature=2.0), **SIZES)
    read_once = prefill(model, [document], piece_size=4, cache_length=64)
    forked = take_rows(read_once.state, [0, 0, 0])
    questions = [[5, 6, 7, 8], [10], [11, 12]]
    answers = generate(model, questions, state=forked, seeds=[1, 2, 3], **options)
    whole = generate(model, [[*document, *question] for question in questions], seeds=[1, 2, 3], **options)
    assert answers.tokens == whole.tokens
    np.testing.assert_allclose(answers.logits, whole.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(read_once.state.position, [LENGTH])
    again = generate(model, questions, state=forked, seeds=[1, 2, 3], **options)
    assert again.tokens == answers.tokens


def test_going_on_equals_one_long_call_and_streams_the_same_tokens() -> None:
    model = variant("holo")
    options = dict(sampling=Sampling(temperature=1.5, repetition_penalty=1.3), seeds=[1, 2, 3], **SIZES)
    heard: list[list[int]] = [[], [], []]

    def listen(new: list[list[int]]) -> None:
        for row, ids in zip(heard, new, strict=True):
            row.extend(ids)

    whole = generate(model, PROMPTS, max_new_tokens=9, callback=listen, **options)
    assert heard == whole.tokens
    first = generate(model, PROMPTS, max_new_tokens=4, **options)
    after = dict(state=first.state, logits=first.logits, seen=first.seen)
    rest = generate(model, max_new_tokens=5, **after, **options)
    assert [a + b for a, b in zip(first.tokens, rest.tokens, strict=True)] == whole.tokens


def test_stop_tokens_end_a_row_and_its_state_stands_still() -> None:
    model = variant("hybrid")
    options = dict(max_new_tokens=12, sampling=Sampling(temperature=2.0), seeds=[1, 2, 3], **SIZES)
    free = generate(model, PROMPTS, **options)
    assert [len(row) for row in free.tokens] == [12, 12, 12] and free.stopped == [False] * 3
    stop = free.tokens[1][2]
    ended = generate(model, PROMPTS, stop_tokens=[stop], **options)
    for ours, all_tokens, stopped in zip(ended.tokens, free.tokens, ended.stopped, strict=True):
        cut = all_tokens.index(stop) + 1 if stop in all_tokens else 12
        assert ours == all_tokens[:cut] and stopped == (stop in all_tokens)
    assert ended.state.position.tolist() == [
        len(a) + len(b) for a, b in zip(PROMPTS, ended.tokens, strict=True)
    ]
    said = [prompt + new for prompt, new in zip(PROMPTS, ended.tokens, strict=True)]
    reread = prefill(model, said, piece_size=4, cache_length=64)
    np.testing.assert_allclose(ended.logits, reread.logits, rtol=1e-4, atol=1e-5)


def test_seeds_reproduce_and_matter() -> None:
    model = variant("holo")
    options = dict(max_new_tokens=12, sampling=Sampling(temperature=3.0), **SIZES)
    first, again, other = (generate(model, PROMPTS, seeds=seed, **options).tokens for seed in (1, 1, 2))
    assert first == again != other
    same = generate(model, [PROMPTS[0]] * 3, seeds=5, **options).tokens
    assert same[0] == same[1] == same[2]
    apart = generate(model, [PROMPTS[0]] * 3, seeds=[5, 6, 7], **options).tokens
    assert apart[0] == same[0] != apart[1] != apart[2]


def test_reading_longer_prompts_compiles_nothing_and_allocates_nothing_more() -> None:
    """One program reads every piece, its memory is that of one piece, and the state has one size."""
    model = variant("holo")
    prefill(model, tokens()[:, :16], piece_size=WIDTH)
    compiled = _read_piece._cache_size()
    short = prefill(model, tokens()[:, :16], piece_size=WIDTH)
    long = prefill(model, np.tile(tokens(), (1, 20)), piece_size=WIDTH)
    assert _read_piece._cache_size() == compiled
    assert state_bytes(short.state) == state_bytes(long.state)


def test_loaded_parameters_and_states_compile_once() -> None:
    """Arrays bound to a device, as loaded ones are, do not compile the second piece or block anew."""
    model = jax.device_put(variant("holo"), jax.devices()[0])
    pieces, blocks = _read_piece._cache_size(), decode_block._cache_size()
    options = dict(max_new_tokens=15, block_size=5)
    result = generate(model, [PROMPTS[0]] * 2, piece_size=4, **options)
    assert (_read_piece._cache_size(), decode_block._cache_size()) == (pieces + 1, blocks + 1)
    host = jax.tree.map(np.asarray, (result.state, result.logits))
    generate(model, state=host[0], logits=host[1], **options)
    assert decode_block._cache_size() == blocks + 1


def test_another_temperature_compiles_nothing() -> None:
    model = variant("holo")
    options = dict(max_new_tokens=12, **SIZES)
    generate(model, PROMPTS, sampling=Sampling(temperature=3.0), **options)
    compiled = decode_block._cache_size()
    generate(model, PROMPTS, sampling=Sampling(temperature=0.5), seeds=4, stop_tokens=[1, 2], **options)
    assert decode_block._cache_size() == compiled


def test_states_that_were_given_are_not_changed() -> None:
    model = variant("hybrid")
    state = init_state(model.config, ROWS, cache_length=64)
    before = jax.tree.map(np.array, state)
    prefill(model, PROMPTS, state, piece_size=4)
    generate(model, PROMPTS, state=state, max_new_tokens=4, **SIZES)
    decode_step(model, [1, 2, 3], state)
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_a_full_attention_cache_is_an_error_and_a_window_is_not() -> None:
    model = variant("attention")
    with pytest.raises(ValueError, match=r"has 8 slots, row 1 has used 0 and needs 10 more.* >= 10"):
        state = init_state(model.config, 2, cache_length=8)
        generate(model, [[1], [1] * 5], state=state, max_new_tokens=5)
    reading = prefill(model, [[1] * 8] * ROWS, piece_size=4)
    with pytest.raises(ValueError, match="row 0 has used 8 and needs 1 more"):
        decode_step(model, [1] * ROWS, reading.state)
    overfull = jax.jit(lambda m, i, s: read(m, i, s)[0])(model, jnp.ones((ROWS, 1), jnp.int32), reading.state)
    assert jnp.isnan(overfull).all()
    ring = variant("attention-window")
    result = generate(ring, PROMPTS, max_new_tokens=9, **SIZES)
    assert result.state.layers[0].times.shape[-1] == 5 and [len(row) for row in result.tokens] == [9] * ROWS


def test_inactive_rows_keep_their_state() -> None:
    model = variant("hybrid")
    start = prefill(model, PROMPTS, piece_size=4, cache_length=64)
    after = decode_step(model, [1, 2, 3], start.state, active=[True, False, True])
    both = decode_step(model, [1, 2, 3], start.state)
    for rows, expected in (([1], start.state), ([0, 2], both.state)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            take_rows(after.state, rows),
            take_rows(expected, rows),
        )


@pytest.mark.parametrize(
    "changes,error,message",
    [
        (dict(prompts=[]), ValueError, "prompts is empty"),
        (dict(prompts=[[1], []]), ValueError, "prompt 1 is empty"),
        (dict(prompts=[[1, VOCAB]]), ValueError, r"prompt 0 holds the token id 50; ids must be in \[0, 50\)"),
        (dict(prompts=[[-1]]), ValueError, "token id -1"),
        (dict(prompts=[[1.5]]), TypeError, "prompt 0 has dtype float64"),
        (dict(prompts="text"), TypeError, "prompts is str"),
        (dict(prompts=["text"]), TypeError, "prompt 0 is str.*tokenizer"),
        (dict(prompts=[1, 2]), TypeError, "prompt 0 is int"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens is 0; it must be at least 1"),
        (dict(max_new_tokens=2.0), TypeError, "max_new_tokens is 2.0"),
        (dict(block_size=0), ValueError, "block_size is 0"),
        (dict(piece_size=0), ValueError, "piece_size is 0"),
        (dict(seeds=[1, 2]), ValueError, "seeds has 2 entries"),
        (dict(seeds=-1), ValueError, "seeds is -1"),
        (dict(seeds=2**32), ValueError, "below 2"),
        (dict(stop_tokens=[VOCAB]), ValueError, "stop_tokens holds the token id 50"),
        (dict(allowed_tokens=VOCAB + 1), ValueError, "allowed_tokens is 51; the model has 50 ids"),
        (dict(sampling=Sampling(top_k=VOCAB + 1)), ValueError, "top_k is 51"),
        (dict(state_dtype="int2"), ValueError, "state_dtype is 'int2'"),
        (dict(prompts=None), ValueError, "needs state and logits"),
        (dict(logits=np.zeros((1, VOCAB))), ValueError, "logits is given with prompts"),
        (dict(seen=np.zeros((1, VOCAB), bool)), ValueError, "seen is given without"),
    ],
)
def test_bad_arguments_are_named(changes: dict, error: type, message: str) -> None:
    arguments = dict(prompts=[[1, 2]], max_new_tokens=2) | changes
    with pytest.raises(error, match=message):
        generate(variant("holo"), **arguments)


def test_a_state_of_other_rows_is_refused() -> None:
    model = variant("holo")
    state = init_state(model.config, 2)
    with pytest.raises(ValueError, match="the state has 2 rows; 1 prompts were given"):
        generate(model, [[1]], state=state, max_new_tokens=1)
    with pytest.raises(IndexError, match="rows is"):
        take_rows(state, [2])
    with pytest.raises(ValueError, match="logits has shape"):
        generate(model, state=state, logits=np.zeros((1, VOCAB)), max_new_tokens=1)


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = variant("holo")
    broken = jax.tree.map(lambda leaf: leaf, model)
    broken.head.weight = nnx.Param(jnp.full_like(model.head.weight[...], jnp.nan), axes=("embed", "vocab"))
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(broken, [[1]], max_new_tokens=1)


def test_padded_vocabularies_draw_no_padding() -> None:
    options = dict(sampling=Sampling(temperature=5.0), seeds=[1, 2, 3], **SIZES)
    result = generate(variant("holo"), PROMPTS, max_new_tokens=32, allowed_tokens=3, **options)
    assert {token for row in result.tokens for token in row} == {0, 1, 2}
