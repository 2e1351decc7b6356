"""State files: exact round trips, every damage found, other models' states refused by name."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from holo_jax.generate import STATE_DTYPES, generate, prefill, take_rows
from holo_jax.generate.forms import split_state
from holo_jax.precision import MIXED
from holo_jax.state_io import StateDamagedError, StateError, StateMismatchError, load_state, save_state
from tests.holo_jax.models import variant, variant_config

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize("name,dtype", [*(("holo", dtype) for dtype in STATE_DTYPES), ("hybrid", "float32")])
def test_round_trip_is_exact(name: str, dtype: str, tmp_path: Path) -> None:
    model = variant(name, MIXED)  # the hybrid's cache is bfloat16
    reading = prefill(model, [PROMPT], piece_size=4, state_dtype=dtype, cache_length=64)
    path = tmp_path / "state"
    save_state(path, reading.state, model.config, logits=reading.logits)
    loaded = load_state(path, model.config)

    def same(ours: jax.Array, theirs: jax.Array) -> None:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)

    jax.tree.map(same, (loaded.state, loaded.logits), (reading.state, reading.logits))
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_a_document_is_read_saved_and_questioned(tmp_path: Path) -> None:
    model = variant("holo")
    options = dict(max_new_tokens=4, block_size=4, piece_size=4, seeds=[1, 2])
    save_state(tmp_path / "s", prefill(model, [PROMPT], piece_size=4).state, model.config)
    loaded = load_state(tmp_path / "s", model.config)
    assert loaded.logits is None
    answers = generate(model, [[7, 7, 7], [8]], state=take_rows(loaded.state, [0, 0]), **options)
    whole = generate(model, [[*PROMPT, 7, 7, 7], [*PROMPT, 8]], **options)
    assert answers.tokens == whole.tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "state"
    save_state(
        path, prefill(variant("seed"), [PROMPT], piece_size=4).state, variant("seed").config, weights="ab"
    )
    return path


def test_any_flipped_bit_and_any_cut_is_found(saved: Path, tmp_path: Path) -> None:
    data, config = saved.read_bytes(), variant("seed").config
    path = tmp_path / "damaged"
    rng = np.random.default_rng(0)
    for place in sorted({*range(0, len(data), 37), *rng.integers(0, len(data), 60).tolist()}):
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(StateDamagedError):
            load_state(path, config)
    for length in (0, 5, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(StateDamagedError):
            load_state(path, config)
    path.write_bytes(data + b"\0")
    with pytest.raises(StateDamagedError):
        load_state(path, config)


def test_other_files_are_refused(tmp_path: Path) -> None:
    config = variant("seed").config
    with pytest.raises(StateError, match="absent cannot be read: No such file"):
        load_state(tmp_path / "absent", config)
    path = tmp_path / "other"
    for metadata in (None, {"holo_jax": "no json"}, {"holo_jax": json.dumps({"format": "else"})}):
        path.write_bytes(safetensors.numpy.save({"a": np.zeros(3)}, metadata))
        with pytest.raises(StateDamagedError, match="is no state file"):
            load_state(path, config)
    about = {"holo_jax": json.dumps({"format": "holo-jax state"})}
    path.write_bytes(safetensors.numpy.save({"a": np.zeros(3)}, about))
    with pytest.raises(StateDamagedError, match="incomplete metadata"):
        load_state(path, config)


def test_states_of_other_models_are_refused_by_field(saved: Path) -> None:
    with pytest.raises(StateMismatchError, match="phasor_seed is 0 there and 3 here"):
        load_state(saved, variant_config("seed", phasor_seed=3))
    with pytest.raises(StateMismatchError, match=r"num_hidden_layers is 2 there and 4 here"):
        load_state(saved, variant_config("seed", num_hidden_layers=4))
    with pytest.raises(StateMismatchError, match=r"belongs to other weights \(ab\) than the model's \(cd\)"):
        load_state(saved, variant("seed").config, weights="cd")
    load_state(saved, variant("seed").config, weights="ab")
    load_state(saved, variant_config("seed", remat="full", chunk_size=4, loss_chunk=16), weights="ab")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    reading = prefill(variant("seed"), [PROMPT], piece_size=4)
    config = variant("seed").config
    with pytest.raises(ValueError, match="the state is not one of this configuration: state"):
        save_state(tmp_path / "s", reading.state, variant("holo").config)
    with pytest.raises(ValueError, match="split over periods"):
        save_state(tmp_path / "s", split_state(reading.state), config)
    with pytest.raises(ValueError, match=r"logits is float32\[1, 7\], expected float32\[1, 50\]"):
        save_state(tmp_path / "s", reading.state, config, logits=np.zeros((1, 7), np.float32))
    with pytest.raises(OSError):
        save_state(tmp_path / "absent" / "s", reading.state, config)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    state = load_state(saved, variant("seed").config).state

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_state(saved, state, variant("seed").config)
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == ["state"]
