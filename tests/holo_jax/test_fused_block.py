"""The kernels between products, in Pallas' interpreter: against float64, and in a whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.ad_checkpoint import saved_residuals

from eval.common import Reporter
from eval.speed_parts import block_gate
from holo_jax import kernels
from holo_jax.blocks import rematerialised
from holo_jax.config import HoloConfig
from holo_jax.functional import accumulate
from holo_jax.kernels.block import uses
from holo_jax.kernels.hopper import backend as hopper
from holo_jax.mixers import fused_memory
from holo_jax.model import HoloForCausalLM
from holo_jax.parallel import rounded_once
from holo_jax.precision import FULL

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a report that nobody keeps."""


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run in the interpreter; the memory that reads features is the portable one."""
    monkeypatch.setattr("holo_jax.kernels.block.support.triton_missing", lambda: None)
    monkeypatch.setattr("holo_jax.kernels.block.support.partitioned", lambda: False)
    calls = []

    def choose(call, backend):
        return "hopper" if isinstance(call.values, jax.ShapeDtypeStruct) else "portable"

    monkeypatch.setattr(kernels, "choose", choose)

    def accumulate_features(keys, queries, call, *, scaled, gated, final):
        assert gated is (call.erase is None) and not final
        calls.append(keys.shape)
        m = keys.shape[-1] // 2
        phases = (jnp.arctan2(x[..., m:], x[..., :m]) for x in (keys, queries))
        gates = jnp.linalg.norm(keys, axis=-1) if gated else call.gates
        return accumulate(*phases, call.values, gates, call.erase, **options(call))

    def options(call):
        return dict(binding="outer", segment_ids=call.segment_ids, method=call.method)

    monkeypatch.setattr(hopper, "accumulate_features", accumulate_features)
    jax.config.update("jax_disable_most_optimizations", True)  # the time goes into compiling
    yield calls
    jax.config.update("jax_disable_most_optimizations", False)


def test_the_gate_passes_in_the_interpreter(interpreted, monkeypatch):
    monkeypatch.setattr(block_gate, "_ROWS", 128)
    monkeypatch.setattr(block_gate, "_WIDTH", 128)
    monkeypatch.setattr(block_gate, "_TIME", 141)
    elsewhere = ("denoiser", "loss", "normed denoiser")  # of kernels that are not interpreted here
    names = [name for name in block_gate.cases() if name not in elsewhere]
    assert names == [
        "norm",
        "centered norm",
        "normed gelu",
        "kept gelu",
        "retrieval",
        "factors",
        "features",
        "gated features",
        "scale",
        "sum",
    ]
    found = block_gate.cases()
    monkeypatch.setattr(block_gate, "cases", lambda: {name: found[name] for name in names})
    reporter = Reporter("speed", Settings(), (0,), out=None, command="")
    assert block_gate.run(reporter, seed=0)
    assert len(reporter.values) == 6 + 8 + 8 + 8 + 6 + 3 + 4 + 4 + 2 + 5


@pytest.mark.parametrize(
    "changes", [dict(erase=False), dict(erase=False, kernel="triton_outer"), dict(preset="seed")]
)
def test_a_model_is_the_same(interpreted, monkeypatch, changes):
    changes = {"preset": "holo", "kernel": "hopper", **changes}
    preset, kernel = changes.pop("preset"), changes.pop("kernel")
    if kernel != "hopper":

        def choose(call, backend):
            return kernel if isinstance(call.values, jax.ShapeDtypeStruct) else "portable"

        monkeypatch.setattr(kernels, "choose", choose)
    tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, 64)
    found = {}
    for backend in ("portable", "auto"):
        config = HoloConfig.preset(
            preset,
            vocab_size=64,
            hidden_size=128,
            hd_dim=64,
            phasors=16,
            mlp_ratio=1.0,
            num_hidden_layers=1,
            precision=FULL,
            block_backend=backend,
            memory_method="chunked",
            remat="dots",
            **changes,
        )
        graphdef, params = nnx.split(HoloForCausalLM(config, rngs=nnx.Rngs(0)), nnx.Param)

        def loss(params, graphdef=graphdef):
            return nnx.merge(graphdef, params)(tokens, labels=tokens).loss

        step = jax.jit(jax.value_and_grad(loss)).trace(params)
        if backend == "auto":
            # None of them twice.
            assert str(step.jaxpr).count("name=norm_forward") == 3
            assert str(step.jaxpr).count("name=outer_outputs") == (kernel == "triton_outer")
        found[backend] = step.lower().compile()(params)
    assert bool(interpreted) == (preset == "holo" and kernel == "hopper")
    for x, y in zip(jax.tree.leaves(found["auto"]), jax.tree.leaves(found["portable"]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 + 1e-4 * float(jnp.max(jnp.abs(y))))


def test_scaled_values_are_kept_in_place_of_values(interpreted):
    """Going back needs the product of values and factors alone, a factor of 0 included."""
    values = jax.random.normal(jax.random.key(0), (1, 64, 2, 16))
    factors = jnp.abs(jax.random.normal(jax.random.key(1), (1, 64, 2))).at[0, 3].set(0.0)

    def loss(values, factors):
        return jnp.sum(jnp.sin(kernels.block.scaled_heads(values, factors)))

    def body(values, factors):
        return jnp.sin(kernels.block.scaled_heads(2.0 * values, factors))

    found = jax.grad(loss, (0, 1))(values, factors)
    scaled = values * factors[..., None]
    np.testing.assert_allclose(found[0], jnp.cos(scaled) * factors[..., None], rtol=1e-5, atol=1e-6)
    wanted = jnp.sum(jnp.cos(scaled) * values, axis=-1).at[0, 3].set(0.0)
    np.testing.assert_allclose(found[1], wanted, rtol=1e-4, atol=1e-5)
    body = rematerialised(body, "dots", looped=False)
    residuals = saved_residuals(body, values, factors)
    kept = [aval.shape for aval, source in residuals if "argument" not in source]
    assert kept == [scaled.shape]


@pytest.mark.parametrize("looped", [False, True])
def test_rounded_weights_are_kept_where_blocks_are_unrolled(looped):
    weight, x = jnp.ones((8, 16)), jnp.ones((4, 8), jnp.bfloat16)

    def body(weight, x):
        rounded = rounded_once(weight, ("embed", "mlp"), "bfloat16")
        assert rounded.dtype == weight.dtype
        return jnp.sin(x @ rounded.astype(x.dtype))

    residuals = saved_residuals(rematerialised(body, "dots", looped=looped), weight, x)
    kept = [aval.dtype for aval, _ in residuals if aval.shape == weight.shape]
    assert (jnp.bfloat16 in kept) is not looped
    gradient = jax.grad(lambda weight: jnp.sum(body(weight, x).astype(jnp.float32)))(weight)
    assert gradient.dtype == jnp.float32


def test_what_a_backend_may_use():
    assert all(uses("auto", kind) for kind in ("products", "norms", "mixer"))
    assert uses("norms", "products") and not uses("norms", "mixer") and not uses("portable", "products")


@pytest.mark.parametrize(
    "change", [dict(binding="hadamard", erase=False), dict(value_conv=2), dict(head_norm=False)]
)
def test_other_mixers_are_their_own(interpreted, change):
    config = HoloConfig(hidden_size=128, hd_dim=64, precision=FULL, **change)
    mixer = nnx.eval_shape(lambda: fused_memory.MemoryMixer(config, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2, 64, 128), jnp.float32)
    context = fused_memory.Context(jnp.arange(64, dtype=jnp.uint32)[None])
    assert next(iter(change)) in fused_memory.unsupported(mixer, x, context)
