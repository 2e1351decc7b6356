"""The kernels of the elementwise memory, in Pallas' interpreter, against the definition in float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax import kernels
from holo_jax.functional import MemoryState, accumulate, phases_at
from holo_jax.functional.segments import borders
from holo_jax.kernels import BackendUnavailableError, Positions
from holo_jax.kernels.call import Call
from holo_jax.kernels.hadamard import backend as triton
from holo_jax.kernels.hadamard import positions as triton_positions
from holo_jax.kernels.hadamard.program import Tiling

B, H, D = 2, 2, 32
SMALL = Tiling(rows=4, steps=2, channels=32)
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def draw(time, *, packed, gated, shared, rows=B, dtype="float64"):
    """Arguments by name, and weights of the outputs."""
    rng = np.random.default_rng(time)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32).astype(np.float64)

    inputs = {"write": 3 * normal(rows, time, H, D), "values": normal(B, time, H, D)}
    if not shared:
        inputs["read"] = 3 * normal(rows, time, H, D)
    if gated:
        inputs["gates"] = rng.uniform(size=(B, time, H)).astype(np.float32).astype(np.float64)
    if packed:
        inputs["state"] = [normal(B, H, D) for _ in range(4)]
    starts = rng.uniform(size=(B, time)) < 0.08
    segments = jnp.asarray(np.cumsum(starts, 1), jnp.int32) if packed else None
    weights = (normal(B, time, H, D), normal(B, H, D), normal(B, H, D))
    return inputs, segments, weights


def objective(function, segments, weights, inputs, factors=None):
    state = None
    if "state" in inputs:
        a, b, c, d = inputs["state"]
        memory, residue = jax.lax.complex(a, b), 1e-3 * jax.lax.complex(c, d)
        state = MemoryState(memory, residue, jnp.ones((B, H), a.dtype))
    write = inputs["write"]
    outputs, after = function(
        Call(
            write,
            inputs.get("read", write),
            inputs["values"],
            inputs.get("gates"),
            None,
            "hadamard",
            segment_ids=segments,
            initial_state=state,
        )
    )
    if factors is not None:
        outputs = outputs * factors[..., None, None].astype(outputs.dtype)
    memory = after.memory + after.residue
    total = sum(jnp.sum(x * w) for x, w in zip((outputs, memory.real, memory.imag), weights, strict=True))
    return total + jnp.sum(after.writes), (outputs, memory.real, memory.imag)


def definition(call):
    return accumulate(**{**call._asdict(), "method": "recurrent"})


def compare(function, case, limit, differentiated=None, factors=None):
    """Values and gradients of ``function`` in float32 against the definition, times factors, in float64."""
    inputs, segments, weights = case
    names = differentiated or tuple(inputs)

    def run(function, inputs, weights):
        def of(chosen):
            own = factors if function is definition else None
            return objective(function, segments, weights, {**inputs, **chosen}, own)

        chosen = {name: inputs[name] for name in names}
        return jax.value_and_grad(of, has_aux=True)(chosen)

    with jax.enable_x64(True):
        (_, wanted), slopes = jax.jit(lambda i, w: run(definition, i, w), compiler_options=FAST_COMPILE)(
            inputs, weights
        )
        wanted, slopes = jax.tree.map(np.asarray, (wanted, slopes))
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (inputs, weights))
    compiled = jax.jit(lambda i, w: run(function, i, w), compiler_options=FAST_COMPILE)
    (_, found), gradients = compiled(*narrow)
    wanted, found = jax.tree.leaves((wanted, slopes)), jax.tree.leaves((found, gradients))
    for right, mine in zip(wanted, found, strict=True):
        assert np.linalg.norm(mine - right) < limit * np.linalg.norm(right)


def interpreted(pieces=1, **options):
    options |= dict(plain=SMALL, turning=SMALL, pieces=pieces, interpret=True)
    return lambda call: triton.accumulate(call, **options)


@pytest.mark.parametrize(
    ("time", "pieces", "options"),
    [
        (63, 1, dict(packed=False, gated=True, shared=False)),
        (93, 3, dict(packed=True, gated=True, shared=False)),
        (93, 2, dict(packed=True, gated=False, shared=True)),
        (45, 2, dict(packed=False, gated=True, shared=False, rows=1)),
    ],
    ids=["plain", "packed-from-a-state-in-pieces", "one-phase", "phases-shared-by-rows"],
)
def test_kernels_are_the_definition_in_values_and_gradients(time, pieces, options):
    compare(interpreted(pieces), draw(time, **options), 2e-6)


def test_phases_without_gradient():
    """As in positional addressing: the backward pass sums once, and reads one array of phases."""
    case = draw(93, packed=True, gated=True, shared=True, rows=1)
    compare(interpreted(2), case, 2e-6, differentiated=("values", "gates", "state"))


@pytest.mark.parametrize("rows", [1, B])
def test_outputs_are_multiplied_by_factors(rows):
    """In pieces of packed rows from a state, with and without gradients of phases."""
    factors = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1.0, size=(rows, 93)), jnp.float32)
    case = draw(93, packed=True, gated=True, shared=rows == 1, rows=rows)
    names = ("values", "gates", "state") if rows == 1 else None
    compare(interpreted(2, factors=factors), case, 2e-6, names, factors)


def positioned(time, *, packed, gated):
    """``draw`` with the phases of positions, which count on from a state's in the first segment of a row."""
    case = draw(time, packed=packed, gated=gated, shared=True)
    inputs, segments, weights = case
    turns = jnp.asarray(np.random.default_rng(1).integers(2**32, size=(H, D)), jnp.uint32)
    at = jnp.arange(time, dtype=jnp.uint32)[None]
    inside = at
    if packed:
        begins = jax.lax.cummax(jnp.where(borders(segments), at.astype(jnp.int32), 0), axis=1)
        first = jnp.asarray([[3_000_000_000], [5]], jnp.uint32)
        inside = jnp.where(begins == 0, first + at, at - begins.astype(jnp.uint32))
    # Exact in float64: whole units of a turn.
    units = (inside[..., None, None] * turns[None, None]).view(jnp.int32)
    inputs["write"] = np.asarray(units, np.float64) * (2 * np.pi / 2**32)
    assert np.allclose(inputs["write"], phases_at(turns, inside), atol=1e-6)
    return (inputs, segments, weights), Positions(turns, inside)


