"""Writes held back over a group of tokens, in every form, against the recurrence in float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from holo_jax import functional
from holo_jax.config import HoloConfig
from holo_jax.functional import MemoryState, init_memory
from holo_jax.generate import Sampling, decoding, decoding_form, init_state, pending, prefill, stack
from holo_jax.generate.counts import Counts, unpacked
from holo_jax.generate.decoding import Decoding, DecodingInputs, decode_block, loop_state
from holo_jax.generate.forms import is_split, owned
from holo_jax.generate.pending import Token
from holo_jax.generate.stepping import Form, pack, room_for_mail, split_held, step
from holo_jax.kernels import capability
from holo_jax.kernels.decode import choose as decode_choose
from holo_jax.kernels.decode import gate as decode_gate
from holo_jax.kernels.decode import heads as decode_heads
from holo_jax.kernels.decode import products as decode_products
from holo_jax.kernels.decode import rows_plan as decode_rows_plan
from holo_jax.kernels.decode import scores as decode_scores
from holo_jax.mixers import MemoryMixerState
from holo_jax.model import HoloForCausalLM
from holo_jax.precision import FULL, MIXED
from tests.holo_jax.models import build

B, H, M, D, TAPS, SIZE = 2, 2, 16, 16, 3, 4
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.mark.parametrize("erase", [True, False], ids=["erase", "sum"])
def test_groups_are_the_recurrence(erase: bool) -> None:
    """Three groups from a state with a residue that is not normalised; the second row stops in the third."""
    rng = np.random.default_rng(0)
    steps, stop = 3 * SIZE, 3 * SIZE - 2
    raw, values = rng.normal(size=(steps, B, H * M)), rng.normal(size=(steps, B, H, D))
    gates, erases = rng.uniform(size=(2, steps, B, H))
    gates[stop:, 1] = 0
    taps = rng.normal(size=(2, TAPS, H * M))
    tail = rng.normal(size=(B, TAPS - 1, H * M))
    memory = rng.normal(size=(B, H, M, D)) + 1j * rng.normal(size=(B, H, M, D))
    residue, writes = 0.01 * memory[::-1], np.ones((B, H))

    past = np.concatenate([np.moveaxis(tail, 1, 0), raw])
    phases = [sum(own[j] * past[j : j + steps] for j in range(TAPS)) for own in taps]
    read_phases, write_phases = (p.reshape(steps, B, H, M) for p in phases)
    with jax.enable_x64(True):
        wanted, end = functional.accumulate(
            *(jnp.moveaxis(jnp.asarray(x), 0, 1) for x in (write_phases, read_phases, values, gates)),
            jnp.moveaxis(jnp.asarray(gates * erases), 0, 1) if erase else None,
            binding="outer",
            method="recurrent",
            initial_state=MemoryState(jnp.asarray(memory), jnp.asarray(residue), jnp.asarray(writes)),
        )
        wanted, whole, squares = (np.asarray(x) for x in (wanted, end.memory + end.residue, end.writes))

    narrow = lambda x: jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else jnp.float32)  # noqa: E731
    content = MemoryState(narrow(memory), narrow(residue), narrow(writes))
    held = pending.hold(MemoryMixerState(narrow(tail), content, None))

    @jax.jit
    def group(held, inputs, count):
        def one(carry, x):
            index, raw, values, gates, erases = x
            token = Token(raw, values, gates, gates * erases if erase else None)
            read, carry = pending.read_and_write(held, carry, index, token, *map(narrow, taps))
            return carry, read

        steps = jnp.arange(SIZE, dtype=jnp.int32)
        after, reads = jax.lax.scan(one, pending.begin(held, SIZE), (steps, *inputs))
        return pending.join(held, after, count), reads

    found = []
    for n in range(3):
        part = slice(n * SIZE, (n + 1) * SIZE)
        count = jnp.asarray([SIZE, min(SIZE, stop - n * SIZE)], jnp.int32)
        held, reads = group(held, tuple(narrow(x[part]) for x in (raw, values, gates, erases)), count)
        found.append(reads)
    found = np.moveaxis(np.concatenate(found), 0, 1)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(found[1, :stop], wanted[1, :stop], rtol=1e-5, atol=2e-5)
    after = pending.release(held)
    np.testing.assert_allclose(after.content.memory + after.content.residue, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after.content.writes, squares, rtol=1e-6)
    ends = [past[steps:, 0], past[stop : stop + TAPS - 1, 1]]
    np.testing.assert_allclose(after.tail, np.stack(ends), rtol=1e-6)


def test_a_hundred_thousand_coherent_tokens_do_not_drift() -> None:
    """Equal keys and values of one sign, where a plain float32 sum is off by 1e-3."""
    m = d = 4
    groups = 100_000 // pending.GROUP
    content = init_memory(1, 1, m, d, binding="outer")
    token = Token(jnp.full((1, m), 0.3), jnp.full((1, 1, d), 0.7), jnp.full((1, 1), 0.9), None)
    taps = jnp.asarray([[0.0], [1.0]]) * jnp.ones((2, m))

    @jax.jit
    def run():
        def one(held, carry, index):
            read, carry = pending.read_and_write(held, carry, index, token, taps, taps)
            return carry, read

        def group(held, _):
            steps = jnp.arange(pending.GROUP, dtype=jnp.int32)
            begun = pending.begin(held, pending.GROUP)
            after, reads = jax.lax.scan(lambda c, i: one(held, c, i), begun, steps)
            return pending.join(held, after, jnp.full((1,), pending.GROUP, jnp.int32)), reads[-1]

        start = pending.hold(MemoryMixerState(jnp.full((1, 1, m), 0.3), content, None))
        return jax.lax.scan(group, start, length=groups)[1][-1]

    exact = groups * pending.GROUP * np.float64(np.float32(0.9)) * np.float64(np.float32(0.7))
    np.testing.assert_allclose(np.asarray(run(), np.float64), exact, rtol=2e-6)


def small(**changes: object) -> HoloConfig:
    sizes = dict(vocab_size=40, hidden_size=32, hd_dim=H * D, head_dim=D, phasors=M, num_hidden_layers=2)
    return HoloConfig(**{**sizes, "short_conv": TAPS, "precision": FULL, **changes})


@pytest.mark.parametrize(
    ("form", "changes", "many"),
    [
        (Form(heads=True, interpret=True), dict(erase=False, num_hidden_layers=1), False),
        (Form(heads=True, interpret=True), dict(num_hidden_layers=1), True),
        (Form(heads=True, products=True, interpret=True), {}, False),
        (
            Form(heads=True, products=True, drawn=True, interpret=True),
            dict(tie_embeddings=True, num_hidden_layers=1),
            False,
        ),
        (Form(heads=True, folded=True, interpret=True), {}, False),
        (Form(heads=True, folded=True, joined=True, drawn=True, interpret=True), {}, True),
        (Form(heads=True, joined=True, interpret=True), dict(erase=False, num_hidden_layers=1), False),
    ],
    ids=["heads-of-a-sum", "many-heads", "products", "drawn", "folded", "joined", "joined-sum"],
)
def test_the_kernels_decode_as_the_portable_form(form: Form, changes: dict, many: bool, monkeypatch) -> None:
    """Tokens, logits and state of a block of two groups in which one row ends, in Pallas' interpreter."""
    monkeypatch.setattr(decoding, "GROUP", SIZE)
    if many:
        monkeypatch.setattr(decode_heads, "_MANY", 1)
        # So that the memory has several parts.
        for name in ("_ROWS_MANY", "_ROWS_JOINED"):
            monkeypatch.setattr(decode_heads, name, 2)
    config = small(**changes)
    model = decoding_form(build(config))
    graphdef, params = nnx.split(model, nnx.Param)
    start = prefill(model, [[3, 1, 4, 1, 5], [2, 7]])
    sampling = Sampling(temperature=2.0)
    allowed = jnp.int32(config.vocab_size)
    seeds = jnp.arange(2, dtype=jnp.uint32)
    inputs = DecodingInputs(sampling.numbers, seeds, jnp.full((4,), -1, jnp.int32), allowed)
    results = []
    for own in (Form(), form):
        packed = pack(model, own)
        state = loop_state(config, start.state, own)
        begin = Decoding(start.logits, state, jnp.asarray([6, 3]), None)
        lowered = decode_block.lower(
            graphdef, params, begin, inputs, packed, steps=6, plan=sampling.plan, form=own
        )
        program = lowered.compile(compiler_options=FAST_COMPILE)
        after, tokens, finite = program(params, jax.tree.map(jnp.copy, begin), inputs, packed)
        assert finite
        layers = pending.release_layers(after.state.layers)
        results.append((tokens, after.logits, stacked_layers(layers)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *results)
    assert (np.asarray(results[0][0])[1, 3:] == -1).all()


def test_counts_are_one_array_and_back() -> None:
    """A position past 2^31 too."""
    position = jnp.array([0, 2**32 - 5], jnp.uint32)
    flags, numbers = jnp.array([True, False]), jnp.array([3, -1])
    more = (numbers + 2, numbers + 3, numbers + 4, ~flags, jnp.arange(6).reshape(3, 2))
    given = Counts(numbers, flags, position, numbers + 1, *more)
    assert given.packed().shape == (11, 2) and given.packed().dtype == jnp.int32
    for before, after in zip(given, unpacked(given.packed()), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


def test_a_row_that_reads_nothing_keeps_state_and_logits() -> None:
    """Beside one that reads in the same block, and reads what it reads alone."""
    config = small(num_hidden_layers=1)
    model = decoding_form(build(config))
    graphdef, params = nnx.split(model, nnx.Param)
    start = prefill(model, [[3, 1, 4], [2, 7]])
    plan, seeds = Sampling().plan, jnp.arange(2, dtype=jnp.uint32)
    inputs = DecodingInputs(
        Sampling().numbers, seeds, jnp.full((4,), -1, jnp.int32), jnp.int32(config.vocab_size)
    )

    def run(remaining: list[int]) -> tuple:
        state = loop_state(config, start.state)
        begin = owned(params, Decoding(start.logits, state, jnp.asarray(remaining), None))
        after, tokens, finite = decode_block(graphdef, params, begin, inputs, steps=5, plan=plan)
        assert finite
        return after, np.asarray(tokens)

    before, _ = run([0, 0])
    after, tokens = run([0, 5])
    both, all_tokens = run([5, 5])
    assert (tokens[0] == -1).all() and (tokens[1] == all_tokens[1]).all()
    np.testing.assert_array_equal(after.logits[0], start.logits[0])
    np.testing.assert_array_equal(before.logits, start.logits)
    np.testing.assert_array_equal(after.logits[1], both.logits[1])
    rows = lambda x, row: jax.tree.map(lambda leaf: np.asarray(leaf[row]), x.state.layers)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, rows(after, 0), rows(before, 0))
    jax.tree.map(np.testing.assert_array_equal, rows(after, 1), rows(both, 1))


def test_a_state_in_fewer_bits_goes_through_the_recurrence_in_every_form() -> None:
    """The recurrence is of a split model and wants a split state."""
    config = small(num_hidden_layers=1)
    layers = loop_state(config, init_state(config, 1, state_dtype="int8"), Form(stacked=True)).layers
    assert is_split(layers) and not pending.holds(layers)


def stacked_layers(layers):
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def test_the_kernels_lower_for_a_gpu() -> None:
    """All that happens before the device's own compiler: what the interpreter accepts, Triton may not."""
    config = small(precision=MIXED, hidden_size=64)
    shape = stack.shape_of(config, 2, SIZE, 4)

    def given():
        model = decoding_form(HoloForCausalLM(config, rngs=nnx.Rngs(0)))
        state = loop_state(config, init_state(config, 2), Form(heads=True))
        fixed, moving = split_held(state.layers, SIZE)
        return (
            stack.transposed(model)[0][0],
            model.model.periods[0].blocks[0].mixer,
            fixed[0][0],
            moving[0][0],
        )

    def all_of_them(weights, mixer, held, pending):
        numbers = jnp.ones((4, 2), jnp.int32)
        y = jnp.zeros((2, shape.offsets["all"]))
        given = [jnp.zeros((rows, 64), jnp.bfloat16) for rows in (2, 4)]
        products = [decode_products.product("maps", x, weights["maps"], norm=jnp.ones(64)) for x in given]
        heads = [
            stack.heads(mixer, y, held, pending, numbers, False, *more)
            for more in ((None,), (given[0],), (given[0], SIZE))
        ]
        gated = decode_gate.gated(jnp.zeros((2, 72)), given[0], eps=1e-6)
        drawing = decode_scores.Drawing(
            jnp.zeros((SIZE, 2, 2), jnp.uint32), jnp.ones((1,)), jnp.full((1,), 40)
        )
        table, numbers = jnp.zeros((40, 64), jnp.bfloat16), jnp.zeros((8 + SIZE, 2), jnp.int32)
        drawn = decode_scores.of_logits(jnp.zeros((2, 40)), drawing, numbers)
        stops = jnp.zeros((4,), jnp.int32)
        chosen = decode_choose.choose(drawn, numbers, stops, table, divisor=0.02)
        joined = stack.joined(held, pending, size=SIZE, interpret=False)
        return heads, joined, products, gated, drawn, chosen

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    shapes = jax.eval_shape(given)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of this backend of Pallas
        lowered = jax.jit(all_of_them).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("xla.gpu.triton") == 9


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 4, 5, 64])
def test_the_kernels_compute_on_a_gpu_what_the_definition_computes(rows: int, monkeypatch) -> None:
    """The compiled kernels, all programs together, on tokens that are given; bfloat16 against float32.

    The distance of the portable form in bfloat16 from float32 is what the order of sums may cost.
    """
    config = HoloConfig(vocab_size=512, hidden_size=512, hd_dim=512, num_hidden_layers=3, precision=MIXED)
    wide = build(config.replace(precision=FULL))
    graphdef, params = nnx.split(build(config), nnx.Param)
    model = decoding_form(nnx.merge(graphdef, params))
    ids = np.random.default_rng(0).integers(0, 512, (rows, 12)).astype(np.int32)
    full = np.asarray(jax.jit(lambda model, ids: model(ids).logits)(wide, ids), np.float64)[:, 4:]
    start = prefill(model, ids[:, :4])
    programs = capability.multiprocessors()
    distance = {}
    forms = {"portable": Form(), "heads": Form(heads=True), "folded": Form(heads=True, folded=True)}
    if rows <= decode_products.MAX_ROWS:
        forms["products"] = Form(heads=True, products=True)
    shape = stack.shape_of(config, rows, 8, programs)
    if decode_rows_plan.unsupported(shape, jnp.bfloat16) is None:
        forms["stack"] = Form(stacked=True, programs=programs)
    forms["many"] = forms["heads"]
    for name, form in forms.items():
        monkeypatch.setattr(decode_heads, "_MANY", 1 if name == "many" else 2**30)

        @jax.jit
        def run(model, packed, state, ids, form=form):
            fixed, moving = split_held(state.layers, 8, mail=room_for_mail(config, form, rows))

            def one(moving, x):
                active = jnp.ones((rows,), bool)
                logits, moving = step(model, x[1], fixed, moving, x[0], active, None, form, packed)
                return moving, logits

            begin = state._replace(layers=moving)
            return jax.lax.scan(one, begin, (jnp.arange(8, dtype=jnp.int32), ids.T))[1]

        packed = pack(model, form)
        logits = run(model, packed, loop_state(config, start.state, form), jnp.asarray(ids[:, 4:]))
        logits = np.moveaxis(np.asarray(logits, np.float64), 0, 1)
        distance[name] = np.sqrt(np.mean((logits - full) ** 2)) / full.std()
    assert max(distance.values()) < 1.25 * distance["portable"] + 1e-3
