"""The bias of a branch, added and differentiated by the norm after it: in Pallas' interpreter."""

import functools
import warnings
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from holo_jax.config import HoloConfig
from holo_jax.kernels.block import normed_products
from holo_jax.model import HoloForCausalLM
from holo_jax.precision import FULL
from holo_jax.residual import Pending, added
from train.planning.steps import inner

EPS = 1e-5
LAYERS, ROWS, TIME, WIDTH = 3, 4, 48, 128


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels between products run in the interpreter."""
    monkeypatch.setattr("holo_jax.kernels.block.support.triton_missing", lambda: None)
    monkeypatch.setattr("holo_jax.kernels.block.support.partitioned", lambda: False)
    jax.config.update("jax_disable_most_optimizations", True)  # the time goes into compiling
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def draw(shape: tuple[int, int, int], *, centered: bool) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    width = shape[-1]
    sizes: dict[str, Any] = {"x": shape, "delta": shape, "offset": width, "scale": width}
    sizes |= {"bias": width} if centered else {}
    found = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}
    weights = [rng.normal(size=(width, out)) / np.sqrt(width) for out in (24, 40)]
    return found | {"weights": tuple(jnp.asarray(w, jnp.float32) for w in weights)}


def by_kernels(p: dict[str, Any]) -> Any:
    dtypes = (p["x"].dtype,) * 2
    given = (p[name] for name in ("x", "delta", "offset", "scale"))
    total, products = normed_products(*given, p.get("bias"), p["weights"], dtypes=dtypes, eps=EPS)
    return total, *products


def plainly(p: dict[str, Any]) -> Any:
    total = added(p["x"], Pending(p["delta"], p["offset"][None, None]))
    rows = total - jnp.mean(total, axis=-1, keepdims=True) if "bias" in p else total
    rows = rows * jax.lax.rsqrt(jnp.mean(rows * rows, axis=-1, keepdims=True) + EPS) * p["scale"][None, None]
    rows = rows + p["bias"][None, None] if "bias" in p else rows
    return total, *(rows @ w for w in p["weights"])


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("shape", [(3, 21, 64), (2, 500, 32), (1, 192, 128)])
def test_the_norm_adds_an_offset_and_sums_its_gradient(shape, centered):
    """Also at lengths that one program takes, a row at a time."""
    given = draw(shape, centered=centered)
    pulls = [jax.random.normal(jax.random.key(i), (*shape[:2], n)) for i, n in enumerate((shape[2], 24, 40))]

    def run(form):
        def loss(p):
            results = form(p)
            return sum(jnp.sum(x * pull) for x, pull in zip(results, pulls, strict=True)), results

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(given)

    (_, found), gradients = run(by_kernels)
    (_, wanted), expected = run(plainly)
    np.testing.assert_array_equal(found[0], wanted[0])
    assert gradients.keys() == expected.keys() and float(jnp.max(jnp.abs(gradients["offset"]))) > 1
    for got, want in zip(
        jax.tree.leaves((found, gradients)), jax.tree.leaves((wanted, expected)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.max(jnp.abs(want))))


def test_in_sixteen_bits_the_sum_is_rounded_as_before():
    """The offset to the dtype of the stream, what it is added to, and the sum; its gradient only once."""
    given = draw((2, 96, 128), centered=True)
    narrow = given | {name: given[name].astype(jnp.bfloat16) for name in ("x", "delta")}
    total = jax.jit(lambda p: by_kernels(p)[0])(narrow)
    # In float32, rounded where bfloat16 numbers are stored: else the compiler may leave roundings out.
    rounded = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
    x, delta, offset = (rounded(given[name]) for name in ("x", "delta", "offset"))
    branch = rounded(delta + offset[None, None])
    assert total.dtype == jnp.bfloat16
    np.testing.assert_array_equal(total.astype(jnp.float32), rounded(x + branch))
    without = rounded(x + delta + offset[None, None])
    assert np.any(np.asarray(without) != np.asarray(rounded(x + branch)))

    gradient = jax.jit(jax.grad(lambda p: jnp.sum(by_kernels(p)[0].astype(jnp.float32))))(narrow)["offset"]
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, jnp.full(128, 192.0))


def test_kernels_with_an_offset_lower_for_a_gpu(monkeypatch):
    """What the interpreter accepts, Triton may not."""
    monkeypatch.setattr("holo_jax.kernels.block.norms.interpreted", lambda: False)
    given = jax.eval_shape(functools.partial(draw, (2, 192, 256), centered=True))
    narrow = {name: jax.ShapeDtypeStruct(given[name].shape, jnp.bfloat16) for name in ("x", "delta")}

    def step(p):
        results, pull = jax.vjp(by_kernels, p)
        return pull(results)

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of this backend of Pallas
        lowered = jax.jit(step).trace(given | narrow).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("xla.gpu.triton") == 2


@functools.cache
def model(backend: str, remat: str, unroll: int) -> tuple[Any, Any]:
    """(loss of the parameters, parameters off their zeros) of ``seed`` in rows with borders."""
    config = HoloConfig.preset(
        "seed",
        vocab_size=64,
        hidden_size=WIDTH,
        hd_dim=64,
        mlp_ratio=0.5,
        num_hidden_layers=LAYERS,
        precision=FULL,
        block_backend=backend,
        remat=remat,
        scan_unroll=unroll,
    )
    graphdef, params = nnx.split(nnx.eval_shape(lambda: HoloForCausalLM(config, rngs=nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), params)
    tokens = jnp.asarray(rng.integers(64, size=(ROWS, TIME), dtype=np.int32))
    ids = jnp.asarray(np.where(np.arange(TIME) < 31, 1, 2)[None].repeat(ROWS, 0), jnp.int32)

    def loss(params: Any) -> Any:
        return nnx.merge(graphdef, params)(tokens, labels=tokens, segment_ids=ids).loss

    return loss, params


def passes(jaxpr: Any, times: int = 1) -> Counter[str]:
    """How often outside of kernels a vector is added to all rows, or rows are summed; loops by turns."""
    found: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        name, sizes = eqn.primitive.name, [x.aval.size for x in (*eqn.invars, *eqn.outvars)]
        if name in ("add", "reduce_sum") and max(sizes) == ROWS * TIME * WIDTH and WIDTH in sizes:
            found[name] += times
        if name != "pallas_call":
            for one in inner(eqn):
                found += passes(one, times * (eqn.params["length"] if name == "scan" else 1))
    return found


@pytest.mark.parametrize("unroll", [1, LAYERS])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_no_block_adds_its_bias_in_a_pass_of_its_own(interpreted, monkeypatch, remat, unroll):
    """Nor sums its gradient so; the last block's, with the sum before the final norm."""
    monkeypatch.setattr("holo_jax.model.splits_stacks", lambda: True)
    found = {}
    for backend in ("portable", "auto"):
        loss, params = model(backend, remat, unroll)
        found[backend] = passes(jax.make_jaxpr(jax.value_and_grad(loss))(params).jaxpr)
    assert found["auto"] == {"add": 1, "reduce_sum": 1}
    # Of two norms and this bias a block, and of the final norm; norms are made again by "dots".
    adds = 3 * LAYERS + 1 + (2 * LAYERS if remat == "dots" else 0)
    assert found["portable"] == {"add": adds, "reduce_sum": 5 * LAYERS + 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "unroll"),
    [("none", 1), ("none", LAYERS), ("dots", 1), ("dots", LAYERS), ("full", 1), ("full", LAYERS)],
)
def test_a_model_that_carries_biases_is_the_same(interpreted, monkeypatch, remat, unroll):
    monkeypatch.setattr("holo_jax.model.splits_stacks", lambda: True)
    loss, params = model("auto", remat, unroll)
    step = jax.jit(jax.value_and_grad(loss)).trace(params)
    assert "name=norm_backward" in str(step.jaxpr)
    value, gradients = step.lower().compile()(params)
    wanted, expected = plain_step()
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    flat = jax.tree.leaves_with_path(gradients)
    for (path, got), want in zip(flat, jax.tree.leaves(expected), strict=True):
        limit = 1e-4 * float(jnp.max(jnp.abs(want)))
        np.testing.assert_allclose(got, want, atol=limit, err_msg=jax.tree_util.keystr(path))


@functools.cache
def plain_step() -> Any:
    loss, params = model("portable", "none", 1)
    return jax.jit(jax.value_and_grad(loss))(params)
