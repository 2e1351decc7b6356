"""Kernels of decoding between and after tokens, in Pallas' interpreter, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.functional.memory.state import compensated_add
from holo_jax.generate import stack, stepping
from holo_jax.kernels import capability
from holo_jax.kernels.decode import gate as decode_gate
from holo_jax.kernels.decode import join as decode_join
from holo_jax.kernels.decode import plan as decode_plan
from holo_jax.kernels.decode import products as decode_products
from holo_jax.kernels.decode import rows as decode_rows
from holo_jax.kernels.decode import rows_plan as decode_rows_plan
from holo_jax.kernels.decode import shape as decode_shape
from holo_jax.precision import FULL, MIXED
from tests.holo_jax.models import variant_config

WIDTH, OUTPUTS = 192, 37


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return scale * np.random.default_rng((seed, *shape)).normal(size=shape)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_norm_product_and_what_follows(rows: int, dtype: str) -> None:
    """Outputs that no tile divides."""
    x, scale = jnp.asarray(draw(rows, WIDTH), dtype), jnp.asarray(1 + 0.1 * draw(WIDTH), jnp.float32)
    weight = jnp.asarray(draw(2 * OUTPUTS, WIDTH, scale=WIDTH**-0.5), dtype)
    residual = jnp.asarray(draw(rows, OUTPUTS), dtype)
    wide, matrix = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    normed = wide / np.sqrt(np.square(wide).mean(1, keepdims=True) + 1e-6) * np.asarray(scale, np.float64)
    up, gate = normed @ matrix[:OUTPUTS].T, normed @ matrix[OUTPUTS:].T
    wanted = {
        "maps": normed @ matrix.T,
        "gated": gate / (1 + np.exp(-gate)) * up,
        "added": np.asarray(residual, np.float64) + wide @ matrix[:OUTPUTS].T,
    }
    rest = dict(norm=scale, eps=1e-6, interpret=True)
    found = {
        "maps": decode_products.product("maps", x, weight, **rest),
        "gated": decode_products.product("gated", x, weight, **rest),
        "added": decode_products.product("added", x, weight[:OUTPUTS], residual=residual, interpret=True),
    }
    assert found["maps"].dtype == jnp.float32 and found["gated"].dtype == found["added"].dtype == x.dtype
    tolerance = 2e-6 if dtype == "float32" else 5e-3
    for name, value in wanted.items():
        error = np.abs(np.asarray(found[name], np.float64) - value).max() / np.abs(value).max()
        assert error < tolerance, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gate_norms_what_its_maps_were_made_of(dtype: str) -> None:
    """Rows and columns that no block divides; against float64 of what is given."""
    x = jnp.asarray(draw(3, WIDTH), dtype)
    y = jnp.asarray(draw(3, 2 * OUTPUTS, scale=2.0), jnp.float32)
    wide = np.asarray(x, np.float64)
    normed = np.asarray(y, np.float64) / np.sqrt(np.square(wide).mean(1, keepdims=True) + 1e-6)
    up, gate = normed[:, :OUTPUTS], normed[:, OUTPUTS:]
    found = decode_gate.gated(y, x, eps=1e-6, interpret=True)
    assert found.dtype == x.dtype
    wanted = gate / (1 + np.exp(-gate)) * up
    error = np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()
    assert error < (2e-6 if dtype == "float32" else 1e-2)


def test_a_group_joins_as_the_compensated_sum_adds() -> None:
    """What lies past the group is not read: it is not a number here."""
    size, room = 3, 4
    narrow = lambda *shape, scale=1.0: jnp.asarray(draw(*shape, scale=scale), jnp.float32)  # noqa: E731
    memory, residue = narrow(2, 3, 16, 8), narrow(2, 3, 16, 8, scale=1e-8)
    keys, written = narrow(2, 3, room, 16), narrow(2, 3, room, 8)
    with jax.default_matmul_precision("highest"):
        added = jnp.einsum("bhck,bhcd->bhkd", keys[:, :, :size], written[:, :, :size])
    wanted = compensated_add(memory, residue, added)
    past = (slice(None), slice(None), slice(size, None))
    keys, written = keys.at[past].set(jnp.nan), written.at[past].set(jnp.nan)
    found = decode_join.join(memory, residue, keys, written, size=size, interpret=True)
    pair = [np.asarray(a, np.float64) + np.asarray(b, np.float64) for a, b in (found, wanted)]
    np.testing.assert_allclose(*pair, rtol=1e-6, atol=1e-6)
    assert np.abs(found[1]).max() <= np.spacing(np.abs(found[0]).max())


def test_what_products_refuse() -> None:
    """Reasons name the field, the value and the constraint."""
    assert decode_products.unsupported(4, (1024, 2816)) is None
    assert decode_products.unsupported(5, (1024,)) == "the batch has 5 rows; it must have at most 4"
    reason = decode_products.unsupported(1, (1024, 1000))
    assert reason == "a product sums over 1000 columns; it must be a multiple of 64"


def test_the_form_is_chosen_by_rows_width_and_support(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device with the kernels; on this one every choice is portable."""
    sizes = dict(hidden_size=1024, hd_dim=1024, head_dim=64, phasors=32)
    narrow = variant_config("holo", precision=MIXED, **sizes)
    wide = narrow.replace(hidden_size=2048, hd_dim=2048)
    assert stepping.choose(wide, 1) == stepping.PORTABLE
    monkeypatch.setattr(decode_shape, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(capability, "multiprocessors", lambda: 132)
    products, heads = stepping.Form(heads=True, products=True), stepping.Form(heads=True)
    folded = heads._replace(folded=True)
    assert stepping.choose(wide, 1) == products
    assert stepping.choose(narrow, 2) == stepping.choose(narrow, 16) == folded
    assert stepping.choose(wide, 4) == stepping.choose(wide, 16) == heads
    assert stepping.choose(narrow, 17) == folded
    assert stepping.choose(narrow.replace(norm="layernorm"), 2) == heads
    assert stepping.choose(narrow, 256) == folded._replace(cublas=True)
    assert stepping.choose(wide, 256) == heads._replace(cublas=True)
    assert stepping.choose(narrow.replace(precision=FULL), 2) == heads
    assert stepping.choose(narrow.replace(hidden_size=1000), 1) == stepping.PORTABLE
    assert stepping.choose(wide.replace(hidden_size=2000), 1) == heads
    assert stepping.choose(narrow, 1) == products
    monkeypatch.setattr(decode_plan, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    whole = stepping.Form(stacked=True, drawn=True, programs=132)
    assert all(stepping.choose(narrow, rows) == whole for rows in (1, 2, 16))
    assert stepping.choose(wide, 1) == products
    few_copies = narrow.replace(mlp_ratio=1.0)
    shape = stack.shape_of(few_copies, 1, 16, 132)
    assert decode_rows_plan.unsupported(shape, jnp.bfloat16) is None
    assert decode_rows_plan.after_states(shape) < decode_rows.FLIGHT
    assert stepping.choose(few_copies, 1) == products and stepping.choose(few_copies, 16) == folded
    many_heads = narrow.replace(hidden_size=512, hd_dim=3584)
    assert stepping.choose(many_heads, 1) == products
    assert stepping.choose(narrow, 17) == folded and stepping.choose(wide, 2) == heads
