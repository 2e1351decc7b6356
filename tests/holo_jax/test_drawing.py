"""Tokens drawn by kernels: the same ones, and the same small numbers, as without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.functional.noise import gumbel, philox, uniform
from holo_jax.generate import stack
from holo_jax.generate.counts import Counts, unpacked
from holo_jax.generate.drawing import drawing_of, first_input, next_token
from holo_jax.generate.forms import decoding_form
from holo_jax.generate.sampling import Sampling, draw, noise, row_keys
from holo_jax.generate.stepping import Form, embed, logits_of, pack, scaled_logits, unscaled
from holo_jax.kernels.decode import choose as decode_choose
from holo_jax.kernels.decode import scores as decode_scores
from tests.holo_jax.models import build
from tests.holo_jax.test_pending import small

ROWS, SIZE, VOCABULARY = 3, 4, 50
STOPS = jnp.array([7, -1, 9, -1], jnp.int32)


def counts(**changes: object) -> Counts:
    """Of a row that reads, one whose token is a stop, and one that has ended."""
    given = Counts(
        before=jnp.full((ROWS,), 1, jnp.int32),
        active=jnp.array([True, True, False]),
        position=jnp.array([5, 2**31 + 3, 8], jnp.uint32),
        launch=jnp.full((ROWS,), 40000, jnp.int32),
        token=jnp.array([3, 9, 9], jnp.int32),
        remaining=jnp.array([2, 6, 0], jnp.int32),
        limit=jnp.full((ROWS,), SIZE, jnp.int32),
        finite=jnp.ones((ROWS,), bool),
        tokens=jnp.where(jnp.arange(SIZE)[:, None] == 0, 11, jnp.full((SIZE, ROWS), -1, jnp.int32)),
    )
    return given._replace(**changes)


def test_the_rows_are_those_of_counts() -> None:
    """Kernels know them by place."""
    assert Counts._fields == (*decode_choose.ROWS, "tokens")


@pytest.mark.parametrize("stacked", [False, True], ids=["products", "compiler"])
@pytest.mark.parametrize(
    ("temperature", "changes"),
    [
        (0.7, {}),
        (0.0, dict(tie_embeddings=True)),
        (1.0, dict(limit=jnp.full((ROWS,), 2, jnp.int32))),
    ],
    ids=["drawn", "greedy", "limit"],
)
def test_the_next_token_is_the_portable_forms(
    temperature: float, changes: dict, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token, numbers and embedding, of logits by a kernel or the compiler's, in several programs."""
    monkeypatch.setattr(decode_scores, "_BLOCKS", 4)
    changes = dict(changes)
    tied = {name: changes.pop(name) for name in list(changes) if name == "tie_embeddings"}
    config = small(num_hidden_layers=1, vocab_size=VOCABULARY, hidden_size=64, **tied)
    model = build(config)
    model.model.norm.weight[...] = jnp.linspace(0.5, 1.5, config.hidden_size)
    model = decoding_form(model)
    interpret = jax.default_backend() != "gpu"
    form = Form(heads=True, products=True, drawn=True, interpret=interpret)
    packed = pack(model, form)
    if stacked:
        form = Form(stacked=True, drawn=True, interpret=interpret)
        packed = {"head": stack.folded_head(model)}
    hidden = jax.random.normal(jax.random.key(1), (ROWS, config.hidden_size))
    now, allowed = counts(**changes), jnp.int32(33)
    sampling = Sampling(temperature=temperature)
    numbers, plan = sampling.numbers, sampling.plan
    positions = now.position[None] + jnp.arange(SIZE, dtype=jnp.uint32)[:, None]
    keys = row_keys(jnp.arange(ROWS, dtype=jnp.uint32), positions)

    drawing = drawing_of(numbers, keys, allowed, plan)
    logits, after, x = next_token(model, hidden, drawing, now.packed(), STOPS, form, packed)

    if unscaled(config, form):
        logits = scaled_logits(model, logits, hidden)
    wanted = logits_of(model, hidden, Form(), None)
    permitted = jnp.where(jnp.arange(VOCABULARY)[None] < allowed, logits, -jnp.inf)
    token, finite = draw(permitted, numbers, keys[1], None, jnp.isfinite(logits), plan=plan)
    following = now.after(token, finite, STOPS)
    np.testing.assert_allclose(logits, wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(after, following.packed())
    assert (np.asarray(token) < 33).all() and np.asarray(following.finite).all()
    np.testing.assert_array_equal(x, embed(model, jnp.where(following.active, token, 0)))
    np.testing.assert_array_equal(first_input(model, unpacked(after)), x)


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_logits_that_are_not_finite_are_told(bad: float) -> None:
    """Of the row that has them, also where the id may not be drawn."""
    logits = jnp.zeros((2, 20)).at[0, 18].set(bad)
    drawing = decode_scores.Drawing(None, None, jnp.array([10], jnp.int32))
    numbers = jnp.zeros((len(decode_choose.ROWS) + SIZE, 2), jnp.int32).at[-1 - SIZE].set(1)
    scores = decode_scores.of_logits(logits, drawing, numbers, interpret=True)
    table = jnp.zeros((20, 8), jnp.bfloat16)
    after, _ = decode_choose.choose(scores, numbers, STOPS, table, divisor=None, interpret=True)
    assert not unpacked(after).finite[0] and 0 <= unpacked(after).token[0] < 20
    assert unpacked(after).finite[1]


def test_a_token_is_drawn_where_no_logit_is_a_number() -> None:
    """An id that exists, so that what reads its embedding reads no other memory."""
    scores = decode_scores.Scores(jnp.full((1, 3), jnp.nan), jnp.full((1, 3), 2**31 - 1, jnp.int32))
    table, now = jnp.zeros((20, 8)), jax.tree.map(lambda x: x[..., :1], counts())
    how = dict(divisor=None, interpret=True)
    after, _ = decode_choose.choose(scores, now.packed(), STOPS, table, **how)
    assert 0 <= unpacked(after).token[0] < 20 and not unpacked(after).finite[0]


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ([0] * 2, [0] * 4, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 2, [0xFFFFFFFF] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0xA4093822, 0x299F31D0],
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_words(key: list[int], counter: list[int], words: list[int]) -> None:
    """The known answers of its authors' library, Random123."""
    given = [tuple(jnp.array([x], jnp.uint32) for x in numbers) for numbers in (key, counter)]
    np.testing.assert_array_equal(jnp.concatenate(philox(*given)), np.array(words, np.uint32))


def test_noise_is_gumbels() -> None:
    """Mean and variance of many, all of them finite, and of an odd number of ids."""
    found = np.asarray(noise(row_keys(jnp.uint32(3), jnp.uint32(5)), 400_001), np.float64)
    assert found.shape == (400_001,) and np.isfinite(found).all()
    assert abs(found.mean() - np.euler_gamma) < 0.01 and abs(found.var() - np.pi**2 / 6) < 0.03
    assert len(np.unique(found)) > 380_000


def test_a_kernels_logarithms_are_close_enough() -> None:
    """Of the least and the greatest uniform numbers, where the series begins, and between."""
    bits = np.concatenate([np.arange(64), 2**23 - 1 - np.arange(64), 2**23 - 2**18 + np.arange(-64, 64)])
    bits = np.concatenate([bits, np.linspace(0, 2**23 - 1, 4001).astype(np.int64)])
    u = uniform(jnp.asarray(bits << 9, jnp.uint32))
    found = -np.log(decode_scores._exponential(u, interpret=True) * np.log(2.0))
    np.testing.assert_allclose(found, -np.log(-np.log(np.asarray(u, np.float64))), rtol=0, atol=6e-6)
    np.testing.assert_allclose(found, gumbel(jnp.asarray(bits << 9, jnp.uint32)), rtol=0, atol=6e-6)


def test_noise_of_a_row_does_not_depend_on_the_others() -> None:
    """A row of a batch has what it has alone."""
    keys = row_keys(jnp.arange(ROWS, dtype=jnp.uint32), jnp.arange(8, 8 + ROWS, dtype=jnp.uint32)[None])
    np.testing.assert_array_equal(noise(keys, VOCABULARY)[:, 1:2], noise(keys[:, 1:2], VOCABULARY))
