"""The whole model: shapes, dtypes, causality, segments, continuation, initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from holo_jax.config import HoloConfig
from holo_jax.functional.cross_entropy import IGNORE
from holo_jax.model import HoloForCausalLM, count_parameters, init_state, logical_axes
from holo_jax.precision import FULL, MIXED
from tests.holo_jax.models import SIZES, VARIANTS, VOCAB, build, variant, variant_config

LENGTH = 21


def tokens(seed: int, shape: tuple[int, int] = (2, LENGTH)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(VOCAB, size=shape, dtype=np.int32))


@pytest.mark.parametrize("name", VARIANTS)
def test_causality_by_gradient(name: str) -> None:
    """d logits_t / d x_s is exactly zero for s > t, and not zero for s = t and for some s < t."""
    model, ids = variant(name), tokens(1, (1, LENGTH))
    middle = LENGTH // 2
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    def gradient(offsets: jax.Array) -> jax.Array:
        def scalar(offsets: jax.Array) -> jax.Array:
            live = nnx.merge(graphdef, params)
            table = live.model.embedding[...]
            rows = jnp.concatenate([table, table[ids[0]] + offsets])
            live.model.embedding = nnx.Param(rows, axes=(None, None))
            own = VOCAB + jnp.arange(LENGTH)[None]
            return jnp.sum(live(own).logits[0, middle] * jnp.arange(VOCAB))

        return jax.grad(scalar)(offsets)

    per_position = np.abs(gradient(np.zeros((LENGTH, SIZES["hidden_size"]), np.float32))).sum(-1)
    assert (per_position[middle + 1 :] == 0).all()
    assert per_position[middle] > 0
    assert per_position[middle - 2] > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_call_and_packed_documents(name: str) -> None:
    """Outputs of the documented call; packed documents neither see nor disturb each other."""
    model, border = variant(name), 9
    one, other, two = tokens(2, (1, border)), tokens(3, (1, border)), tokens(4, (1, LENGTH - border))
    filler = tokens(5, (1, border))
    ids = jnp.asarray(np.block([[one, two], [other, two], [two, filler]]))
    packed = [1] * border + [2] * (LENGTH - border)
    alone = [2] * (LENGTH - border) + [0] * border
    segment_ids = jnp.array([packed, packed, alone])
    outputs = jax.jit(lambda: model(ids, labels=ids, segment_ids=segment_ids))()
    assert outputs.logits.shape == (3, LENGTH, VOCAB) and outputs.loss.shape == ()
    assert outputs.num_targets == 2 * (LENGTH - 2) + LENGTH - border - 1
    np.testing.assert_allclose(outputs.loss, np.log(VOCAB), rtol=0.3)
    assert outputs.state is None
    logits = np.asarray(outputs.logits)
    assert (logits[0, border:] == logits[1, border:]).all()
    assert (logits[0, :border] != logits[1, :border]).any()
    np.testing.assert_allclose(logits[0, border:], logits[2, : LENGTH - border], rtol=2e-4, atol=2e-5)


def test_labels_are_ignored_where_told() -> None:
    model, ids = variant("holo"), tokens(6)
    labels = ids.at[:, 5:].set(IGNORE)
    loss = nnx.jit(lambda model, ids, labels: model(ids, labels=labels))
    outputs = loss(model, ids, labels)
    assert outputs.num_targets == 2 * 4
    np.testing.assert_allclose(outputs.loss, loss(model, ids[:, :5], ids[:, :5]).loss, rtol=1e-5)
    padded = jax.jit(lambda: model(ids, labels=ids, segment_ids=jnp.zeros_like(ids)))()
    assert padded.num_targets == 0 and padded.loss == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_dtype_policy(name: str) -> None:
    """bfloat16 activations, float32 logits, loss, gradients and memories."""
    model = variant(name, MIXED)
    graphdef, params = nnx.split(model, nnx.Param)
    ids = tokens(7)

    def loss(params: nnx.State) -> jax.Array:
        return nnx.merge(graphdef, params)(ids, labels=ids).loss

    gradients = jax.eval_shape(jax.grad(loss), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    state = init_state(model.config, 2, cache_length=LENGTH)
    outputs = jax.eval_shape(lambda: model(ids, labels=ids, state=state))
    assert outputs.logits.dtype == jnp.float32 and outputs.loss.dtype == jnp.float32
    wide = {jnp.dtype(d) for d in (jnp.float32, jnp.complex64, jnp.int32, jnp.uint32)}
    if "attention" not in model.config.layer_kinds:
        values = {jnp.dtype(jnp.bfloat16)} if model.config.value_conv else set()
        assert {leaf.dtype for leaf in jax.tree.leaves(outputs.state)} <= wide | values
    hidden = jax.eval_shape(lambda: model.model(ids)).hidden
    assert hidden.dtype == jnp.bfloat16
    jax.tree.map(
        lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), outputs.state, state
    )


@pytest.mark.parametrize("name", ["holo", "seed", "attention", "ssm"])
def test_gradients_at_initialisation_are_bounded_over_depth(name: str) -> None:
    """24 layers: the gradient of every block is within a factor 30 of every other, and of order 1."""
    config = variant_config(name, num_hidden_layers=24, hidden_size=32, hd_dim=32)
    ids = tokens(8, (2, 32))

    @jax.jit
    def gradient() -> nnx.State:
        graphdef, params = nnx.split(HoloForCausalLM(config, rngs=nnx.Rngs(0)), nnx.Param)
        return jax.grad(lambda p: nnx.merge(graphdef, p)(ids, labels=ids).loss)(params)

    stacked = map(np.asarray, jax.tree.leaves(gradient()["model"]["periods"]))
    norms = np.sqrt(sum(np.sum(leaf.reshape(24, -1) ** 2, axis=1) for leaf in stacked))
    assert np.isfinite(norms).all()
    assert norms.max() / norms.min() < 30
    assert norms.min() > 1e-3
    assert norms.max() < 30


def test_initialisation_and_rematerialisation() -> None:
    """Residual maps are scaled once; remat and unrolling change neither loss nor gradient."""
    ids = tokens(9)

    def value_and_gradient(config: HoloConfig, params: nnx.State) -> tuple[jax.Array, nnx.State]:
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: HoloForCausalLM(config, rngs=nnx.Rngs(0))), nnx.Param)
        return jax.value_and_grad(lambda p: nnx.merge(graphdef, p)(ids, labels=ids).loss)(params)

    base = variant_config("holo", hidden_size=64, hd_dim=64, head_dim=32, num_hidden_layers=8)
    params = jax.jit(lambda: nnx.state(HoloForCausalLM(base, rngs=nnx.Rngs(0)), nnx.Param))()
    expected = jax.jit(value_and_gradient, static_argnums=0)(base, params)
    block = params["model"]["periods"]["blocks"][0]
    np.testing.assert_allclose(block["mixer"]["out"]["weight"][...].std(), 1 / 8 / 4, rtol=0.05)
    down = 1 / (base.mlp_dim * 16) ** 0.5
    np.testing.assert_allclose(block["mlp"]["down"]["weight"][...].std(), down, rtol=0.05)
    np.testing.assert_allclose(block["mixer"]["values"]["weight"][...].std(), 1 / 8, rtol=0.05)
    for changes in (
        dict(remat="full", scan_unroll=2),
        dict(remat="dots"),
    ):
        ours = jax.jit(value_and_gradient, static_argnums=0)(base.replace(**changes), params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, expected)


@pytest.mark.parametrize("name, remat", [("holo", "dots"), ("hybrid", "none")])
def test_periods_apart_compute_what_their_scan_does(
    name: str, remat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unrolled whole, blocks take parts of the stacked parameters: the same loss and gradient."""
    monkeypatch.setattr("holo_jax.model.splits_stacks", lambda: True)
    ids = tokens(9)
    layers = 2 * len(variant_config(name).layer_kinds)
    scanned = variant_config(name, num_hidden_layers=layers, scan_unroll=1, remat="none")
    params = jax.jit(lambda: nnx.state(HoloForCausalLM(scanned, rngs=nnx.Rngs(0)), nnx.Param))()

    def value_and_gradient(config: HoloConfig) -> tuple[jax.Array, nnx.State]:
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: HoloForCausalLM(config, rngs=nnx.Rngs(0))), nnx.Param)
        loss = jax.value_and_grad(lambda p: nnx.merge(graphdef, p)(ids, labels=ids).loss)
        return jax.jit(loss)(params)

    expected = value_and_gradient(scanned)
    ours = value_and_gradient(scanned.replace(scan_unroll=2, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_names_its_axes(name: str) -> None:
    config = variant_config(name)
    model = nnx.eval_shape(lambda: HoloForCausalLM(config, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    axes = logical_axes(params)
    shapes = nnx.to_pure_dict(params)
    jax.tree.map(
        lambda named, shape: np.testing.assert_equal(len(named), len(shape.shape)),
        axes,
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    assert count_parameters(params) == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_tied_embeddings_and_hybrids_have_the_expected_parts() -> None:
    tied = build(variant_config("holo", tie_embeddings=True))
    assert not hasattr(tied, "head")
    assert jax.eval_shape(lambda: tied(tokens(0))).logits.shape[-1] == VOCAB
    hybrid = variant("hybrid")
    assert hybrid.config.layer_kinds == ("holo", "attention") and hybrid.config.num_periods == 1


def test_attention_state_needs_room() -> None:
    with pytest.raises(ValueError, match="cache_length is 0"):
        init_state(variant_config("hybrid"), 1)


def test_memory_state_is_constant_in_length() -> None:
    small, large = (init_state(variant_config("holo"), 1, cache_length=n) for n in (1, 10**6))
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, large)


def test_full_precision_policy_is_float32() -> None:
    assert variant_config("holo", precision=FULL).precision.storage == "float32"


@pytest.mark.parametrize("name", VARIANTS)
def test_traces_where_transfers_are_forbidden(name: str) -> None:
    """The train loop traces its first step so: constants of the program must not count as transfers."""
    model, ids = variant(name), tokens(1)
    with jax.transfer_guard("disallow"):
        assert jax.eval_shape(lambda ids: model(ids).logits, ids).shape == (2, LENGTH, VOCAB)


@pytest.mark.parametrize(
    "changes, packed, asked",
    [
        (dict(), False, "cudnn"),
        (dict(), True, "cudnn"),
        (dict(attention_window=32), False, "cudnn"),
        (dict(attention_window=32), True, "xla"),
        (dict(precision=FULL), True, "xla"),
    ],
)
def test_attention_asks_for_a_kernel_on_a_gpu(changes, packed, asked, monkeypatch) -> None:
    """With the mask of packed documents too, as a card has shown it right; by the arguments given."""
    calls = []
    real = jax.nn.dot_product_attention

    def attend(*arguments, implementation, **options):
        calls.append((implementation, options["mask"] is not None))
        return real(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    config = variant_config("attention", **{"precision": MIXED, **changes})
    ids = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def read(ids, segments):
        model = HoloForCausalLM(config, rngs=nnx.Rngs(0))
        return model(ids, labels=ids, segment_ids=segments if packed else None).loss

    jax.eval_shape(read, ids, ids)
    assert set(calls) == {(asked, packed)}
