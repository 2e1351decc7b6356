"""One kernel over all layers: its shares, and tokens in Pallas' interpreter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from holo_jax.config import HoloConfig
from holo_jax.generate import Sampling, decoding_form, init_state, prefill, stack
from holo_jax.generate.decoding import Decoding, DecodingInputs, decode_block, loop_state
from holo_jax.generate.stepping import Form, join_held, pack, reusable, room_for_mail, split_held, step
from holo_jax.kernels import capability
from holo_jax.kernels.decode import plan as decode_plan
from holo_jax.kernels.decode import rows as decode_rows
from holo_jax.kernels.decode import rows_plan as decode_rows_plan
from holo_jax.kernels.decode import shape as decode_shape
from holo_jax.kernels.decode.rows_worker import RowsWorker
from holo_jax.precision import FULL, MIXED
from tests.holo_jax.models import build

SMALL = dict(vocab_size=64, hidden_size=256, hd_dim=256, head_dim=64, phasors=32, mlp_ratio=1.5)


def shape_of(rows: int = 16, programs: int = 132, **changes: object) -> decode_shape.Shape:
    config = HoloConfig(num_hidden_layers=12, hidden_size=1024, hd_dim=1024, precision=MIXED)
    return stack.shape_of(config, rows, 16, programs)._replace(**changes)


@pytest.mark.parametrize("name", decode_plan.PRODUCTS)
def test_dealt_weights_are_all_there(name: str) -> None:
    """Every row of a weight is one program's, in an order that ``gathered`` takes back."""
    shape = shape_of(programs=20, width=256, heads=4, hidden=512)
    halves, outputs = 1 + (name == "up"), decode_plan.outputs(shape, name)
    depth, own = decode_plan.depth(shape, name), decode_rows_plan.share(shape, name)
    weight = np.random.default_rng(0).normal(size=(2, halves * outputs, depth)).astype(np.float32)
    dealt = decode_rows_plan.dealt(shape, name, jnp.asarray(weight))
    for program in range(shape.programs):
        rows = np.asarray(decode_rows_plan.gathered(shape, name, dealt[1, program])).reshape(halves, own, -1)
        first = program * own
        here = max(0, min(own, outputs - first))
        for half in range(halves):
            begin = half * outputs + first
            np.testing.assert_array_equal(rows[half, :here], weight[1, begin : begin + here])
            np.testing.assert_array_equal(rows[half, here:], 0)
    pieces = decode_rows_plan.copies(shape, name)
    lines = [first + n for first, count in pieces for n in range(count)]
    assert lines == list(range(decode_rows_plan.room(shape, name)[0]))


def test_every_map_has_a_place() -> None:
    """At the size that the kernel is for."""
    shape = shape_of()
    rows = np.asarray(decode_plan.rows_by_head(shape)).reshape(shape.heads, decode_plan.per_head(shape))
    assert set(rows.ravel()) == set(range(shape.offsets["all"]))
    first = shape.offsets
    np.testing.assert_array_equal(rows[3, : shape.d], first["values"] + 3 * shape.d + np.arange(shape.d))
    phases = rows[3, shape.d : shape.d + shape.m]
    np.testing.assert_array_equal(phases, first["phases"] + 3 * shape.m + np.arange(shape.m))
    assert rows[3, 2 * shape.d + shape.m] == first["write"] + 3