@pytest.mark.parametrize(
    ("time", "pieces", "options"),
    [
        (63, 1, dict(packed=False, gated=False)),
        (93, 3, dict(packed=True, gated=True)),
        (96, 2, dict(packed=False, gated=True)),
        (88, 2, dict(packed=True, gated=False)),
    ],
    ids=["plain", "packed-from-a-state-in-pieces", "whole-tiles", "packed-without-gates"],
)
def test_positions_need_no_phases(time, pieces, options):
    case, positions = positioned(time, **options)
    names = tuple(name for name in case[0] if name != "write")
    rows = B if options["packed"] else 1
    factors = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1.0, size=(rows, time)), jnp.float32)

    def run(call):
        kept = dict(factors=factors, tiling=SMALL, pieces=pieces, interpret=True)
        return triton_positions.accumulate(call, positions, **kept)

    compare(run, case, 2e-6, names, factors)


@pytest.mark.parametrize("form", ["plain", "turned", "positions"])
def test_kernels_lower_for_a_gpu(form):
    """All that happens before the device's own compiler: what the interpreter accepts, Triton may not."""
    shapes = (B, 321, H, 64)
    phases, values = jax.ShapeDtypeStruct(shapes, jnp.float32), jax.ShapeDtypeStruct(shapes, jnp.bfloat16)
    gates, segments = jax.ShapeDtypeStruct(shapes[:3], jnp.float32), jnp.zeros(shapes[:2], jnp.int32)

    def step(phases, values, gates):
        def run(values, gates, moved):
            write = phases + moved if form == "turned" else phases
            asked = Call(write, write, values, gates, None, "hadamard", segment_ids=segments)
            kept = dict(factors=jnp.ones((1, 321)), pieces=2)
            if form == "positions":
                at = Positions(jnp.ones((H, 64), jnp.uint32), jnp.arange(321, dtype=jnp.uint32)[None])
                return triton_positions.accumulate(asked, at, **kept)[0]
            return triton.accumulate(asked, **kept)[0]

        outputs, pull = jax.vjp(run, values, gates, phases)
        return pull(outputs)

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of this backend of Pallas
        lowered = jax.jit(step).trace(phases, values, gates).lower(lowering_platforms=("cuda",))
    # Totals of pieces, then the pass itself; forward and backward.
    assert lowered.as_text().count("xla.gpu.triton") == 4


def call(dtype=jnp.bfloat16, time=128, d=D, binding="hadamard", **options):
    phases, values = jnp.zeros((B, time, H, d)), jnp.zeros((B, time, H, d), dtype)
    return Call(phases, phases, values, None, None, binding, **options)


@pytest.mark.parametrize(
    ("change", "capability", "reason"),
    [
        (dict(), (8, 0), None),
        (dict(dtype=jnp.float32), (8, 9), None),
        (dict(), (7, 5), "compute capability 8.0"),
        (dict(), None, "compute capability 8.0"),
        (dict(binding="outer"), (9, 0), "binding is 'outer'"),
        (dict(method="recurrent"), (9, 0), "method is 'recurrent'"),
        (dict(chunk_size=64), (9, 0), "chunk_size is 64"),
        (dict(d=48), (9, 0), "d is 48; it must be a multiple of 32"),
    ],
)
def test_triton_is_chosen_only_for_what_it_supports(monkeypatch, change, capability, reason):
    monkeypatch.setattr(kernels.capability, "compute_capability", lambda: capability)
    asked = call(**change)
    if reason is None:
        # On a mesh as the compiler would divide it, no rule replaced: there of one device only.
        for devices, chosen in ((1, "triton"), (2, "portable"))[: jax.device_count()]:
            axis = jax.sharding.AxisType.Auto
            with jax.set_mesh(jax.make_mesh((devices,), ("data",), axis_types=(axis,))):
                assert kernels.choose(asked) == chosen
    monkeypatch.setattr(triton, "partitioned", lambda: False)
    if reason is None:
        assert kernels.choose(asked, "triton") == kernels.choose(asked) == "triton"
        return
    assert kernels.choose(asked) != "triton"
    with pytest.raises(BackendUnavailableError, match=reason):
        kernels.choose(asked, "triton")


def test_a_row_is_split_where_rows_and_channels_are_few():
    def pieces(rows, time, channels):
        values = jax.ShapeDtypeStruct((rows, time, 1, channels), jnp.bfloat16)
        return triton.plan(Call(values, values, values, None, None, "hadamard"), Tiling(), None, True).pieces

    assert pieces(8, 4096, 2048) == 1 and pieces(4, 4096, 2048) == 2
    assert pieces(2, 16_384, 2048) == 4 and pieces(1, 100, 64) == 1
