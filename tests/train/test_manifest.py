"""The hash manifest: every kind of damage is found and named, single-bit flips included."""

import random

import pytest

from train.manifest import MANIFEST_FILE, DamageError, read_manifest, verify, write_manifest


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "7"
    (directory / "state" / "d").mkdir(parents=True)
    (directory / "state" / "d" / "data").write_bytes(random.Random(0).randbytes(40))
    (directory / "state" / "_METADATA").write_text('{"a": 1}')
    (directory / "empty").write_bytes(b"")
    write_manifest(directory, {"step": 7, "metric": 1.5})
    return directory


def damage(directory) -> str:
    with pytest.raises(DamageError) as caught:
        verify(directory)
    return caught.value.kind


def test_an_intact_checkpoint_verifies(checkpoint) -> None:
    assert verify(checkpoint) == {"step": 7, "metric": 1.5}
    assert sorted(read_manifest(checkpoint)[1]) == ["empty", "state/_METADATA", "state/d/data"]


def test_a_flip_in_any_byte_is_found(checkpoint) -> None:
    chooser = random.Random(0)
    for path in [p for p in checkpoint.rglob("*") if p.is_file()]:
        data = path.read_bytes()
        for bit in [8 * byte + chooser.randrange(8) for byte in range(len(data))]:
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            assert damage(checkpoint) in ("hash", "manifest"), (path.name, bit)
        path.write_bytes(data)
    verify(checkpoint)


def test_other_damage_is_named(checkpoint) -> None:
    data = checkpoint / "state" / "d" / "data"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    assert damage(checkpoint) == "size"
    data.write_bytes(b"")
    assert damage(checkpoint) == "size"
    data.unlink()
    assert damage(checkpoint) == "missing-file"
    data.symlink_to("/nowhere")
    assert damage(checkpoint) == "unreadable"
    data.unlink()
    data.write_bytes(content)
    (checkpoint / "state" / "more").write_bytes(b"")
    assert damage(checkpoint) == "surplus-file"


def test_a_checkpoint_without_manifest_is_uncommitted(checkpoint, tmp_path) -> None:
    (checkpoint / MANIFEST_FILE).unlink()
    assert damage(checkpoint) == "uncommitted"
    (tmp_path / "8").mkdir()
    assert damage(tmp_path / "8") == "empty"


def test_a_manifest_cut_at_any_byte_is_found(checkpoint) -> None:
    path = checkpoint / MANIFEST_FILE
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        assert damage(checkpoint) == "manifest"


def test_a_write_that_fails_leaves_no_manifest(checkpoint, monkeypatch) -> None:
    def full(descriptor) -> None:
        raise OSError(28, "No space left on device")

    (checkpoint / MANIFEST_FILE).unlink()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(checkpoint, {"step": 7, "metric": None})
    assert damage(checkpoint) == "uncommitted"
