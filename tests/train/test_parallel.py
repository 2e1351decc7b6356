"""Every axis of the mesh: equal to one device over twenty steps, and sending no more than it must."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from holo_jax import parallel
from holo_jax.exchange import Exchange
from holo_jax.model import init_state
from tests.holo_jax.kernel_package import install
from tests.train.common import micro_config
from train.collectives import Collective, collectives
from train.errors import MeshError
from train.loop import build
from train.model_functions import model_functions
from train.run_config import RunConfig
from train.sharding import MESH_AXES, batch_sharding, check_model, make_mesh, put_batch, replicated
from train.step import StepFunctions, TrainState

STEPS, TIME, ROWS = 20, 20, 4
pytestmark = pytest.mark.devices(8)
MODELS: dict[str, dict[str, Any]] = {
    "holo": dict(model__preset="holo", model__hd_dim=32, model__remat="full"),
    "sum": dict(model__preset="holo", model__hd_dim=32, model__erase=False, model__value_conv=3),
    "dual": dict(model__preset="dual", model__hd_dim=32, model__tie_embeddings=True),
    "hybrid": dict(
        model__preset="holo",
        model__head_dim=4,
        model__anchor_every=2,
        model__num_hidden_layers=2,
        model__key_conv=3,
    ),
    "ssm": dict(model__preset="ssm", model__hd_dim=32),
    "unrolled": dict(
        model__preset="holo",
        model__hd_dim=32,
        model__remat="dots",
        model__num_hidden_layers=2,
        model__scan_unroll=2,
    ),
    "unrolled and tied": dict(
        model__preset="holo",
        # With heads of four one rounding of the parameters moves a norm by 1.6e-5 on one device.
        model__head_dim=8,
        model__anchor_every=2,
        model__num_hidden_layers=4,
        model__scan_unroll=2,
        model__tie_embeddings=True,
    ),
}


def config_of(model: str, sizes: tuple[int, ...], **fields: Any) -> RunConfig:
    mesh = {f"mesh__{axis}": size for axis, size in zip(MESH_AXES, sizes, strict=True)}
    fields = dict(global_batch_size=ROWS, num_steps=STEPS, mesh__devices=int(np.prod(sizes))) | fields
    # Sizes of their own for width, heads and time tell in a program what an array is.
    return micro_config(**{**MODELS[model], "model__hidden_size": 24, **mesh, **fields})


def rows(step: int) -> dict[str, np.ndarray]:
    """A row without borders, and rows with some at, before and after the borders of the parts of 5 or 10."""
    generator = np.random.default_rng(step)
    segments = np.ones((ROWS, TIME), np.int32)
    for row, cuts in enumerate([(), (5, 6, 14), (10, 19), (4, 15)]):
        for number, cut in enumerate(cuts):
            segments[row, cut:] = number + 2
    segments[3, 18:] = 0
    return {"tokens": generator.integers(64, size=(ROWS, TIME), dtype=np.int32), "segment_ids": segments}


@functools.cache
def compiled(
    model: str, sizes: tuple[int, ...], time: int = TIME, **fields: Any
) -> tuple[StepFunctions, Any]:
    """The step functions and the compiled train step."""
    config = config_of(model, sizes, context_length=time, **fields)
    mesh = make_mesh(config.mesh)
    _, steps = build(config.model, config.optimizer, config.num_steps, mesh, config.mesh.exchange)
    batch = {name: jax.ShapeDtypeStruct((1, ROWS, time), np.int32) for name in ("tokens", "segment_ids")}
    return steps, steps.train.lower(steps.shapes, batch).compile()


def begin(steps: StepFunctions, mesh: Mesh) -> TrainState:
    key = np.asarray(jax.random.key_data(jax.random.key(0, impl="threefry2x32")))
    return jax.device_get(steps.init(jax.device_put(key, replicated(mesh))))


@functools.cache
def begun(model: str) -> TrainState:
    """As one device begins; that a mesh begins so too has a test of its own."""
    config = config_of(model, (1, 1, 1, 1))
    mesh = make_mesh(config.mesh)
    return begin(build(config.model, config.optimizer, config.num_steps, mesh)[1], mesh)


@functools.cache
def curve(
    model: str,
    sizes: tuple[int, ...],
    transport: str = "collectives",
    kept: bool = False,
    in_order: bool = False,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Loss and gradient norm of every step, and the optimizer's moments (the gradients) after the first."""
    fields = dict(mesh__transport=transport, mesh__reshard_after_forward=not kept, mesh__in_order=in_order)
    mesh = make_mesh(config_of(model, sizes).mesh)
    steps, train = compiled(model, sizes, **fields)
    state = jax.device_put(begun(model), steps.shardings)
    values, moments = [], []
    for step in range(STEPS):
        state, metrics = train(state, put_batch(rows(step), 1, batch_sharding(mesh)))
        values.append((float(metrics.loss), float(metrics.grad_norm)))
        if step == 0:
            moments = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state.opt_state))]
    return np.array(values), moments


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("holo", (4, 1, 1, 1)),
        ("holo", (1, 4, 1, 1)),
        ("holo", (2, 1, 2, 2)),
        *(pytest.param(model, (1, 2, 2, 2), marks=pytest.mark.slow) for model in MODELS),
    ],
)
def test_a_state_begins_with_the_same_bits_on_every_mesh(model: str, sizes: tuple[int, ...]) -> None:
    config = config_of(model, sizes)
    mesh = make_mesh(config.mesh)
    found = begin(build(config.model, config.optimizer, config.num_steps, mesh)[1], mesh)
    jax.tree.map(np.testing.assert_array_equal, found, begun(model))


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("holo", (4, 1, 1, 1)),
        ("holo", (1, 4, 1, 1)),
        ("holo", (1, 1, 4, 1)),
        ("holo", (1, 1, 1, 4)),
        ("holo", (2, 1, 2, 2)),
        pytest.param("sum", (1, 2, 4, 1), marks=pytest.mark.slow),
        pytest.param("dual", (1, 2, 2, 2), marks=pytest.mark.slow),
        pytest.param("hybrid", (1, 1, 4, 2), marks=pytest.mark.slow),
        ("ssm", (1, 1, 4, 2)),
    ],
)
def test_twenty_steps_equal_one_device(model: str, sizes: tuple[int, ...]) -> None:
    values, moments = curve(model, sizes)
    want_values, want_moments = curve(model, (1, 1, 1, 1))
    np.testing.assert_allclose(values, want_values, rtol=0, atol=1e-5)
    for got, want in zip(moments, want_moments, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "sizes", "transport", "kept"),
    [
        ("holo", (4, 1, 1, 1), "copies", False),
        ("holo", (1, 4, 1, 1), "copies", False),
        ("holo", (1, 4, 1, 1), "collectives", True),
        pytest.param("dual", (2, 2, 2, 1), "copies", True, marks=pytest.mark.slow),
        pytest.param("sum", (2, 2, 1, 2), "copies", True, marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_are_the_same_however_devices_send(
    model: str, sizes: tuple[int, ...], transport: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "_ALONE", 0)
    values, moments = curve(model, sizes, transport, kept)
    want_values, want_moments = curve(model, (1, 1, 1, 1))
    np.testing.assert_allclose(values, want_values, rtol=0, atol=1e-5)
    for got, want in zip(moments, want_moments, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "sizes", "transport"),
    [
        ("unrolled", (4, 1, 1, 1), "collectives"),
        pytest.param("unrolled", (4, 1, 1, 1), "copies", marks=pytest.mark.slow),
        pytest.param("unrolled and tied", (2, 1, 1, 1), "collectives", marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_of_unrolled_blocks_equal_one_device(
    model: str, sizes: tuple[int, ...], transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over ``data`` alone gradients are summed in an order of their own, once a device each."""
    monkeypatch.setattr(parallel, "_ALONE", 0)
    monkeypatch.setattr("holo_jax.model.splits_stacks", lambda: True)
    values, moments = curve(model, sizes, transport, in_order=True)
    want_values, want_moments = curve(model, (1, 1, 1, 1))
    np.testing.assert_allclose(values, want_values, rtol=0, atol=1e-5)
    for got, want in zip(moments, want_moments, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def program(
    sizes: tuple[int, ...], time: int = TIME, **fields: Any
) -> tuple[list[Collective], StepFunctions]:
    """Collectives of the compiled train step of the default model."""
    steps, train = compiled("holo", sizes, time, **fields)
    return collectives(train.as_text()), steps


def sizes_of(found: list[Collective]) -> list[tuple[int, ...]]:
    """Dimensions of what they return, without leading ones."""
    every = [dims for one in found for _, dims in one.shapes]
    return [dims[1:] if len(dims) > 2 and dims[0] == 1 else dims for dims in every]


def parameter_sizes(steps: StepFunctions) -> set[tuple[int, ...]]:
    """Shapes of the parameters, those of one layer where they are stacked, transposed too."""
    flat = jax.tree_util.tree_leaves_with_path(steps.shapes.params)
    shapes = {x.shape[1:] if "periods" in jax.tree_util.keystr(path) else x.shape for path, x in flat}
    return shapes | {shape[::-1] for shape in shapes}


def test_sequence_parallel_sends_states_whatever_the_length() -> None:
    (short, steps), (long, _) = program((1, 1, 4, 1)), program((1, 1, 4, 1), 2 * TIME)
    assert [one._replace(name="") for one in short] == [one._replace(name="") for one in long]
    sent = [one for one in short if one.kind != "all-reduce"]
    state = (4, ROWS, 4, 4, 8)  # parts, rows, heads, phasors, channels
    transition = (4, ROWS, 4, 8, 8)
    halo = (ROWS, 3, 4 * 4)
    flags = [dims for dims in sizes_of(sent) if dims not in (state, transition, halo)]
    assert {state, transition, halo} <= set(sizes_of(sent))
    scattered = {state[1:], transition[1:]}
    assert all(dims in scattered or np.prod(dims) <= 4 * ROWS * 4 for dims in flags)
    # What is summed over the parts is the gradient and scalars.
    reduced = sizes_of([one for one in short if one.kind == "all-reduce"])
    assert set(reduced) <= parameter_sizes(steps) | {()}


def test_data_parallel_sums_gradients_and_nothing_else() -> None:
    found, steps = program((4, 1, 1, 1))
    assert {one.kind for one in found} == {"all-reduce"}
    assert set(sizes_of(found)) <= parameter_sizes(steps) | {()}


def test_fsdp_gathers_parameters_and_scatters_gradients() -> None:
    found, steps = program((1, 4, 1, 1), model__num_hidden_layers=2)
    assert {one.kind for one in found} == {"all-gather", "all-reduce", "reduce-scatter"}
    parameters = parameter_sizes(steps)
    gathered, scattered = (
        [one for one in found if one.kind == kind] for kind in ("all-gather", "reduce-scatter")
    )
    # Inside the loop over layers each layer's matrices are gathered, never those of the whole stack, once
    # forward and once backward; what is summed comes out divided.
    assert set(sizes_of(gathered)) <= {shape for shape in parameters if len(shape) == 2}
    assert (24, 64) in sizes_of([one for one in gathered if one.in_loop])
    assert len(gathered) == 2 * (len(scattered) - 2) + 2
    assert {math.prod(dims) * 4 for dims in sizes_of(scattered)} == {
        math.prod(dims) for dims in sizes_of(gathered)
    }
    # What is left to be summed whole are vectors, and taps, which no device divides.
    summed = set(sizes_of([one for one in found if one.kind == "all-reduce"]))
    assert summed <= {shape for shape in parameters if len(shape) < 2 or 24 not in shape} | {()}


def test_fsdp_gathers_once_what_is_kept() -> None:
    found, _ = program((1, 4, 1, 1), model__num_hidden_layers=2, mesh__reshard_after_forward=False)
    gathered, scattered = (
        [one for one in found if one.kind == kind] for kind in ("all-gather", "reduce-scatter")
    )
    assert len(gathered) == len(scattered)


def test_copies_are_one_all_to_all_each() -> None:
    """As many as there were gathers and scatters, of the same arrays."""
    found, _ = program((1, 4, 1, 1), model__num_hidden_layers=2, mesh__transport="copies")
    want, _ = program((1, 4, 1, 1), model__num_hidden_layers=2)
    assert {one.kind for one in found} == {"all-to-all", "all-reduce"}
    kinds = ("all-to-all", "all-gather", "reduce-scatter")
    numbers = [sum(one.kind in kinds for one in program) for program in (found, want)]
    assert numbers[0] == numbers[1]
    assert [one for one in found if one.kind == "all-reduce"] == [
        one for one in want if one.kind == "all-reduce"
    ]


@pytest.mark.parametrize("transport", ["collectives", "copies"])
@pytest.mark.parametrize("sizes", [(4, 1, 1, 1), (1, 4, 1, 1)])
def test_gradients_sent_in_bfloat16(
    sizes: tuple[int, ...], transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sum over four devices: off by less than 2^-8 of the largest terms, and indeed rounded."""
    monkeypatch.setattr(parallel, "_ALONE", 0)
    exchange = Exchange(reduce_dtype="bfloat16", transport=transport)
    mesh = make_mesh(config_of("holo", sizes).mesh)
    axis = "data" if sizes[0] > 1 else "fsdp"
    terms = np.random.default_rng(0).standard_normal((4, 24, 32)).astype(np.float32)
    at = P(None, None) if axis == "data" else P("fsdp", None)

    def gradient(weight: jax.Array) -> jax.Array:
        def loss(weight: jax.Array) -> jax.Array:
            def own(weight: jax.Array, term: jax.Array) -> jax.Array:
                weight = parallel.whole(weight, ("embed", None), jnp.float32)
                return jnp.sum(weight * term[0]).reshape(1)

            return jnp.sum(parallel.sharded(own, (at, P(axis)), P(axis))(weight, jnp.asarray(terms)))

        with parallel.on_mesh(mesh, exchange):
            return jax.grad(loss)(weight)

    here = NamedSharding(mesh, at)
    found = np.asarray(
        jax.jit(gradient, in_shardings=here, out_shardings=here)(np.ones((24, 32), np.float32))
    )
    off = np.abs(found - terms.sum(0)) / np.abs(terms).max(0)
    assert 1e-4 < off.max() < 4 * 2**-8
    rounded = terms.astype(jnp.bfloat16).astype(np.float32).sum(0)
    if transport == "copies" and axis == "fsdp":
        np.testing.assert_allclose(found, rounded, rtol=1e-5, atol=1e-6)


def test_fsdp_gathers_in_the_dtype_of_the_products_and_sums_in_float32() -> None:
    config = config_of("holo", (1, 4, 1, 1), model__precision__storage="bfloat16")
    _, steps = build(config.model, config.optimizer, config.num_steps, make_mesh(config.mesh))
    batch = {name: jax.ShapeDtypeStruct((1, ROWS, TIME), np.int32) for name in ("tokens", "segment_ids")}
    text = steps.train.lower(steps.shapes, batch).as_text()  # compiled for a CPU, all are float32
    kinds = ("all_gather", "reduce_scatter")
    gathered, scattered = (
        set(re.findall(rf"stablehlo.{kind}.*?-> tensor<[\dx]*x(\w+)>", text, flags=re.DOTALL))
        for kind in kinds
    )
    assert (gathered, scattered) == ({"bf16"}, {"f32"})


def test_tensor_parallel_sums_twice_a_block_each_way() -> None:
    for remat, recomputed in (("dots", 0), ("full", 1)):
        found, _ = program((1, 1, 1, 4), model__remat=remat, model__num_hidden_layers=2)
        assert {one.kind for one in found} == {"all-reduce"}
        residual = ("f32", (ROWS, TIME, 24))
        forward, backward = (
            sum(
                one.shapes.count(residual)
                for one in found
                if one.in_loop and ("transpose" in one.name) == transposed
            )
            for transposed in (False, True)
        )
        assert (forward, backward) == (2, 2 + recomputed), remat


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_matrices_and_their_moments_are_divided(axis: str) -> None:
    """In what the compiled program takes and returns; ``fsdp`` leaves taps whole, ``tensor`` nothing."""
    steps, train = compiled("holo", tuple(4 if name == axis else 1 for name in MESH_AXES))
    shapes = jax.tree.leaves(steps.shapes)
    for tree in (train.input_shardings[0][0], train.output_shardings[0]):
        found = zip(shapes, jax.tree.leaves(tree), strict=True)
        whole = {leaf.shape for leaf, at in found if at.shard_shape(leaf.shape) == leaf.shape}
        small = {(1, 4), (1, 4, 16), (1, 4, 8)} if axis == "fsdp" else set()
        assert whole <= {(), (2,), (24,), (1, 24)} | small


@pytest.mark.parametrize("axis", MESH_AXES)
def test_no_device_holds_the_activations_of_all(axis: str) -> None:
    """No array over time has as many numbers as the whole residual stream; along ``tensor`` only that has."""
    _, train = compiled("holo", tuple(4 if name == axis else 1 for name in MESH_AXES))
    dims = re.findall(r"\[(\d+(?:,\d+)+)\]", train.as_text())
    shapes = {tuple(map(int, one.split(","))) for one in dims}
    over_time = {shape for shape in shapes if any(size % TIME == 0 for size in shape)}
    assert over_time
    large = {shape for shape in over_time if math.prod(shape) >= ROWS * TIME * 24}
    assert {shape for shape in large if axis != "tensor" or 24 not in shape} == set()


@pytest.mark.parametrize("axis", MESH_AXES)
def test_kernels_run_on_each_devices_part(axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, denoiser and loss find a device's shapes, and run by kernel wherever one device would."""
    calls = install(monkeypatch)
    rows, time = 4, 128
    sizes = {f"mesh__{name}": 2 if name == axis else 1 for name in MESH_AXES}
    config = micro_config(
        model__preset="holo",
        model__precision__storage="bfloat16",
        model__hidden_size=192,
        model__hd_dim=128,
        model__head_dim=64,
        model__phasors=32,
        mesh__devices=2,
        **sizes,
    )
    functions = model_functions(config.model)
    ids = jax.ShapeDtypeStruct((rows, time), np.int32)
    with jax.set_mesh(make_mesh(config.mesh)):
        jax.eval_shape(functions.loss, functions.shapes, ids, ids, None)
    b, t = rows // (2 if axis in ("data", "fsdp") else 1), time // (2 if axis == "seq" else 1)
    ways = 2 if axis == "tensor" else 1
    memory = ("parts" if axis == "seq" else "memory", (b, t, 2 // ways, 64))
    denoiser = ("swiglu", (b, t, 192), (192, 2, 512 // ways))
    loss = ("loss", (b * t, 192), (64, 192), config.model.loss_chunk)
    # The loss over a divided vocabulary has no kernel.
    assert calls == [memory, denoiser] + ([] if axis == "tensor" else [loss])


def test_parts_that_find_their_map_first_equal_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of the model whose parts go by a chain, as the kernels' do."""
    config = config_of("holo", (1, 1, 4, 1))
    functions = model_functions(config.model)
    params = functions.init(jax.random.key(0))
    batch = tuple(rows(0).values())

    def gradient(*inputs: Any) -> Any:
        return jax.value_and_grad(functions.loss, has_aux=True)(*inputs, None)

    want = jax.jit(gradient)(params, *batch)
    calls = install(monkeypatch)
    monkeypatch.setattr("holo_jax.kernels.choose", lambda call, backend, automatic=(): "hopper")
    with jax.set_mesh(make_mesh(config.mesh)):
        # Another function, lest it find the trace of the first.
        got = jax.jit(lambda *inputs: gradient(*inputs))(params, *batch)
    assert "parts" in {name for name, *_ in calls}
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-4, atol=1e-5)


def test_collectives_are_read_from_text() -> None:
    text = """
      %a = f32[24,32]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, op_name="f/while/body/g"
      %b = (bf16[8]{0}, f32[]) all-reduce(%x, %y), replica_groups={{0,1},{2,3}}, metadata={op_name="f"}
      %c = f32[8]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
      %d = c64[2,3]{1,0} collective-permute(%x), source_target_pairs={{0,1}}
      %e = u32[5]{0} reduce-scatter-start(%x), replica_groups=[2,4]<=[8]
      %f = f32[] add(%x, %y)
      %g = ((bf16[2,8]{1,0}, f32[2]), (bf16[8,8]{1,0}, f32[8])) all-gather-start(), replica_groups=[1,4]<=[4]
    """
    found = collectives(text)
    assert [(one.kind, one.devices, one.bytes) for one in found] == [
        ("all-gather", 4, 24 * 32 * 4),
        ("all-reduce", 2, 20),
        ("collective-permute", 2, 48),
        ("reduce-scatter", 4, 20),
        ("all-gather", 4, 8 * 8 * 2 + 8 * 4),
    ]
    assert found[0].in_loop and not found[1].in_loop
    with pytest.raises(ValueError, match="device groups"):
        collectives("%a = f32[2] all-reduce(%x), replica_groups=what")


@pytest.mark.parametrize("model", ["holo", "ssm"])
def test_reading_on_from_a_state_over_a_divided_sequence(model: str) -> None:
    """Two pieces read one after the other give the hidden states, and the state, of one device."""
    config = config_of(model, (1, 1, 2, 2)).model
    functions = model_functions(config)
    params = functions.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(64, size=(ROWS, TIME), dtype=np.int32)

    def read(params: Any, tokens: jax.Array) -> Any:
        state, hidden = init_state(config, ROWS), []
        for piece in (tokens[:, :10], tokens[:, 10:]):
            output, state = functions.model(params).model(piece, None, state)
            hidden.append(output)
        return hidden, state

    want = jax.jit(read)(params, tokens)
    with jax.set_mesh(make_mesh(config_of(model, (1, 1, 2, 2)).mesh)):
        got = jax.jit(read)(params, tokens)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-5)


def test_what_does_not_divide_is_refused() -> None:
    mesh = make_mesh(config_of("holo", (1, 1, 4, 2)).mesh)
    config = config_of("holo", (1, 1, 4, 2)).model
    check_model(mesh, config, TIME)
    with pytest.raises(MeshError, match=r"context_length / mesh\.seq = 2; it must be at least the 3 token"):
        check_model(mesh, config, 8)
    with pytest.raises(MeshError, match=r"model has 3 heads; they must be a multiple of mesh\.tensor 2"):
        check_model(mesh, config.replace(hd_dim=24), TIME)
    model = model_functions(config).model
    params = model_functions(config).init(jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((ROWS, 6), np.int32)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="6 tokens a row; it must be a multiple of seq = 4"),
    ):
        jax.eval_shape(lambda tokens: model(params).model(tokens), tokens)
    ids = np.ones((ROWS, TIME), np.int32)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="segment_ids are given with a state on a mesh"):
        jax.eval_shape(lambda ids: model(params).model(ids, ids, init_state(config, ROWS)), ids)
