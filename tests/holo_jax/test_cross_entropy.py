"""The chunked loss equals the plain one, in value and gradient, and counts what it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.functional.cross_entropy import IGNORE, chunked_cross_entropy, next_token_targets, token_losses


def test_targets_shift_once_and_stop_at_borders() -> None:
    labels = jnp.array([[5, 6, 7, 8, 9], [1, IGNORE, 3, 4, 5]])
    assert next_token_targets(labels).tolist() == [[6, 7, 8, 9, IGNORE], [IGNORE, 3, 4, 5, IGNORE]]
    segments = jnp.array([[1, 1, 2, 2, 0], [0, 0, 1, 1, 1]])
    expected = [[6, IGNORE, 8, IGNORE, IGNORE], [IGNORE, IGNORE, 4, 5, IGNORE]]
    assert next_token_targets(labels, segments).tolist() == expected


@pytest.mark.parametrize(("length", "chunk_tokens"), [(1, 64), (7, 4), (7, 1000), (8, 8)])
def test_matches_plain_loss_and_gradients(length: int, chunk_tokens: int) -> None:
    keys = jax.random.split(jax.random.key(length), 3)
    hidden = jax.random.normal(keys[0], (2, length, 6))
    weights = jax.random.normal(keys[1], (6, 11))
    targets = jax.random.randint(keys[2], (2, length), 0, 11).at[1, 0].set(IGNORE)

    def plain(hidden: jax.Array, weights: jax.Array) -> jax.Array:
        logits = jnp.einsum("bte,ev->btv", hidden, weights)
        return 3 * jnp.sum(token_losses(logits, targets)[0])

    def chunked(hidden: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, count = chunked_cross_entropy(hidden, weights, targets, chunk_tokens=chunk_tokens)
        return 3 * total, count

    value, gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, weights)
    both = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))
    (ours, count), our_gradients = both(hidden, weights)
    assert count == 2 * length - 1
    np.testing.assert_allclose(ours, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), our_gradients, gradients
    )


def test_logits_of_one_chunk_only() -> None:
    """The compiled loss and gradient hold logits of one chunk, however many tokens there are.

    How much that is of one length is said of CPUs: compilers keep different numbers of copies of a chunk.
    """

    def loss(hidden: jax.Array, weights: jax.Array, targets: jax.Array) -> jax.Array:
        return chunked_cross_entropy(hidden, weights, targets, chunk_tokens=256)[0]

    def temporary(tokens: int) -> int:
        hidden = jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32)
        weights = jax.ShapeDtypeStruct((8, 4096), jnp.float32)
        targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, weights, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    quarter = 4096 * 4096 * 4 / 4
    few = temporary(4096)
    assert jax.default_backend() != "cpu" or few < quarter
    assert temporary(8192) - few < quarter


def test_gradient_of_a_tied_table_in_one_chunk() -> None:
    """A transposed float32 table under bfloat16 products: CPUs lack products for some orders of operands."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (2, 64, 64), jnp.bfloat16)
    table = 0.1 * jax.random.normal(keys[1], (258, 64))
    targets = jax.random.randint(keys[2], (2, 64), 0, 258)

    def loss(table: jax.Array, hidden: jax.Array) -> jax.Array:
        return chunked_cross_entropy(hidden, table.T, targets, chunk_tokens=128)[0]

    ours = jax.jit(jax.grad(loss))(table, hidden)
    rounded = table.astype(jnp.bfloat16).astype(jnp.float32)
    exact = jax.grad(loss)(rounded, hidden.astype(jnp.float32))
    assert jnp.max(jnp.abs(ours - exact)) < 2**-8 * jnp.max(jnp.abs(exact))