def test_a_lane_finds_eight_columns() -> None:
    """Of whole tiles and the last one: 16 bytes of lane ``4 row + q`` are columns from ``8 q``."""
    shape = shape_of(programs=20, width=256, heads=4, hidden=512)
    depth, rows = 256, decode_rows_plan.share(shape, "out")
    weight = np.arange(256 * depth, dtype=np.float32).reshape(1, 256, depth)
    flat = np.asarray(decode_rows_plan.dealt(shape, "out", jnp.asarray(weight)))[0, 2].reshape(-1)
    for row in range(rows):
        tile, within = divmod(row, 8)
        size = decode_rows_plan.tiles(shape, "out")[tile]
        for block, q in ((0, 0), (3, 2), (7, 3)):
            at = tile * 8 * depth + ((block * size + within) * 4 + q) * 8
            np.testing.assert_array_equal(
                flat[at : at + 8], weight[0, 2 * rows + row, 32 * block + 8 * q :][:8]
            )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(rows=17), "the batch has 17 rows; it must have at most 16"),
        (dict(m=64), "a head has 64 phasors and 64 channels; it must have 32 and 64"),
        (dict(heads=20), "the batch has 320 heads; the kernel works out 264 at a time"),
        (dict(hidden=2700), "the product down sums over 2700 columns; it must be a multiple of 256"),
        (dict(hidden=3072), "a program's weights of a layer take 243712 bytes; it can hold 232448"),
        (dict(rows=1, width=2048), "a program's weights of a layer take 411648 bytes; it can hold 232448"),
        (
            dict(rows=1, width=512, heads=56, hidden=512),
            "a program makes 70 results of maps; it must be about 64 or fewer",
        ),
    ],
    ids=["many", "phasors", "heads", "columns", "memory", "width", "share"],
)
def test_what_it_refuses(changes: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reasons name the field, the value and the constraint."""
    for module in (decode_plan, decode_shape):
        monkeypatch.setattr(module, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    for rows in (1, 2, 16):
        assert decode_rows_plan.unsupported(shape_of(rows), jnp.bfloat16) is None
    assert decode_rows_plan.unsupported(shape_of(**changes), jnp.bfloat16) == reason
    assert decode_rows_plan.unsupported(shape_of(), jnp.float32) == "storage is float32; it must be bfloat16"
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "must be 0.11 or newer" in str(decode_rows_plan.unsupported(shape_of(), jnp.bfloat16))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel is for jax 0.11 and newer")
def test_numbers_are_read_once_the_kernel_before_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a computing warpgroup is traced for a GPU: that kernel may still run, and is what stores them."""
    events: list[str] = []

    def noting(name: str, event: str) -> None:
        own = getattr(RowsWorker, name)

        def noted(*args: object) -> object:
            events.append(event)
            return own(*args)

        monkeypatch.setattr(RowsWorker, name, noted)

    noting("follow", "waits")
    noting("numbers_of", "reads")
    monkeypatch.setattr(decode_rows, "fetch", lambda *args: None)
    config = HoloConfig(**SMALL, num_hidden_layers=2, precision=MIXED)
    form, rows = Form(stacked=True, programs=132), 4

    def token(ids: jax.Array) -> jax.Array:
        model = decoding_form(build(config))
        state = loop_state(config, init_state(config, rows), form)
        fixed, moving = split_held(state.layers, 16, mail=room_for_mail(config, form, rows))
        state, active = state._replace(layers=moving), jnp.ones((rows,), bool)
        return step(model, ids, fixed, state, jnp.int32(3), active, None, form, pack(model, form))[0]

    jax.eval_shape(token, jax.ShapeDtypeStruct((rows,), jnp.int32))
    assert set(events) == {"waits", "reads"}
    assert events[0] == "waits"


def found_by(config: HoloConfig, form: Form, rows: int, steps: int, groups: int = 1) -> list[np.ndarray]:
    """Logits and pending writes of groups of tokens.

    Of each the first or second row reads all tokens but one; positions differ.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (rows, 5 + groups * steps)).astype(np.int32)
    prompts = [row[: 3 + n % 3] for n, row in enumerate(ids)]
    model = decoding_form(build(config))
    start = prefill(model, prompts)
    active = np.ones((steps, rows), bool)
    active[1, min(1, rows - 1)] = False

    @jax.jit
    def run(model, packed, state):
        def one(carry, given, fixed):
            logits, carry = step(model, given[1], fixed, carry, given[0], given[2], None, form, packed)
            return carry, logits

        found, used, mail = [], None, room_for_mail(config, form, rows)
        for group in range(groups):
            fixed, moving = split_held(state.layers, steps, used, mail)
            own = ids[:, 5 + group * steps :][:, :steps].T
            given = (jnp.arange(steps, dtype=jnp.int32), jnp.asarray(own), jnp.asarray(active))
            after, logits = jax.lax.scan(partial(one, fixed=fixed), state._replace(layers=moving), given)
            pending = after.layers.pending if form.stacked else _stacked(after.layers)
            found.append(jnp.where(given[2][:, :, None], logits, 0.0))
            found.append(pending.phases[:, :, : 3 + steps])
            found += [x[:, :, :, :steps] for x in (pending.keys, pending.written)]
            used = reusable(after.layers, form, steps)
            read = given[2].sum(0, dtype=jnp.int32)
            state = after._replace(layers=join_held(fixed, after.layers, read, steps, form))
        return found

    with jax.default_matmul_precision("highest"):
        found = run(model, pack(model, form), loop_state(config, start.state, form))
    return [np.asarray(x, np.float64) for x in found]


def _stacked(layers):
    return jax.tree.map(lambda *x: jnp.stack(x), *(period[0] for period in layers))


def distances(config: HoloConfig, form: Form, rows: int, groups: int = 1) -> list[tuple[float, float]]:
    """From float32: of the portable form, and of ``form``."""
    exact, portable, own = (
        found_by(*how, rows, 3, groups)
        for how in ((config.replace(precision=FULL), Form()), (config, Form()), (config, form))
    )
    rms = lambda x, y: float(np.sqrt(np.mean((x - y) ** 2)))  # noqa: E731
    return [(rms(x, z), rms(y, z)) for x, y, z in zip(portable, own, exact, strict=True)]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its interpreter came with jax 0.11")
@pytest.mark.parametrize(
    ("rows", "groups", "changes"),
    [
        (1, 2, dict(num_hidden_layers=2)),
        (1, 1, dict(num_hidden_layers=1, erase=False, output_gate=False, retrieval_scale="sqrt_writes")),
        (3, 1, dict(num_hidden_layers=2)),
        (9, 1, dict(num_hidden_layers=1, erase=False, output_gate=False, retrieval_scale="sqrt_writes")),
    ],
    ids=["one-gated", "one-sum", "gated", "sum"],
)
def test_tokens_are_the_portable_forms(
    rows: int, groups: int, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the portable form's own distance from float32, which is what roundings may cost."""
    monkeypatch.setattr(decode_rows_plan, "PIECE", 1 << 17)  # one program copies all weights
    config = HoloConfig(**SMALL, precision=MIXED, **changes)
    form = Form(stacked=True, interpret=True)
    for portable, own in distances(config, form, rows, groups):
        assert own < 1.5 * portable + 1e-6


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its interpreter came with jax 0.11")
def test_a_block_leaves_logits_that_are_normed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its tokens they are not, and the next one is drawn all the same. One of two rows ends first."""
    monkeypatch.setattr(decode_rows_plan, "PIECE", 1 << 17)
    config = HoloConfig(**SMALL, precision=MIXED, num_hidden_layers=1)
    model = decoding_form(build(config))
    model.model.norm.weight[...] = jnp.linspace(0.5, 1.5, config.hidden_size)
    graphdef, params = nnx.split(model, nnx.Param)
    start = prefill(model, [[3, 1, 4], [2, 7]])
    inputs = DecodingInputs(
        Sampling().numbers, jnp.arange(2, dtype=jnp.uint32), jnp.full((4,), -1, jnp.int32), jnp.int32(64)
    )
    found = []
    for form in (Form(), Form(stacked=True, drawn=True, interpret=True)):
        begin = Decoding(start.logits, loop_state(config, start.state, form), jnp.asarray([3, 1]), None)
        how = dict(steps=3, plan=Sampling().plan, form=form)
        after, tokens, finite = decode_block(
            graphdef, params, jax.tree.map(jnp.copy, begin), inputs, pack(model, form), **how
        )
        assert finite
        found.append((np.asarray(after.logits), np.asarray(tokens)))
    (wanted, first), (own, second) = found
    np.testing.assert_array_equal(first, second)
    assert np.abs(own - wanted).max() < 0.02 * np.abs(wanted).max()


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(rows, dict(vocab_size=64, hidden_size=1024, hd_dim=1024)) for rows in (1, 2, 7, 16)]
    + [(rows, SMALL) for rows in (1, 9)],
    ids=["one", "two", "seven", "sixteen", "one-narrow", "nine-narrow"],
)
def test_all_programs_together_are_the_portable_form(rows: int, sizes: dict) -> None:
    """Compiled, at the width that it is for, and at one where programs have no head; the same bits again."""
    config = HoloConfig(**sizes, num_hidden_layers=5, precision=MIXED)
    programs = capability.multiprocessors()
    if reason := decode_rows_plan.unsupported(stack.shape_of(config, rows, 4, programs), jnp.bfloat16):
        pytest.skip(reason)
    form = Form(stacked=True, programs=programs)
    for portable, own in distances(config, form, rows, 2):
        assert own < 1.25 * portable + 1e-6
    for first, again in zip(*(found_by(config, form, rows, 3, 2) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(first, again)
