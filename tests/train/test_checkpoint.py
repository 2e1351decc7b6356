"""Checkpoints: exact on any mesh, never silently wrong, put aside with a reason, kept by the rules."""

import errno
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.train.common import micro_config
from train.checkpoint import CheckpointStore, describe_arrays, steps_to_keep
from train.errors import CheckpointError, ResumeError
from train.manifest import DamageError, verify
from train.sharding import make_mesh


def store(path, **fields) -> CheckpointStore:
    config = micro_config(**{f"checkpoint__{name}": value for name, value in fields.items()}).checkpoint
    return CheckpointStore(path / "checkpoints", config)


def shardings(devices: int):
    mesh = make_mesh(micro_config(mesh__data=1, mesh__fsdp=devices).mesh, jax.devices()[:devices])
    whole = NamedSharding(mesh, P())
    return {
        "w": NamedSharding(mesh, P("fsdp")),
        "count": whole,
        "rng": whole,
        "half": NamedSharding(mesh, P(None, "fsdp")),
    }


def state(devices: int = 1, seed: int = 0):
    generator = np.random.default_rng(seed)
    values = {
        "w": generator.standard_normal((16, 3)).astype(np.float32),
        "count": np.int32(seed),
        "rng": generator.integers(2**32, size=2, dtype=np.uint32),
        "half": generator.standard_normal((2, 8)).astype(jnp.bfloat16),
    }
    return jax.device_put(values, shardings(devices))


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def save(target: CheckpointStore, step: int, metric: float | None = None) -> None:
    target.save(step, state(seed=step), {"note": step}, metric)
    target.wait()


def restore(target: CheckpointStore, devices: int = 1):
    step = next(target.candidates())
    return target.restore(step, shapes(state()), shardings(devices))


def equal(a, b) -> bool:
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.devices(8)
def test_elastic_restore_is_bit_equal(tmp_path) -> None:
    target = store(tmp_path)
    target.save(1, state(8, seed=1), {"note": 1})
    target.wait()
    for number, devices in enumerate((4, 2, 1, 8), start=1):
        restored = restore(target, devices)
        assert restored.step == number and restored.meta["note"] == number
        assert equal(restored.state, state(seed=1))
        assert restored.state["w"].sharding == shardings(devices)["w"]
        target.save(number + 1, restored.state, {"note": number + 1})
        target.wait()
    target.close()


def test_another_dtype_shape_or_name_is_refused(tmp_path) -> None:
    target = store(tmp_path)
    save(target, 1)
    wanted = shapes(state())
    for change, message in [
        (
            {"w": jax.ShapeDtypeStruct((16, 3), jnp.bfloat16)},
            r"w: saved float32\[16, 3\], wanted bfloat16\[16, 3\]",
        ),
        (
            {"w": jax.ShapeDtypeStruct((16, 4), jnp.float32)},
            r"w: saved float32\[16, 3\], wanted float32\[16, 4\]",
        ),
        ({"v": jax.ShapeDtypeStruct((1,), jnp.float32)}, r"v: saved nothing, wanted float32\[1\]"),
    ]:
        with pytest.raises(ResumeError, match=message):
            target.restore(1, wanted | change, None)
    assert describe_arrays({"a": [jnp.zeros((2,), jnp.bfloat16)]}) == {"a.0": "bfloat16[2]"}
    target.close()


def test_bit_flips_are_never_loaded(tmp_path) -> None:
    target = store(tmp_path)
    save(target, 1)
    target.close()
    directory = tmp_path / "checkpoints" / "1"
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.stat().st_size]
    chooser = random.Random(0)
    for number in range(60):
        path = files[number % len(files)]
        data = bytearray(path.read_bytes())
        bit = chooser.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(DamageError):
            verify(directory)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
    verify(directory)


