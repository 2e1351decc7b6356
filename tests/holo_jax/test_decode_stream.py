"""One kernel over all layers: its shares, its words, and a token in Pallas' interpreter by one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.config import HoloConfig
from holo_jax.generate import decoding_form, prefill, stack
from holo_jax.generate.decoding import loop_state
from holo_jax.generate.stepping import Form, pack, room_for_mail, split_held, step
from holo_jax.kernels import capability
from holo_jax.kernels.decode import mail as decode_mail
from holo_jax.kernels.decode import plan as decode_plan
from holo_jax.kernels.decode import shape as decode_shape
from holo_jax.precision import FULL, MIXED
from tests.holo_jax.models import build

SMALL = dict(vocab_size=64, hidden_size=256, hd_dim=256, head_dim=64, phasors=32, mlp_ratio=1.5)


def shape_of(programs: int = 132, **changes: object) -> decode_shape.Shape:
    config = HoloConfig(num_hidden_layers=12, hidden_size=1024, hd_dim=1024, precision=MIXED)
    return stack.shape_of(config, 1, 16, programs)._replace(**changes)


def test_words_hold_every_bfloat16_and_their_number() -> None:
    """All 65,536 patterns, infinities and what is not a number included."""
    x = jax.lax.bitcast_convert_type(jnp.arange(1 << 16, dtype=jnp.uint16), jnp.bfloat16)
    words = decode_mail.numbered(x, jnp.int32(0xFFFF))
    bits = lambda y: np.asarray(jax.lax.bitcast_convert_type(y, jnp.uint16))  # noqa: E731
    np.testing.assert_array_equal(bits(decode_mail.data(words)), bits(x))
    np.testing.assert_array_equal(np.asarray(words) & 0xFFFF, 0xFFFF)


def test_every_row_has_a_program_and_every_map_a_place() -> None:
    """At the size that the kernel is for: shares cover all rows, copies a share, heads the maps."""
    shape = shape_of()
    plan = decode_plan.plan(shape)
    for name in decode_plan.PRODUCTS:
        own, outputs = getattr(plan, name), decode_plan.outputs(shape, name)
        first = np.asarray(decode_plan.first(shape, name, np.arange(shape.programs)))
        assert set((first[:, None] + np.arange(own)).ravel()) == set(range(outputs))
        mine = [range(*decode_plan.stored(shape, name, program)) for program in range(shape.programs)]
        assert [row for rows in mine for row in rows] == list(range(outputs))
        copied = [(half, row + n) for half, row, rows in decode_plan.copies(shape, name) for n in range(rows)]
        assert copied == [(half, row) for half in range(1 + (name == "up")) for row in range(own)]
    rows = np.asarray(decode_plan.rows_by_head(shape)).reshape(shape.heads, plan.per_head)
    assert set(rows.ravel()) == set(range(shape.offsets["all"]))
    first = shape.offsets
    np.testing.assert_array_equal(rows[3, : shape.d], first["values"] + 3 * shape.d + np.arange(shape.d))
    phases = rows[3, shape.d : shape.d + shape.m]
    np.testing.assert_array_equal(phases, first["phases"] + 3 * shape.m + np.arange(shape.m))
    assert rows[3, 2 * shape.d + shape.m] == first["write"] + 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(rows=2), "the batch has 2 rows; it must have one"),
        (dict(m=64), "a head has 64 phasors and 64 channels; it must have 32 and 64"),
        (dict(hidden=256), "the product up has 256 rows; it must have at least 397"),
        (dict(hidden=2700), "the product down sums over 2700 columns; it must be a multiple of 256"),
        (dict(width=2048), "a program's weights of a layer take 425984 bytes; it can hold 232448"),
    ],
    ids=["rows", "phasors", "share", "columns", "memory"],
)
def test_what_it_refuses(changes: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reasons name the field, the value and the constraint."""
    for module in (decode_plan, decode_shape):
        monkeypatch.setattr(module, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert decode_plan.unsupported(shape_of(), jnp.bfloat16) is None
    assert decode_plan.unsupported(shape_of(**changes), jnp.bfloat16) == reason
    assert decode_plan.unsupported(shape_of(), jnp.float32) == "storage is float32; it must be bfloat16"
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "must be 0.11 or newer" in str(decode_plan.unsupported(shape_of(), jnp.bfloat16))


def distances(config: HoloConfig, form: Form) -> tuple[list[float], list[float]]:
    """Of logits and pending writes of three tokens from float32: of the portable form, and of ``form``."""
    ids = np.random.default_rng(0).integers(0, 64, (1, 7)).astype(np.int32)
    found = {}
    exact = config.replace(precision=FULL)
    for name, own, how in (("exact", exact, Form()), ("portable", config, Form()), ("stream", config, form)):
        model = decoding_form(build(own))
        start = prefill(model, ids[:, :4])
        state = loop_state(own, start.state, how)

        @jax.jit
        def run(model, packed, state, own=own, how=how):
            fixed, moving = split_held(state.layers, 4, mail=room_for_mail(own, how, 1))

            def one(carry, given):
                active = jnp.ones((1,), bool)
                logits, carry = step(model, given[1], fixed, carry, given[0], active, None, how, packed)
                return carry, logits

            given = (jnp.arange(3, dtype=jnp.int32), jnp.asarray(ids[:, 4:].T))
            after, logits = jax.lax.scan(one, state._replace(layers=moving), given)
            layers = after.layers
            pending = layers.pending if how.stacked else _stacked(layers)
            return logits, pending.phases[:, :, :6], pending.keys[:, :, :, :3], pending.written[:, :, :, :3]

        with jax.default_matmul_precision("highest"):
            found[name] = [np.asarray(x, np.float64) for x in run(model, pack(model, how), state)]
    off = {
        name: [
            float(np.sqrt(np.mean((x - y) ** 2))) for x, y in zip(found[name], found["exact"], strict=True)
        ]
        for name in ("portable", "stream")
    }
    return off["portable"], off["stream"]


def _stacked(layers):
    return jax.tree.map(lambda *x: jnp.stack(x), *(period[0] for period in layers))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its interpreter came with jax 0.11")
@pytest.mark.parametrize(
    "changes",
    [
        dict(num_hidden_layers=2),
        dict(num_hidden_layers=1, erase=False, output_gate=False, retrieval_scale="sqrt_writes"),
    ],
    ids=["gated", "sum"],
)
def test_a_token_is_the_portable_forms(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the portable form's own distance from float32, which is what roundings may cost."""
    monkeypatch.setattr(decode_plan, "PIECE", 1 << 16)  # one program copies all weights
    portable, streamed = distances(
        HoloConfig(**SMALL, precision=MIXED, **changes), Form(stacked=True, interpret=True)
    )
    for of_portable, of_stream in zip(portable, streamed, strict=True):
        assert of_stream < 1.5 * of_portable + 1e-6


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_all_programs_together_are_the_portable_form() -> None:
    """Compiled, at the width that it is for."""
    config = HoloConfig(vocab_size=64, hidden_size=1024, hd_dim=1024, num_hidden_layers=3, precision=MIXED)
    programs = capability.multiprocessors()
    if reason := decode_plan.unsupported(stack.shape_of(config, 1, 4, programs), jnp.bfloat16):
        pytest.skip(reason)
    portable, streamed = distances(config, Form(stacked=True, programs=programs))
    for of_portable, of_stream in zip(portable, streamed, strict=True):
        assert of_stream < 1.25 * of_portable + 1e-6
