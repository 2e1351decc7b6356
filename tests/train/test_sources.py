"""Which files are found, in which split and order; the hub's answers become clear errors."""

from pathlib import Path

import pytest
from huggingface_hub import errors as hub_errors

from tests.train.corpora import entries, slimpajama, write_jsonl, write_parquet
from train.corpus import hub
from train.corpus.errors import SourceError
from train.corpus.sources import find_sources, split_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train/chunk1/example_train_0.jsonl.zst", "train"),
        ("validation/chunk1/example_holdout_0.jsonl.zst", "validation"),
        ("test/chunk5/example_holdout_12.jsonl.zst", "test"),
        ("data/train-00003-of-00048-ab12.parquet", "train"),
        ("data/validation-00000-of-00001.parquet", "validation"),
        ("val.jsonl", "validation"),
        ("Train/part.jsonl", "train"),
        ("example_holdout_0.jsonl.zst", None),
        ("constraints/latest-trained.jsonl", None),
    ],
)
def test_split_of(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_a_directory_is_ordered_by_split_and_name(tmp_path: Path) -> None:
    slimpajama(tmp_path)
    (tmp_path / "train" / "README.md").write_text("no corpus")
    write_jsonl(tmp_path / ".cache" / "train" / "part.jsonl", entries(1))
    names = [(file.split, file.name) for file in find_sources(str(tmp_path))]
    assert names == [
        ("train", "train/chunk1/example_train_0.jsonl.zst"),
        ("train", "train/chunk1/example_train_1.jsonl.zst"),
        ("train", "train/chunk1/example_train_2.jsonl.zst"),
        ("validation", "validation/chunk1/example_holdout_0.jsonl.zst"),
    ]


def test_glob_and_file_and_wanted_splits(tmp_path: Path) -> None:
    slimpajama(tmp_path)
    found = find_sources(str(tmp_path / "*" / "chunk1" / "*_[01].jsonl.zst"))
    assert [file.name.split("/")[-1] for file in found] == [
        "example_train_0.jsonl.zst",
        "example_train_1.jsonl.zst",
        "example_holdout_0.jsonl.zst",
    ]
    assert found[0].name == "train/chunk1/example_train_0.jsonl.zst"
    single = tmp_path / "train" / "chunk1" / "example_train_1.jsonl.zst"
    assert [(f.split, f.name) for f in find_sources(str(single))] == [("train", single.name)]
    assert {f.split for f in find_sources(str(tmp_path), splits=["validation"])} == {"validation"}
    assert {f.split for f in find_sources(str(tmp_path), split="extra")} == {"extra"}


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, "is not there"),
        ("owner/name", {}, "hf:owner/name@COMMIT"),
        ("empty", {}, "has no .jsonl.zst, .jsonl, .parquet file"),
        ("empty/*.jsonl", {}, "has no"),
        ("plain", {}, "cannot tell the split of .*part.jsonl.*--split"),
        ("corpus", {"splits": ["test"]}, "asks for 'test', but .* has train, validation"),
        ("corpus", {"split": "a/b"}, "--split='a/b' must be a word"),
    ],
)
def test_refused_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, options: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_jsonl(tmp_path / "plain" / "part.jsonl", entries(1))
    slimpajama(tmp_path / "corpus", shards=1, count=1)
    with pytest.raises(SourceError, match=message):
        find_sources(source, **options)


@pytest.mark.parametrize("source", ["hf:name", "hf:owner/name", "hf:owner/name@main", f"hf:a/b/c@{COMMIT}"])
def test_only_pinned_datasets(source: str) -> None:
    with pytest.raises(SourceError, match="@COMMIT"):
        hub.parse(source)


def test_download_returns_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def fetch(name: str, **options: object) -> str:
        asked.update(options, name=name)
        for number in range(2):
            write_parquet(tmp_path / "data" / f"train-{number:05d}-of-00002-aa.parquet", entries(2))
        return str(tmp_path)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", fetch)
    assert hub.download(f"hf:owner/name@{COMMIT}", tmp_path / "cache") == tmp_path
    assert (asked["name"], asked["revision"], asked["repo_type"]) == ("owner/name", COMMIT, "dataset")
    (tmp_path / "data" / "train-00001-of-00002-aa.parquet").unlink()
    with pytest.raises(SourceError, match="1 of 2 files of 'data/train' are missing, first data/train-00001"):
        hub.check_complete(
            "hf:owner/name", [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.parquet")]
        )


def _raised(kind: type[Exception]) -> Exception:
    # These need a whole HTTP response; only their type matters here.
    error = kind.__new__(kind)
    Exception.__init__(error, "the hub says no")
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (hub_errors.LocalEntryNotFoundError, "be online.*hf download owner/name.*--source=DIR"),
        (hub_errors.OfflineModeIsEnabled, "be online.*--source=DIR"),
        (hub_errors.GatedRepoError, "is gated.*hf auth login.*--source=DIR"),
        (hub_errors.RevisionNotFoundError, f"has no commit {COMMIT}"),
        (hub_errors.RepositoryNotFoundError, "no dataset owner/name"),
        (ConnectionError, "be online"),
    ],
)
def test_hub_errors_name_the_way_out(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise _raised(kind)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(SourceError, match=message):
        hub.download(f"hf:owner/name@{COMMIT}")