def truncate(directory) -> None:
    path = max((p for p in (directory / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])


def flip(directory) -> None:
    path = directory / "state" / "_METADATA"
    data = bytearray(path.read_bytes())
    data[5] ^= 4
    path.write_bytes(data)


def empty(directory) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def lose_manifest(directory) -> None:
    next(directory.glob("manifest*")).unlink()


def lose_item(directory) -> None:
    shutil.rmtree(directory / "meta")


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        (truncate, "size"),
        (flip, "hash"),
        (empty, "empty"),
        (lose_manifest, "uncommitted"),
        (lose_item, "missing-file"),
    ],
)
def test_a_bad_newest_step_is_put_aside_and_saving_goes_on(tmp_path, harm, kind: str) -> None:
    target = store(tmp_path)
    save(target, 1)
    save(target, 2)
    target.close()
    harm(tmp_path / "checkpoints" / "2")
    told = []
    target = CheckpointStore(tmp_path / "checkpoints", micro_config().checkpoint, told.append)
    restored = restore(target)
    assert restored.step == 1 and equal(restored.state, state(seed=1))
    assert [entry.path.name for entry in told] == [f"2.bad-{kind}"] and told[0].reason
    save(target, 2)
    assert target.steps() == [1, 2] and [p.name for p in target.quarantined()] == [f"2.bad-{kind}"]
    assert equal(restore(target).state, state(seed=2))
    # A second casualty of the same kind does not overwrite the first.
    harm(tmp_path / "checkpoints" / "2")
    assert restore(target).step == 1
    assert [p.name for p in target.quarantined()] == [f"2.bad-{kind}", f"2.bad-{kind}-2"]
    target.close()


def test_leftovers_of_a_kill_are_cleared(tmp_path) -> None:
    directory = tmp_path / "checkpoints"
    for name in ("5.orbax-checkpoint-tmp", "3.deleting"):
        (directory / name / "state").mkdir(parents=True)
    target = store(tmp_path)
    assert list(directory.iterdir()) == []
    target.close()


def test_a_background_failure_surfaces_and_harms_nothing(tmp_path, monkeypatch) -> None:
    target = store(tmp_path)
    save(target, 1)

    def full(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoint.write_manifest", full)
        target.save(2, state(seed=2), {})
        with pytest.raises(CheckpointError, match=r"checkpoint 2 could not be written: .*No space left"):
            target.wait()
    assert [path.name for path in target.directory.iterdir()] == ["1"]
    save(target, 2)
    assert restore(target).step == 2
    target.close()


def test_check_raises_once_a_failed_save_is_done(tmp_path, monkeypatch) -> None:
    target = store(tmp_path)
    monkeypatch.setattr("train.checkpoint.write_manifest", lambda *args: 1 / 0)
    target.save(1, state(), {})
    target._commit.exception()
    with pytest.raises(CheckpointError, match="division by zero"):
        target.check()
    target.close()


def test_retention_on_disk(tmp_path) -> None:
    target = store(tmp_path, keep_latest=2, keep_best=1, keep_every_steps=4)
    for step, metric in [(0, None), (1, 5.0), (2, 1.0), (3, 4.0), (4, None), (5, 3.0), (6, 2.0), (7, 2.0)]:
        save(target, step, metric)
    assert target.steps() == [2, 4, 6, 7]
    target.close()


def test_a_step_without_manifest_does_not_count_as_kept(tmp_path) -> None:
    target = store(tmp_path, keep_latest=1, keep_best=0)
    save(target, 1)
    target.close()
    target = store(tmp_path, keep_latest=1, keep_best=0)
    (target.directory / "2").mkdir()
    target._delete_old()
    assert target.steps() == [1, 2]
    target.close()


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (dict(keep_latest=1, keep_best=0, keep_every_steps=0), {50}),
        (dict(keep_latest=2, keep_best=0, keep_every_steps=0), {40, 50}),
        (dict(keep_latest=1, keep_best=1, keep_every_steps=0), {20, 50}),
        (dict(keep_latest=1, keep_best=2, keep_every_steps=0), {10, 20, 50}),
        (dict(keep_latest=1, keep_best=0, keep_every_steps=20), {20, 40, 50}),
    ],
)
def test_retention_rules(fields: dict, kept: set[int]) -> None:
    config = micro_config(**{f"checkpoint__{name}": value for name, value in fields.items()}).checkpoint
    committed = {0: None, 10: 2.0, 20: 1.0, 30: 3.0, 40: None, 50: None}
    assert steps_to_keep(committed, config) == kept


def test_an_unusable_directory_is_named(tmp_path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="checkpoints cannot be used"):
        store(tmp_path)
