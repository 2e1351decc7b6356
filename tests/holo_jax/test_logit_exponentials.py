"""The loss from exponentials over references of rows, against float64: the kernel, and what is made of it."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.functional.cross_entropy import IGNORE
from holo_jax.kernels import linear_cross_entropy, mosaic
from holo_jax.kernels.products import logit_exponentials
from tests.holo_jax.kernel_package import install

WIDTH, VOCABULARY = 64, 50
Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(
        sys.modules["holo_jax.kernels.products.linear_cross_entropy"], "partitioned", lambda: False
    )
    return install(monkeypatch)


def rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), np.float64)


def draw(rows: int, sharpness: float) -> Inputs:
    """Hidden states near (or, if negative, opposite to) their target's weights, some targets ignored."""
    rng = np.random.default_rng(rows)
    weights = rounded(rng.normal(size=(WIDTH, VOCABULARY)) / np.sqrt(WIDTH))
    targets = rng.integers(0, VOCABULARY, rows)
    hidden = rounded(rng.normal(size=(rows, WIDTH)) + sharpness * weights.T[targets])
    targets[::7] = IGNORE
    return hidden, weights, targets


def exact(
    hidden: np.ndarray, weights: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(losses, d_hidden, d_weights) in float64."""
    logits, counted = hidden @ weights, targets != IGNORE
    top = logits.max(axis=1, keepdims=True)
    normalizers = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    own = (np.arange(len(targets)), np.where(counted, targets, 0))
    d_logits = np.exp(logits - normalizers)
    d_logits[own] = 0
    d_logits[own] = -d_logits.sum(axis=1)
    d_logits *= counted[:, None]
    losses = np.where(counted, normalizers[:, 0] - logits[own], 0)
    return losses, d_logits @ weights.T, hidden.T @ d_logits


def found(inputs: Inputs, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(summed loss, d_hidden, d_weights) of what runs on Hopper, in float64."""
    hidden, weights, targets = (
        jnp.asarray(x, d) for x, d in zip(inputs, (jnp.bfloat16, jnp.float32, jnp.int32), strict=True)
    )

    def total(hidden: jax.Array, weights: jax.Array) -> jax.Array:
        return linear_cross_entropy(hidden[None], weights, targets[None], chunk_tokens=chunk)[0]

    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, weights)
    return tuple(np.asarray(x, np.float64) for x in (value, *gradients))  # type: ignore[return-value]


@pytest.mark.parametrize("rows, chunk", [(9, 256), (83, 32)])
@pytest.mark.parametrize("sharpness", [0, 20, 45, -20, -70])
def test_loss_and_gradients_equal_float64(kernels, rows: int, chunk: int, sharpness: float) -> None:
    """Losses from 1e-12 to some 120 nats: every row's gradient is known to the rounding of bfloat16."""
    inputs = draw(rows, sharpness)
    losses, *wanted = exact(*inputs)
    total, d_hidden, d_weights = found(inputs, chunk)
    assert kernels and {name for name, *_ in kernels} == {"chunk"}
    np.testing.assert_allclose(total, losses.sum(), rtol=2e-5, atol=1e-9)
    known = losses > 1e-8  # below, exponentials are smaller than any number of bfloat16
    scale = np.linalg.norm(wanted[0], axis=1)
    off = np.linalg.norm(d_hidden - wanted[0], axis=1)
    assert np.all(off[known] < 2**-7 * scale[known]) and np.all(off[~known] < 1e-9)
    assert np.linalg.norm(d_weights - wanted[1]) < 2**-7 * np.linalg.norm(wanted[1]) + 1e-9
    assert np.all(d_hidden[inputs[2] == IGNORE] == 0)


def test_a_loss_beyond_the_range_of_exponentials_is_infinite(kernels) -> None:
    """And not some number: the train loop counts such a step as not finite."""
    inputs = draw(9, -250)
    losses, *_ = exact(*inputs)
    assert losses.max() > 150
    total, *gradients = found(inputs, 256)
    assert total == np.inf and not np.all(np.isfinite(gradients[0]))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its interpreter came with jax 0.11")
@pytest.mark.parametrize("vocabulary", [700, 768])
def test_the_kernel_equals_its_definition(monkeypatch: pytest.MonkeyPatch, vocabulary: int) -> None:
    """Several blocks of a program, more steps than stages, an ignored row, columns past the vocabulary."""
    monkeypatch.setattr(logit_exponentials, "multiprocessors", lambda: 2)
    rng = np.random.default_rng(5)
    hidden = rounded(rng.normal(size=(256, 384)))
    table = rounded(rng.normal(size=(768, 384)) / np.sqrt(384))
    targets, reference = rng.integers(0, vocabulary, 256), rng.normal(size=256).astype(np.float32)
    reference[3] = np.finfo(np.float32).max
    wanted = np.exp2(hidden @ table.T * np.log2(np.e) - reference[:, None].astype(np.float64))
    wanted[:, vocabulary:] = 0
    wanted[np.arange(256), targets] = 0
    ours, sums = logit_exponentials.exponentials(
        *(jnp.asarray(x, jnp.bfloat16) for x in (hidden, table)),
        jnp.asarray(reference),
        jnp.asarray(targets, jnp.int32),
        vocabulary=vocabulary,
        interpret=mosaic.pallas().InterpretGPUParams(),
    )
    assert np.all((np.asarray(ours, np.float64) == 0) == (wanted == 0))
    np.testing.assert_allclose(np.asarray(ours, np.float64), wanted, rtol=2**-8)
    np.testing.assert_allclose(np.asarray(sums).T, wanted.reshape(256, -1, 128).sum(axis=2), rtol=2e-5)
