"""Some of the mutations that ``make faults`` makes many of, and the defects they have found."""

import pytest

from tests.faults import fuzz
from train.corpus.errors import ManifestError, TokenizerError
from train.corpus.manifest import read_manifest
from train.corpus.tokenizers import load_tokenizer
from train.decisions import DECISIONS_FILE, read_rollbacks
from train.errors import StorageError

DEEP = "[" * 100_000


def test_mutated_files_are_refused_with_typed_errors(tmp_path) -> None:
    assert fuzz.run(tmp_path, 240, seed=1, oversized=False) == []


def test_endless_nesting_and_wrong_marks_are_refused(tmp_path) -> None:
    (tmp_path / "manifest.json").write_text(DEEP)
    with pytest.raises(ManifestError, match="is damaged"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "checksum": "", "text": "\\ud800"}')
    with pytest.raises(ManifestError, match="does not match its checksum"):
        read_manifest(tmp_path)
    (tmp_path / "marks.json").write_text(DEEP)
    with pytest.raises(TokenizerError, match="is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "marks.json").write_text('{"kind": "tokenizers", "bos": ["<s>"]}')
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
    )
    with pytest.raises(TokenizerError, match=r"bos token \['<s>'\] is not in the vocabulary"):
        load_tokenizer(tmp_path)


def test_an_oversized_record_of_decisions_is_refused_unread(tmp_path) -> None:
    with open(tmp_path / DECISIONS_FILE, "wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(StorageError, match="larger than"):
        read_rollbacks(tmp_path)
