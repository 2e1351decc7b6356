"""Prepared directories are read back exactly, and nothing damaged is trained on."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.train.corpora import entries, slimpajama, write_jsonl
from train import prepare
from train.corpus import verify
from train.corpus.dataset import Dataset, Mixture
from train.corpus.errors import DataError, ManifestError, ShardError
from train.corpus.prepared import PreparedDataset
from train.corpus.verify import STAMP_FILE
from train.data import open_prepared, python_source

LENGTH = 64
TRAIN = [entry for number in range(3) for entry in entries(12, number)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    command = [f"--source={slimpajama(root / 'corpus')}", f"--out={root / 'out'}", "--tokenizer=bytes"]
    assert prepare.main([*command, f"--context-length={LENGTH}", "--workers=1"]) == 0
    return root / "out"


@pytest.fixture
def data(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, and a cache directory of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(made, tmp_path / "data"))


def text_tokens(entry: dict) -> list[int]:
    return [256, *entry["text"].encode(), 257]


def test_it_is_a_dataset(data: Path) -> None:
    dataset = PreparedDataset(data)
    assert isinstance(dataset, Dataset)
    assert (dataset.vocab_size, dataset.context_length) == (258, LENGTH)
    assert dataset.subsets == ["RedPajamaBook", "RedPajamaC4"]
    assert dataset.tokenizer.encode("a") == [97]
    assert len({PreparedDataset(data, split).fingerprint for split in ("train", "validation")}) == 2
    assert dataset.fingerprint == PreparedDataset(data).fingerprint


@pytest.mark.parametrize("length", [LENGTH, 32, 2, 3 * LENGTH])
def test_records_hold_every_token_once(data: Path, length: int) -> None:
    dataset = PreparedDataset(data, context_length=length, subset_ids=True)
    stream: list[int] = []
    for index in range(len(dataset)):
        record = dataset[index]
        assert {name: (value.shape, value.dtype) for name, value in record.items()} == dict.fromkeys(
            ("tokens", "segment_ids", "positions", "subset_ids"), ((length,), np.dtype(np.int32))
        )
        real = record["segment_ids"] > 0
        assert real.any()
        assert not real[np.argmin(real) :].any() or real.all()
        new = np.diff(record["segment_ids"], prepend=0) != 0
        assert (record["positions"][new & real] == 0).all()
        assert (np.diff(record["positions"])[~new[1:] & real[1:]] == 1).all()
        assert (record["tokens"][new & real][1:] == 256).all()
        assert ((record["subset_ids"] > 0) == real).all()
        stream += record["tokens"][real].tolist()
    assert stream == [token for entry in TRAIN for token in text_tokens(entry)]


def test_subset_of_every_token(data: Path) -> None:
    dataset = PreparedDataset(data, subset_ids=True)
    found = np.concatenate(
        [r["subset_ids"][r["segment_ids"] > 0] for r in map(dataset.__getitem__, range(len(dataset)))]
    )
    wanted = [
        dataset.subsets.index(entry["meta"]["redpajama_set_name"]) + 1
        for entry in TRAIN
        for _ in text_tokens(entry)
    ]
    assert found.tolist() == wanted


def test_whole_documents_come_back(data: Path) -> None:
    dataset = PreparedDataset(data)
    found = list(dataset.documents())
    assert [document.tokens.tolist() for document in found] == [text_tokens(entry) for entry in TRAIN]
    assert [d.subset for d in found] == [entry["meta"]["redpajama_set_name"] for entry in TRAIN]
    assert [d.text_bytes for d in found] == [len(entry["text"].encode()) for entry in TRAIN]
    assert len({document.name for document in found}) == len(found)
    assert found[0].name == "train/chunk1/example_train_0.jsonl.zst#0"
    longest = max(len(document.tokens) for document in found)
    assert longest > 3 * LENGTH
    assert all(len(d.tokens) >= 200 for d in dataset.documents(min_tokens=200))
    heldout = [document.tokens.tolist() for document in dataset.documents("heldout")]
    assert heldout == [text_tokens(entry) for entry in entries(12, 100)]
    assert heldout == [
        document.tokens.tolist() for document in PreparedDataset(data, "validation").documents()
    ]


def test_a_document_much_longer_than_the_context(tmp_path: Path) -> None:
    text = "".join(chr(97 + k % 26) for k in range(20_000))
    write_jsonl(tmp_path / "validation.jsonl", [{"text": "short"}, {"text": text}, {"text": "end"}])
    command = [f"--source={tmp_path / 'validation.jsonl'}", "--tokenizer=bytes", "--workers=1"]
    assert prepare.main([*command, "--context-length=4096", f"--out={tmp_path / 'out'}"]) == 0
    dataset = PreparedDataset(tmp_path / "out", "heldout")
    assert [len(dataset), dataset.split] == [5, "validation"]
    (document,) = dataset.documents(min_tokens=16_384)
    assert dataset.tokenizer.decode(document.tokens.tolist()) == text


@pytest.mark.parametrize("length", [2, 32, 128, 64 * LENGTH])
def test_any_fitting_length_is_as_if_prepared_for_it(
    data: Path, made: Path, tmp_path: Path, length: int
) -> None:
    command = [f"--source={made.parent / 'corpus'}", f"--out={tmp_path / 'out'}", "--tokenizer=bytes"]
    assert prepare.main([*command, f"--context-length={length}", "--workers=1"]) == 0
    wanted = PreparedDataset(tmp_path / "out", subset_ids=True)
    found = PreparedDataset(data, context_length=length, subset_ids=True)
    assert len(found) == len(wanted)
    for index in range(len(wanted)):
        record, other = found[index], wanted[index]
        assert all(np.array_equal(record[name], other[name]) for name in wanted[index])


@pytest.mark.parametrize("length", [0, 1, 3, 96])
def test_context_lengths_must_fit(data: Path, length: int) -> None:
    with pytest.raises(DataError, match=f"context_length is {length}; .* was prepared for {LENGTH}"):
        PreparedDataset(data, context_length=length)


def test_missing_directories_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"python -m train.prepare --source=hf:.* --out=.*nowhere"):
        PreparedDataset(tmp_path / "nowhere")
    (tmp_path / "begun" / ".partial").mkdir(parents=True)
    with pytest.raises(ManifestError, match="was started but not finished"):
        PreparedDataset(tmp_path / "begun")


def test_unknown_splits_and_records(data: Path) -> None:
    with pytest.raises(DataError, match="has no split 'test' but train, validation"):
        PreparedDataset(data, "test")
    dataset = PreparedDataset(data)
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError, match=f"record {index} of {len(dataset)}"):
            dataset[index]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    other = path.with_name("train-00001-of-00003.arrayrecord")
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip, "is damaged or swapped"), (swap, "is damaged or swapped"), (Path.unlink, "is missing")],
)
@pytest.mark.parametrize("stamped", [False, True])
def test_damage_is_refused_by_name(data: Path, damage, message: str, stamped: bool) -> None:
    if stamped:
        PreparedDataset(data)
    shard = data / "train-00000-of-00003.arrayrecord"
    damage(shard)
    with pytest.raises(ShardError, match=f"{shard} {message}"):
        PreparedDataset(data)


def test_a_shortened_shard_is_refused_without_hashing(data: Path) -> None:
    shard = data / "train-00002-of-00003.arrayrecord"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ShardError, match=f"{shard} has .* bytes; the manifest says"):
        PreparedDataset(data)


def test_a_changed_manifest_is_refused(data: Path) -> None:
    path = data / "manifest.json"
    path.write_text(path.read_text().replace("RedPajamaC4", "RedPajamaC5"))
    with pytest.raises(ManifestError, match="does not match its checksum"):
        PreparedDataset(data)
    path.write_text("{")
    with pytest.raises(ManifestError, match="is damaged"):
        PreparedDataset(data)
    path.write_text('{"format": 99}')
    with pytest.raises(ManifestError, match="has format 99; this version reads format 1"):
        PreparedDataset(data)


def test_damage_after_the_check_is_refused_when_read(data: Path) -> None:
    dataset = PreparedDataset(data)
    shard = data / "train-00000-of-00003.arrayrecord"
    content = bytearray(shard.read_bytes())
    place = content.index(TRAIN[0]["text"][:4].encode("utf-16-le"))
    content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ShardError, match=f"{shard}: records 0 to 0 cannot be read"):
        dataset[0]


def count_hashing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    hashed: list[str] = []
    original = verify.sha256_file
    monkeypatch.setattr(
        verify, "sha256_file", lambda path, *rest: hashed.append(path.name) or original(path, *rest)
    )
    return hashed


def test_the_second_start_hashes_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = count_hashing(monkeypatch)
    PreparedDataset(data)
    assert len(hashed) == 4  # three shards and the tokenizer's marks
    PreparedDataset(data)
    assert len(hashed) == 4
    PreparedDataset(data, "validation")
    assert hashed[4:] == ["validation-00000-of-00001.arrayrecord"]
    shard = data / "train-00001-of-00003.arrayrecord"
    os.utime(shard, ns=(0, 0))
    PreparedDataset(data)
    assert hashed[5:] == [shard.name]
    (data / STAMP_FILE).write_text("not JSON")
    PreparedDataset(data)
    assert len(hashed) == 10


def test_a_read_only_directory_is_remembered_elsewhere(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write = verify.write_atomically

    def refuse(path: Path, content: bytes) -> None:
        if path.parent == data:
            raise PermissionError(path)
        write(path, content)

    monkeypatch.setattr(verify, "write_atomically", refuse)
    hashed = count_hashing(monkeypatch)
    PreparedDataset(data)
    error = capsys.readouterr().err
    assert f"{data} is read-only" in error
    assert str(tmp_path / "cache") in error
    assert not (data / STAMP_FILE).exists()
    PreparedDataset(data)
    assert len(hashed) == 4


def test_pickled_without_open_files(data: Path) -> None:
    dataset = PreparedDataset(data)
    first = dataset[0]
    again = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(again[0]["tokens"], first["tokens"])


def test_more_shards_than_open_files(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.corpus import prepared

    wanted = [PreparedDataset(data)[index]["tokens"] for index in range(len(PreparedDataset(data)))]
    monkeypatch.setattr(prepared, "_OPEN_SHARDS", 1)
    dataset = PreparedDataset(data)
    for index in np.random.default_rng(0).permutation(len(dataset)):
        np.testing.assert_array_equal(dataset[int(index)]["tokens"], wanted[index])
    assert len(dataset._readers) == 1


def test_several_directories_are_a_mixture(data: Path, tmp_path: Path) -> None:
    assert isinstance(open_prepared([data]), PreparedDataset)
    mixture = open_prepared([data, data], weights=[3, 1], context_length=32)
    assert isinstance(mixture, Mixture)
    assert mixture.weights == (3, 1)
    assert mixture.context_length == 32
    for number in range(9):
        (tmp_path / f"file{number}.py").write_text("x = 1\n")
    write_jsonl(tmp_path / "train.jsonl", entries(30))
    command = [f"--source={tmp_path / 'train.jsonl'}", "--tokenizer=train:258", "--workers=1"]
    assert prepare.main([*command, f"--context-length={LENGTH}", f"--out={tmp_path / 'other'}"]) == 0
    with pytest.raises(DataError, match="were made with different tokenizers"):
        open_prepared([data, tmp_path / "other"])
    assert Mixture((PreparedDataset(data), python_source(LENGTH, root=tmp_path)), (1, 1)).vocab_size == 258
    with pytest.raises(DataError, match="no prepared directory"):
        open_prepared([])
