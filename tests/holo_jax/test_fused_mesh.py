"""The kernels between products on a mesh, in Pallas' interpreter: every device runs those of one."""

import functools
import re
from typing import Any

import jax
import numpy as np
import pytest

from holo_jax.kernels.block import support
from holo_jax.parallel import MESH_AXES
from tests.train.common import micro_config
from train.loop import build
from train.sharding import batch_sharding, make_mesh, put_batch, replicated
from train.step import StepFunctions, TrainState

pytestmark = [pytest.mark.devices(8), pytest.mark.slow]
ROWS, TIME = 4, 64
MODELS: dict[str, dict[str, Any]] = {
    "holo": dict(
        model__preset="holo",
        model__hd_dim=32,
        model__erase=False,
        model__block_backend="norms",
        model__num_hidden_layers=2,
    ),
    "gelu": dict(
        model__preset="holo",
        model__hd_dim=32,
        model__erase=False,
        model__mlp="gelu",
        model__num_hidden_layers=2,
    ),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels run in the interpreter, on one device too."""
    monkeypatch.setattr("holo_jax.kernels.block.support.triton_missing", lambda: None)
    partitioned = support.partitioned
    monkeypatch.setattr(
        support, "partitioned", lambda: partitioned() and not jax.sharding.get_abstract_mesh().empty
    )
    jax.config.update("jax_disable_most_optimizations", True)  # the time goes into compiling
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_steps(model: str, sizes: tuple[int, ...], **fields: Any) -> tuple[StepFunctions, Any, Any]:
    """The step functions, a batch of ``ROWS`` rows with borders, and the traced step."""
    mesh_of = {f"mesh__{axis}": size for axis, size in zip(MESH_AXES, sizes, strict=True)}
    fields = MODELS[model] | fields | mesh_of | dict(model__hidden_size=128, model__mlp_ratio=1.0)
    config = micro_config(
        global_batch_size=ROWS, num_steps=1, context_length=TIME, mesh__devices=int(np.prod(sizes)), **fields
    )
    mesh = make_mesh(config.mesh)
    _, steps = build(config.model, config.optimizer, config.num_steps, mesh, config.mesh.exchange)
    generator = np.random.default_rng(0)
    tokens = generator.integers(64, size=(ROWS, TIME), dtype=np.int32)
    segments = np.ones((ROWS, TIME), np.int32)
    segments[1, 20:], segments[2, 32:] = 2, 2
    batch = put_batch({"tokens": tokens, "segment_ids": segments}, 1, batch_sharding(mesh))
    return steps, batch, steps.train.trace(steps.shapes, batch)


PLAIN: dict[str, Any] = dict(model__remat="dots", model__block_backend="portable")


@functools.cache
def begun(model: str) -> TrainState:
    """As one device begins, and every mesh (``tests.train.test_parallel``), with biases off their zeros."""
    steps, batch, _ = make_steps(model, (1, 1, 1, 1), **PLAIN)
    key = np.asarray(jax.random.key_data(jax.random.key(0, impl="threefry2x32")))
    state = jax.device_get(steps.init(jax.device_put(key, replicated(batch["tokens"].sharding.mesh))))
    generator = np.random.default_rng(1)

    def off_zero(x: np.ndarray) -> np.ndarray:
        return x if np.any(x) else 0.1 * generator.normal(size=x.shape).astype(x.dtype)

    return state._replace(params=jax.tree.map(off_zero, state.params))


def first_step(model: str, sizes: tuple[int, ...], **fields: Any) -> tuple[Any, Any, list[np.ndarray]]:
    """The step traced and lowered; loss, gradient norm and moments (the gradients) after the first."""
    steps, batch, traced = make_steps(model, sizes, **fields)
    lowered = traced.lower()
    after, metrics = lowered.compile()(jax.device_put(begun(model), steps.shardings), batch)
    found = [metrics.loss, metrics.grad_norm, *jax.tree.leaves(after.opt_state)]
    return traced, lowered, [np.asarray(x) for x in jax.device_get(found)]


@functools.cache
def plain_step(model: str) -> tuple[Any, Any, list[np.ndarray]]:
    """One device without kernels; what is computed again changes no number."""
    return first_step(model, (1, 1, 1, 1), **PLAIN)


@pytest.mark.parametrize(
    ("model", "sizes", "remat"),
    [
        ("holo", (2, 1, 1, 1), "dots"),
        ("holo", (1, 2, 2, 1), "full"),
        ("gelu", (1, 2, 1, 1), "none"),
        ("gelu", (2, 1, 2, 1), "dots"),
    ],
)
def test_a_step_is_that_of_one_device(model: str, sizes: tuple[int, ...], remat: str) -> None:
    traced, _, found = first_step(model, sizes, model__remat=remat)
    plain, _, want = plain_step(model)
    assert "norm_forward" in str(traced.jaxpr) and "norm_forward" not in str(plain.jaxpr)
    for got, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_divided_model_keeps_the_plain_form() -> None:
    assert "norm_forward" not in str(make_steps("holo", (1, 1, 1, 2))[2].jaxpr)


@pytest.mark.parametrize(
    ("model", "transport", "dtype"),
    [
        ("holo", "collectives", "float32"),
        ("holo", "collectives", "bfloat16"),
        ("holo", "copies", "bfloat16"),
        ("gelu", "collectives", "float32"),
    ],
)
def test_sums_of_blocks_are_in_order(
    monkeypatch: pytest.MonkeyPatch, model: str, transport: str, dtype: str
) -> None:
    """Unrolled over ``data``: the numbers of one device; sums by block, each before what follows it."""
    monkeypatch.setattr("holo_jax.model.splits_stacks", lambda: True)
    layers = MODELS[model]["model__num_hidden_layers"]
    fields = dict(model__remat="dots", model__scan_unroll=layers)
    *_, want = plain_step(model)
    over = fields | dict(mesh__reduce_dtype=dtype, mesh__transport=transport, mesh__in_order=True)
    _, lowered, found = first_step(model, (4, 1, 1, 1), **over)
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == "float32" else dict(rtol=2e-2, atol=2e-4)
    for got, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(got, expected, **tolerance)
    text = lowered.as_text()
    names = {"embedding", "period 0", "period 1", "following"}
    if transport == "collectives":
        assert set(re.findall(r'combiner_key = "([^"]+)"', text)) == names
    else:
        # A part is sent in one piece, twice.
        assert text.count('"stablehlo.all_to_all"') == 2 * len(names)
    # Gradients of a part are computed, and then summed, before what goes back through the part before it.
    assert text.count("optimization_barrier") >= 2 * layers
