"""What the data of a run is: recorded in its config.json, and compared in words when it is resumed."""

import json
from pathlib import Path

import pytest

from tests.train.common import micro_config
from tests.train.corpora import entries, slimpajama, write_zst
from train import prepare
from train.corpus.files import sha256_bytes
from train.errors import ResumeError, UsageError
from train.inputs import open_inputs
from train.resume import check_identity
from train.run_config import RunConfig


def prepared(root: Path, change: str = "", *more: str) -> Path:
    """A tiny prepared corpus; ``change`` adds a document to a training file."""
    slimpajama(root / "corpus")
    if change:
        path = root / "corpus" / "train" / "chunk1" / "example_train_1.jsonl.zst"
        write_zst(path, [*entries(12, 1), {"text": change, "meta": {"redpajama_set_name": "RedPajamaC4"}}])
    options = [f"--source={root / 'corpus'}", f"--out={root / 'out'}", "--context-length=16", "--workers=1"]
    assert prepare.main([*options, "--tokenizer=bytes", *more]) == 0
    return root / "out"


def config_of(*paths: Path, **more) -> RunConfig:
    paths = tuple(str(path) for path in paths)
    return micro_config(data__source="prepared", data__paths=paths, model__vocab_size=300, **more)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("first"))


def differences(workdir: Path, config: RunConfig, accept=()) -> dict[str, str]:
    """The refused fields of data, by name."""
    with pytest.raises(ResumeError) as caught:
        check_identity(workdir, config, open_inputs(config).identity, accept)
    text = str(caught.value).split("of another configuration: ")[1].split(". Use another")[0]
    return dict(line.split(": ", 1) for line in text.split("; "))


def test_config_json_records_the_manifest(first: Path, tmp_path: Path) -> None:
    config = config_of(first)
    config.write(tmp_path, open_inputs(config).identity)
    manifest = json.loads((first / "manifest.json").read_text())
    data = json.loads((tmp_path / "config.json").read_text())["data"]
    train = data["identity"]["train"]
    assert data["paths"] == [str(first)]
    assert train["manifest_sha256"] == sha256_bytes((first / "manifest.json").read_bytes())
    assert (train["documents"], train["split"], train["shards"]["count"]) == (36, "train", 3)
    assert train["tokens"] == sum(train["subsets"].values()) == manifest["splits"]["train"]["tokens"]
    assert data["identity"]["heldout"]["split"] == "validation"
    assert data["identity"]["tokenizer"]["sha256"] == manifest["tokenizer"]["sha256"]
    assert check_identity(tmp_path, config, open_inputs(config).identity) == []
    assert RunConfig.read(tmp_path) == config


def test_other_data_is_told_field_by_field(first: Path, tmp_path: Path) -> None:
    config = config_of(first)
    config.write(tmp_path, open_inputs(config).identity)
    other = config_of(prepared(tmp_path / "other", "one more document"))
    found = differences(tmp_path, other, ["data.paths"])
    tokens = json.loads((tmp_path / "config.json").read_text())["data"]["identity"]["train"]["tokens"]
    assert found["data.identity.train.documents"] == "36 -> 37"
    assert found["data.identity.train.tokens"] == f"{tokens} -> {tokens + len('one more document')}"
    assert "data.identity.train.subsets.RedPajamaC4" in found
    assert "data.identity.train.subsets.RedPajamaBook" not in found
    for name in ("source_files.sha256", "shards.sha256", "manifest_sha256", "fingerprint"):
        assert f"data.identity.train.{name}" in found
    assert not any(
        name.startswith(("data.identity.tokenizer", "data.identity.heldout.doc")) for name in found
    )
    accepted = check_identity(tmp_path, other, open_inputs(other).identity, ["data"])
    assert "data.identity.train.documents: 36 -> 37" in accepted


def test_tokenizer_length_and_weights_are_told(first: Path, tmp_path: Path) -> None:
    config = config_of(first)
    config.write(tmp_path, open_inputs(config).identity)
    tokenized = config_of(prepared(tmp_path / "bpe", "", "--tokenizer=train:300"))
    found = differences(tmp_path, tokenized)
    assert found["data.identity.tokenizer.kind"] == '"bytes" -> "tokenizers"'
    assert found["data.identity.tokenizer.vocab_size"] == "258 -> 300"
    assert {"data.paths", "data.identity.train.tokenizer_sha256", "data.identity.train.tokens"} <= set(found)
    longer = config_of(first, context_length=32)
    assert (
        differences(tmp_path, longer, ["context_length"])["data.identity.train.context_length"] == "16 -> 32"
    )

    mixed = config_of(first, first, data__weights=(1.0, 3.0))
    mixed.write(tmp_path, open_inputs(mixed).identity)
    assert check_identity(tmp_path, mixed, open_inputs(mixed).identity) == []
    weighed = config_of(first, first, data__weights=(1.0, 2.0))
    found = differences(tmp_path, weighed)
    assert found["data.identity.train.weights"] == "[1.0, 3.0] -> [1.0, 2.0]"


def test_moved_data_is_the_same_data(first: Path, tmp_path: Path) -> None:
    config = config_of(first)
    config.write(tmp_path, open_inputs(config).identity)
    moved = config_of(first.rename(first.with_name("moved")))
    try:
        assert differences(tmp_path, moved).keys() == {"data.paths"}
    finally:
        first.with_name("moved").rename(first)


def test_only_fields_can_be_accepted(first: Path, tmp_path: Path) -> None:
    config = config_of(first)
    with pytest.raises(UsageError, match=r"data\.identity\.trian cannot be accepted"):
        check_identity(tmp_path, config, open_inputs(config).identity, ["data.identity.trian"])
