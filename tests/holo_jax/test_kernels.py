"""Dispatch by capability, the cheap sin and cos, the mapping to the Hopper kernels (in their plain form)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax import kernels
from holo_jax.functional import MemoryState, accumulate
from holo_jax.kernels import BackendUnavailableError
from holo_jax.kernels.call import Call, total_writes
from holo_jax.kernels.hadamard import backend as triton
from holo_jax.kernels.hopper import backend as hopper
from holo_jax.kernels.outer import backend as triton_outer
from holo_jax.kernels.products.linear_cross_entropy import unsupported as loss_unsupported
from holo_jax.kernels.products.swiglu import unsupported as swiglu_unsupported

B, T, H, M, D = 2, 129, 2, 32, 64


def arguments(dtype=jnp.float32, time: int = T, packed: bool = False):
    keys = jax.random.split(jax.random.key(3), 9)
    write, read = (2 * jax.random.normal(k, (B, time, H, M)) for k in keys[:2])
    values = jax.random.normal(keys[2], (B, time, H, D), dtype)
    gates = jax.nn.sigmoid(jax.random.normal(keys[3], (B, time, H)))
    erase = gates * jax.nn.sigmoid(jax.random.normal(keys[4], (B, time, H)) - 2)
    state = segments = None
    if packed:
        segments = jnp.cumsum(jax.random.bernoulli(keys[5], 0.03, (B, time)), 1).astype(jnp.int32)
        parts = [jax.random.normal(k, (B, H, M, D)) for k in keys[5:9]]
        state = MemoryState(
            jax.lax.complex(*parts[:2]), 1e-3 * jax.lax.complex(*parts[2:]), jnp.ones((B, H), jnp.float32)
        )
    return write, read, values, gates, erase, segments, state


def hopper_present(monkeypatch, capability=(9, 0), version=hopper.VERSION):
    monkeypatch.setattr(hopper, "compute_capability", lambda: capability)
    monkeypatch.setattr(hopper, "installed_version", lambda *_: version)
    monkeypatch.setattr(hopper, "partitioned", lambda: False)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_sin_cos_are_within_their_stated_error(scale):
    phases = (scale * np.random.default_rng(0).normal(size=20_000)).astype(np.float32)
    phases[:3] = (0.0, np.pi, -np.pi)
    sine, cosine = jax.jit(kernels.sin_cos)(phases)
    assert np.abs(np.asarray(sine) - np.sin(phases.astype(np.float64))).max() < 7e-7
    assert np.abs(np.asarray(cosine) - np.cos(phases.astype(np.float64))).max() < 7e-7


def test_sin_cos_refuse_narrow_phases():
    with pytest.raises(TypeError, match="phases has dtype bfloat16"):
        kernels.sin_cos(jnp.zeros(3, jnp.bfloat16))


def test_features_have_unit_norm_and_the_gradient_of_cos_and_sin():
    phases = 5 * jax.random.normal(jax.random.key(0), (7, M))
    weights = jax.random.normal(jax.random.key(1), (7, 2 * M))

    def plain(p):
        return jnp.concatenate([jnp.cos(p), jnp.sin(p)], axis=-1) / np.sqrt(M)

    features = kernels.phasor_features(phases, jnp.float32)
    np.testing.assert_allclose(features, plain(phases), atol=2e-7)
    np.testing.assert_allclose(jnp.linalg.norm(features, axis=-1), 1.0, rtol=1e-6)
    found = jax.grad(lambda p: jnp.sum(kernels.phasor_features(p, jnp.float32) * weights))(phases)
    np.testing.assert_allclose(found, jax.grad(lambda p: jnp.sum(plain(p) * weights))(phases), atol=1e-6)


@pytest.mark.cpu
def test_auto_is_portable_on_a_cpu_and_equals_the_functional_form():
    write, read, values, gates, erase, segments, state = arguments(packed=True)
    options = dict(binding="outer", segment_ids=segments, initial_state=state)
    found, wanted = (
        jax.jit(lambda *inputs, run=run: run(*inputs, **options))(write, read, values, gates, erase)
        for run in (kernels.accumulate, accumulate)
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert [b.name for b in kernels.available()] == ["portable", *kernels.BACKENDS[3:]]
    assert kernels.available()[0].usable and not any(b.usable for b in kernels.available()[1:])


@pytest.mark.cpu
def test_a_named_kernel_that_cannot_run_says_why():
    write, read, values, gates, erase, *_ = arguments(jnp.bfloat16)
    with pytest.raises(BackendUnavailableError, match=r"'hopper'.*(not installed|compute capability)"):
        kernels.accumulate(write, read, values, gates, erase, binding="outer", backend="hopper")
    with pytest.raises(
        ValueError, match="memory_backend is 'cuda'; it must be one of auto, ensemble, portable"
    ):
        kernels.accumulate(write, read, values, gates, erase, binding="outer", backend="cuda")


def test_wrong_arguments_are_refused_as_by_the_portable_form(monkeypatch):
    hopper_present(monkeypatch)
    write, read, values, gates, erase, *_ = arguments()
    with pytest.raises(ValueError, match="binding is 'tensor'"):
        kernels.accumulate(write, read, values, gates, erase, binding="tensor", backend="hopper")
    with pytest.raises(ValueError, match="erase is given with binding 'hadamard'"):
        kernels.accumulate(values, values, values, gates, erase, binding="hadamard", backend="hopper")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(), None),
        (dict(capability=(8, 9)), "Hopper"),
        (dict(capability=None), "Hopper"),
        (dict(version=None), "not installed"),
        (dict(version="0.2.0"), "is 0.2.0; it must be 0.1.0"),
        (dict(dtype=jnp.float32), "values has dtype float32"),
        (dict(method="recurrent"), "method is 'recurrent'"),
        (dict(chunk_size=128), "chunk_size is 128"),
        (dict(m=16), "m is 16"),
        (dict(binding="hadamard"), "binding is 'hadamard'"),
        (dict(partitioned=True), "several devices"),
    ],
)
def test_hopper_is_chosen_only_for_what_it_supports(monkeypatch, change, reason):
    hopper_present(monkeypatch, change.get("capability", (9, 0)), change.get("version", hopper.VERSION))
    monkeypatch.setattr(hopper, "partitioned", lambda: change.get("partitioned", False))
    write, read, values, gates, erase, *_ = arguments(change.get("dtype", jnp.bfloat16))
    m = change.get("m", M)
    write, read = write[..., :m], read[..., :m]
    call = Call(write, read, values, gates, erase, change.get("binding", "outer"))
    call = call._replace(method=change.get("method", "chunked"), chunk_size=change.get("chunk_size"))
    if call.binding == "hadamard":
        wide = jnp.concatenate([write, write], axis=-1)
        call = call._replace(write_phases=wide, read_phases=wide, erase=None)
    if reason is None:
        assert kernels.choose(call) == kernels.choose(call, "hopper") == "hopper"
        return
    assert kernels.choose(call) != "hopper"
    with pytest.raises(BackendUnavailableError, match=reason):
        kernels.choose(call, "hopper")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_what_ampere_and_ada_run(monkeypatch, capability):
    """Both memories by our kernels; with erase, denoiser and loss as products of XLA."""
    hopper_present(monkeypatch, capability)
    monkeypatch.setattr(kernels.capability, "compute_capability", lambda: capability)
    for module in (triton, triton_outer):
        monkeypatch.setattr(module, "partitioned", lambda: False)
    phases, _, values, gates, erase, *_ = arguments(jnp.bfloat16)
    assert kernels.choose(Call(phases, phases, values, gates, erase, "outer")) == "portable"
    assert kernels.choose(Call(phases, phases, values, gates, None, "outer")) == "triton_outer"
    wide = jnp.zeros(values.shape, jnp.float32)
    assert kernels.choose(Call(wide, wide, values, gates, None, "hadamard")) == "triton"
    x, matrix = jnp.zeros((2, 64, 256), jnp.bfloat16), jnp.zeros((256, 512))
    assert "Hopper" in swiglu_unsupported(x, matrix)
    assert "Hopper" in loss_unsupported(x, matrix, "float32")


def test_less_than_a_chunk_stays_portable_unless_asked_for(monkeypatch):
    hopper_present(monkeypatch)
    write, read, values, gates, erase, *_ = arguments(jnp.bfloat16, time=63)
    call = Call(write, read, values, gates, erase, "outer")
    assert kernels.choose(call) == "portable"
    assert kernels.choose(call, "hopper") == "hopper"


@pytest.mark.devices(8)
def test_several_devices_are_noticed():
    assert jax.device_count() > 1 and kernels.capability.partitioned()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    seen = []

    def inside(x):
        seen.append(kernels.capability.partitioned())
        return x

    spec = jax.sharding.PartitionSpec("data")
    jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.zeros(8))
    assert seen == [False]


def test_writes_of_the_last_segment():
    write, read, values, gates, erase, segments, state = arguments(packed=True)
    options = dict(segment_ids=segments, initial_state=state)
    found = total_writes(Call(write, read, values, gates, erase, "outer", **options))
    whole = jax.jit(lambda *inputs: accumulate(*inputs, binding="outer", **options)[1].writes)
    np.testing.assert_allclose(found, whole(write, read, values, gates, erase), rtol=1e-6)


def test_raised_erase_gates_keep_their_gradient():
    erase, gates = jnp.asarray([0.0, 1e-7, 0.3]), jnp.asarray([0.5, 0.5, 0.5])
    strength, gradient = jax.vjp(lambda e: hopper.raised(e, gates), erase)
    np.testing.assert_allclose(strength, [2**-17, 2**-17, 0.3], rtol=1e-6)
    np.testing.assert_array_equal(gradient(jnp.ones(3))[0], np.ones(3))


def test_the_kernel_without_erase_is_given_no_decay(monkeypatch):
    """A cumulative sum of zeros is a constant that XLA folds while compiling, for many seconds."""
    pytest.importorskip("jla")
    from jla.ops.mosaic_gpu import scalar_gate

    monkeypatch.setattr(scalar_gate, "is_hopper", lambda: True)
    shape = (2, 130, 2, 64)
    values = jnp.ones(shape, jnp.bfloat16)
    phases = jnp.ones((*shape[:3], 32))

    def total(values, gates):
        return jnp.sum(hopper.accumulate(Call(phases, phases, values, gates, None, "outer"))[0])

    program = str(jax.make_jaxpr(jax.grad(total))(values, jnp.ones(shape[:3])))
    assert "wgmma" in program and "cumsum" not in program
    monkeypatch.setattr(scalar_gate, "is_hopper", lambda: False)
    with pytest.raises(ValueError, match=r"values cannot be summed .*Hopper"):
        total(values, None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rule", ["sum", "deltanet", "gdn2"])
def test_mapping_to_the_hopper_kernels_is_exact(rule, packed):
    """The package's plain form under our mapping equals the definition, in values and gradients (float32)."""
    pytest.importorskip("jla")
    write, read, values, gates, erase, segments, state = arguments(packed=packed)
    erase = None if rule == "sum" else erase
    weights = jax.random.normal(jax.random.key(9), values.shape)

    def objective(function):
        def run(write, read, values, gates, erase, state):
            outputs, after = function(write, read, values, gates, erase, state)
            total = jnp.sum(outputs * weights) + jnp.sum((after.memory + after.residue).real)
            return total + jnp.sum(after.writes), outputs

        numbers = tuple(i for i, x in enumerate((write, read, values, gates, erase)) if x is not None)
        return jax.jit(jax.value_and_grad(run, argnums=numbers, has_aux=True))

    def mapped(*a):
        call = Call(*a[:5], "outer", segment_ids=segments, initial_state=a[5])
        return hopper.accumulate(call, rule="deltanet" if rule == "sum" else rule, implementation="chunked")

    def defined(*a):
        return accumulate(
            *a[:5], binding="outer", method="recurrent", segment_ids=segments, initial_state=a[5]
        )

    inputs = (write, read, values, gates, erase, state)
    (_, outputs), gradients = objective(mapped)(*inputs)
    (_, wanted), wanted_gradients = objective(defined)(*inputs)
    for found, right in zip([outputs, *gradients], [wanted, *wanted_gradients], strict=True):
        scale = float(jnp.linalg.norm(right))
        assert float(jnp.linalg.norm(found - right)) < 3e-5 * scale
