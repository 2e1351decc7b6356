"""Kernels of decoding between and after tokens, in Pallas' interpreter, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.functional.memory.state import compensated_add
from holo_jax.generate import stepping
from holo_jax.kernels import capability
from holo_jax.kernels.decode import gate as decode_gate
from holo_jax.kernels.decode import heads as decode_heads
from holo_jax.kernels.decode import join as decode_join
from holo_jax.kernels.decode import plan as decode_plan
from holo_jax.kernels.decode import products as decode_products
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


@pytest.mark.parametrize("part", [4, 32])
def test_the_last_token_of_a_group_joins_the_group(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two kernels do one after the other; on a GPU too. A row that does not read writes nothing."""
    monkeypatch.setattr(decode_heads, "_ROWS_JOINED", part)
    interpret = jax.default_backend() != "gpu"
    rows, heads, m, d, taps, size, joins = 3, 2, 32, 64, 2, 4, 3
    shape = decode_shape.Shape(
        rows=rows,
        layers=1,
        width=64,
        heads=heads,
        m=m,
        d=d,
        hidden=64,
        taps=taps,
        size=size,
        write=True,
        erase=True,
        gate=True,
        head_norm=True,
        scale="sqrt_writes",
        phase_scale=0.8,
        eps=1e-6,
        programs=1,
        interpret=interpret,
    )
    narrow = lambda *shape, scale=1.0: jnp.asarray(draw(*shape, scale=scale), jnp.float32)  # noqa: E731
    state = (1, rows, heads)
    arrays = {
        "memory": narrow(*state, 2 * m, d, scale=0.3),
        "writes": jnp.square(narrow(*state)),
        "phases": narrow(1, rows, size + taps - 1, heads * m),
        "keys": narrow(*state, size, 2 * m, scale=0.1),
        "written": narrow(*state, size, d),
        "squares": jnp.square(narrow(*state, size)),
        "read_taps": narrow(1, taps, heads * m),
        "write_taps": narrow(1, taps, heads * m),
        "head_norm": narrow(1, heads, d),
        "write_bias": narrow(1, heads),
        "erase_bias": narrow(1, heads),
        "y": narrow(rows, shape.offsets["all"]),
        "numbers": jnp.array([[joins - 1] * rows, [1, 0, 1], [9] * rows, [0] * rows], jnp.int32),
    }
    residue = narrow(*state, 2 * m, d, scale=1e-8)
    apart = decode_heads.run_heads(shape, arrays, jnp.float32)
    wanted = decode_join.join(
        arrays["memory"][0],
        residue[0],
        apart["keys"][0],
        apart["written"][0],
        size=joins,
        interpret=interpret,
    )
    found = decode_heads.run_heads(shape, arrays | {"residue": residue}, jnp.float32, joins=joins)
    for name, array in apart.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
    pair = (found["memory"][0], found["residue"][0]), wanted
    np.testing.assert_allclose(
        *(np.asarray(a, np.float64) + np.asarray(b, np.float64) for a, b in pair), rtol=1e-6, atol=1e-6
    )
    assert (found["written"][0, 1, :, joins - 1] == 0).all()
    assert np.abs(found["residue"]).max() <= np.spacing(np.abs(found["memory"]).max())


def test_what_products_refuse() -> None:
    """Reasons name the field, the value and the constraint."""
    assert decode_products.unsupported(4, (1024, 2816)) is None
    assert decode_products.unsupported(5, (1024,)) == "the batch has 5 rows; it must have at most 4"
    reason = decode_products.unsupported(1, (1024, 1000))
    assert reason == "a product sums over 1000 columns; it must be a multiple of 64"


def test_the_form_is_chosen_by_rows_width_and_support(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device with the kernels; on one without every choice is portable."""
    for module in (decode_shape, decode_plan):
        monkeypatch.setattr(module, "compute_capability", lambda: None)
    sizes = dict(hidden_size=1024, hd_dim=1024, head_dim=64, phasors=32)
    narrow = variant_config("holo", precision=MIXED, **sizes)
    wide = narrow.replace(hidden_size=2048, hd_dim=2048)
    assert stepping.choose(wide, 1) == stepping.PORTABLE
    monkeypatch.setattr(decode_shape, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(capability, "multiprocessors", lambda: 132)
    heads = stepping.Form(heads=True, drawn=True)
    products, folded = heads._replace(products=True), heads._replace(folded=True)
    assert stepping.choose(wide, 1) == products
    assert stepping.choose(narrow, 2) == stepping.choose(narrow, 16) == folded
    assert stepping.choose(wide, 4) == stepping.choose(wide, 16) == heads
    assert stepping.choose(narrow, 17) == folded
    assert stepping.choose(narrow.replace(norm="layernorm"), 2) == heads
    assert stepping.choose(narrow, 256) == folded._replace(joined=True, cublas=True)
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
    assert all(stepping.choose(few_copies, rows) == whole for rows in (1, 16))
    many_heads = narrow.replace(hidden_size=512, hd_dim=3584)
    assert stepping.choose(many_heads, 1) == products
    assert stepping.choose(narrow, 17) == folded and stepping.choose(wide, 2) == heads
