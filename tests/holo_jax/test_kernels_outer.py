"""The kernels of the outer memory without erase, in the interpreter, against the definition in float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax import kernels
from holo_jax.functional import MemoryState, accumulate
from holo_jax.kernels import BackendUnavailableError
from holo_jax.kernels.block.convolved_sum import convolved_sum
from holo_jax.kernels.call import Call
from holo_jax.kernels.hopper import backend as hopper
from holo_jax.kernels.outer import backend as triton_outer
from holo_jax.kernels.outer.program import Shape, Tiling

B, H, M, D = 2, 2, 16, 32
SMALL = Tiling(32, *(Shape(16),) * 4)
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# 16-bit operands round by 2^-9 and 2^-12.
LIMITS = {"bfloat16": 5e-3, "float16": 6e-4}


def rounded(x, dtype):
    return np.asarray(jnp.asarray(x, jnp.float32).astype(dtype).astype(jnp.float32), np.float64)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32).astype(np.float64)


def draw(time, *, packed, gated, dtype, rows=B):
    """Arguments by name, segments, and weights of the results."""
    rng = np.random.default_rng(time)
    inputs = {name: 3 * normal(rng, rows, time, H, M) for name in ("write", "read")}
    inputs["values"] = rounded(normal(rng, B, time, H, D), dtype)
    if gated:
        inputs["gates"] = rng.uniform(size=(B, time, H)).astype(np.float32).astype(np.float64)
    if packed:
        inputs["state"] = [normal(rng, B, H, M, D) for _ in range(4)]
    starts = rng.uniform(size=(B, time)) < 0.06
    segments = jnp.asarray(np.cumsum(starts, 1), jnp.int32) if packed else None
    weights = (rounded(normal(rng, B, time, H, D), dtype), *(normal(rng, B, H, M, D) for _ in range(2)))
    return inputs, segments, weights


def objective(function, segments, weights, inputs, dtype):
    state = None
    if "state" in inputs:
        a, b, c, d = inputs["state"]
        memory, residue = jax.lax.complex(a, b), 1e-3 * jax.lax.complex(c, d)
        state = MemoryState(memory, residue, jnp.ones((B, H), a.dtype))
    values, gates = inputs["values"].astype(dtype), inputs.get("gates")
    call = Call(inputs["write"], inputs["read"], values, gates, None, "outer")
    outputs, after = function(call._replace(segment_ids=segments, initial_state=state))
    memory = after.memory + after.residue
    results = outputs, memory.real, memory.imag
    total = sum(jnp.sum(x * w) for x, w in zip(results, weights, strict=True))
    return total + jnp.sum(after.writes), results


def close(function, wanted, inputs, limit):
    """Values and gradients of two objectives of a dictionary, in float32 and in float64."""

    def run(f, x):
        return jax.jit(jax.value_and_grad(f, has_aux=True), compiler_options=FAST_COMPILE)(x)

    with jax.enable_x64(True):
        (_, right), slopes = jax.tree.map(np.asarray, run(wanted, inputs))
    (_, found), gradients = run(function, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs))
    for x, y in zip(jax.tree.leaves((found, gradients)), jax.tree.leaves((right, slopes)), strict=True):
        assert np.linalg.norm(np.asarray(x, np.float64) - y) < limit * np.linalg.norm(y)


@pytest.mark.parametrize(
    ("time", "options"),
    [
        (45, dict(packed=False, gated=True, dtype="bfloat16")),
        (95, dict(packed=True, gated=True, dtype="bfloat16")),
        (96, dict(packed=True, gated=False, dtype="float16")),
        (29, dict(packed=False, gated=True, dtype="float16", rows=1)),
    ],
    ids=["odd", "packed-from-a-state", "whole-blocks-without-gates", "phases-shared-by-rows"],
)
def test_kernels_are_the_definition_in_values_and_gradients(time, options):
    inputs, segments, weights = draw(time, **options)
    narrow = tuple(jnp.asarray(w, jnp.float32) for w in weights)

    def own(x):
        run = lambda call: triton_outer.accumulate(call, tiling=SMALL, interpret=True)  # noqa: E731
        return objective(run, segments, narrow, x, options["dtype"])

    def wanted(x):
        run = lambda call: accumulate(**{**call._asdict(), "method": "recurrent"})  # noqa: E731
        return objective(run, segments, weights, x, jnp.float64)

    close(own, wanted, inputs, LIMITS[options["dtype"]])


def test_nothing_crosses_a_border():
    """A gradient of one segment by the inputs of others is exactly zero, and so is one by later tokens."""
    inputs, _, _ = draw(96, packed=False, gated=True, dtype="bfloat16")
    segments = jnp.asarray(np.repeat([[0, 1, 2]] * B, [20, 50, 26], axis=1), jnp.int32)
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}

    def middle(x):
        call = Call(x["write"], x["read"], x["values"].astype(jnp.bfloat16), x["gates"], None, "outer")
        outputs, _ = triton_outer.accumulate(
            call._replace(segment_ids=segments), tiling=SMALL, interpret=True
        )
        return jnp.sum(outputs[:, 20:60] ** 2)

    for gradient in jax.jit(jax.grad(middle), compiler_options=FAST_COMPILE)(arrays).values():
        assert not np.any(gradient[:, :20]) and not np.any(gradient[:, 60:]) and np.any(gradient[:, 20:60])


@pytest.mark.parametrize("packed", [False, True])
def test_a_sum_from_raw_phases(packed):
    """Convolutions of raw phases, gates and the memory together, with the gradients of all."""
    time, taps = 45, 3
    rng = np.random.default_rng(3)
    shape = {"raw": (B, time, H * M + H + 3), "taps": (2, taps, H * M), "bias": (1, H)}
    inputs = {name: normal(rng, *size) for name, size in shape.items()}
    inputs["values"] = rounded(normal(rng, B, time, H, D), "bfloat16")
    starts = rng.uniform(size=(B, time)) < (0.1 if packed else 0.0)
    starts[:, 0] = True
    at = np.broadcast_to(np.arange(time), starts.shape)
    inside = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    segments = jnp.asarray(np.cumsum(starts, 1), jnp.int32)
    weights = rounded(normal(rng, B, time, H, D), "bfloat16"), normal(rng, B, H, time)

    def results(x, found):
        return sum(jnp.sum(y * w.astype(np.float32)) for y, w in zip(found, weights, strict=True)), found

    def wanted(x):
        raw, gates = x["raw"][..., : H * M], x["raw"][..., H * M : H * M + H]
        past = jnp.pad(raw, ((0, 0), (taps - 1, 0), (0, 0)))
        seen = [
            jnp.where(inside[..., None] >= k, past[:, taps - 1 - k : taps - 1 - k + time], 0.0)
            for k in range(taps)
        ]
        phases = [sum(own[taps - 1 - k][None, None] * seen[k] for k in range(taps)) for own in x["taps"]]
        opened = jax.nn.sigmoid(gates + x["bias"][None])
        write, read = (p.reshape(B, time, H, M) for p in phases)
        options = dict(binding="outer", method="recurrent", segment_ids=segments)
        outputs, _ = accumulate(write, read, x["values"], opened, **options)
        return results(x, (outputs, jnp.swapaxes(opened, 1, 2)))

    def own(x):
        values = x["values"].astype(jnp.bfloat16)
        borders = (jnp.asarray(inside, jnp.int32), segments) if packed else (None, None)
        found = convolved_sum(x["raw"], x["taps"], x["bias"], values, *borders, tiling=SMALL, interpret=True)
        return results(x, found)

    close(own, wanted, inputs, 6e-3)


def lowered(step, *shapes):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of this backend of Pallas
        return jax.jit(step).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_kernels_lower_for_a_gpu():
    """All that happens before the device's own compiler: what the interpreter accepts, Triton may not."""
    shape = (B, 321, H)
    phases, values, gates = (
        jax.ShapeDtypeStruct((*shape, M), jnp.float32),
        jax.ShapeDtypeStruct((*shape, D), jnp.bfloat16),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    segments = jnp.zeros(shape[:2], jnp.int32)

    def step(write, read, values, gates):
        def run(*inputs):
            return triton_outer.accumulate(Call(*inputs, None, "outer", segment_ids=segments))[0]

        outputs, pull = jax.vjp(run, write, read, values, gates)
        return pull(outputs)

    def convolved(raw, taps, bias, values):
        run = lambda *x: convolved_sum(*x, None, None, interpret=False)  # noqa: E731
        outputs, pull = jax.vjp(run, raw, taps, bias, values)
        return pull(outputs)

    # Totals, their sums and the pass itself; backwards gradients of reads and of writes, sums between them.
    assert lowered(step, phases, phases, values, gates).count("xla.gpu.triton") == 6
    raw, taps, bias = (
        jax.ShapeDtypeStruct(size, jnp.float32) for size in ((B, 321, H * M + H), (2, 4, H * M), (1, H))
    )
    assert lowered(convolved, raw, taps, bias, values).count("xla.gpu.triton") == 8


def call(dtype=jnp.bfloat16, time=128, m=32, d=64, binding="outer", **options):
    phases, values = jnp.zeros((B, time, H, m)), jnp.zeros((B, time, H, d), dtype)
    return Call(phases, phases, values, None, options.pop("erase", None), binding, **options)


@pytest.mark.parametrize(
    ("change", "capability", "reason"),
    [
        (dict(), (8, 0), None),
        (dict(), (8, 9), None),
        (dict(dtype=jnp.float16), (9, 0), None),
        (dict(), (7, 5), "compute capability 8.0"),
        (dict(), None, "compute capability 8.0"),
        (dict(dtype=jnp.float32), (9, 0), "values has dtype float32"),
        (dict(binding="hadamard", m=64), (9, 0), "binding is 'hadamard'"),
        (dict(erase=jnp.zeros((B, 128, H))), (9, 0), "erase is given"),
        (dict(method="recurrent"), (9, 0), "method is 'recurrent'"),
        (dict(chunk_size=64), (9, 0), "chunk_size is 64"),
        (dict(m=48), (9, 0), "m is 48; it must be one of 16, 32, 64, 128"),
        (dict(m=128, d=128), (9, 0), "m times d must be at most 8192"),
    ],
)
def test_chosen_only_for_what_it_supports(monkeypatch, change, capability, reason):
    monkeypatch.setattr(kernels.capability, "compute_capability", lambda: capability)
    monkeypatch.setattr(triton_outer, "partitioned", lambda: False)
    asked = call(**change)
    if reason is None:
        assert kernels.choose(asked, "triton_outer") == kernels.choose(asked) == "triton_outer"
        monkeypatch.setattr(triton_outer, "partitioned", lambda: True)
        assert kernels.choose(asked) == "portable"
        return
    assert kernels.choose(asked) != "triton_outer"
    with pytest.raises(BackendUnavailableError, match=reason):
        kernels.choose(asked, "triton_outer")


def test_which_of_two_kernels_runs(monkeypatch):
    """Our own the sums of heads that were timed; those of jax-linear-attention the others, and parts."""
    for module in (hopper, kernels.capability):
        monkeypatch.setattr(module, "compute_capability", lambda: (9, 0))
    for module in (hopper, triton_outer):
        monkeypatch.setattr(module, "partitioned", lambda: False)
    monkeypatch.setattr(hopper, "installed_version", lambda *_: hopper.VERSION)
    assert kernels.choose(call()) == "triton_outer" and kernels.choose(call(), "hopper") == "hopper"
    assert kernels.choose(call(m=64)) == kernels.choose(call(d=128)) == "hopper"
    assert kernels.choose(call(m=64), "triton_outer") == "triton_outer"
    assert kernels.choose(call(erase=jnp.zeros((B, 128, H)))) == "hopper"


def test_blocks_are_larger_where_they_still_fill_a_device():
    def block(*shape, **options):
        return triton_outer.tiling_of(jax.ShapeDtypeStruct((*shape, 64), jnp.bfloat16), 32, **options).block

    assert block(8, 4096, 16) == 1024 and block(16, 2048, 14) == 1024 and block(8, 2048, 16) == 512
    assert block(16, 2048, 14, largest=512) == 512 and block(1, 4096, 16) == 256
