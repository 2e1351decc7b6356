"""Models, documents and their refusal: what every evaluation of a trained run opens."""

import numpy as np
import pytest

from eval import perplexity
from eval.common import load_config
from eval.opened import open_documents, open_model, take_by_subset
from eval.results import Results
from holo_jax.pretrained import PretrainedError
from tests.holo_jax.runs import write_run
from train.corpus.dataset import Document

RANDOM = load_config("perplexity", "quick").random_model.to_dict()


def test_an_untrained_model_is_reproducible():
    first, second = (open_model("random", RANDOM) for _ in range(2))
    assert first.tokenizer.kind == "bytes"
    assert first.name == "holo, untrained"
    np.testing.assert_array_equal(first.model.model.embedding[...], second.model.model.embedding[...])
    with pytest.raises(ValueError, match="the tokenizer has 258 ids; the model only 128"):
        open_model("random", {**RANDOM, "vocab_size": 128})


def test_documents_of_the_standard_library():
    documents, tokenizer, fingerprint = open_documents("python", "heldout", min_tokens=2000)
    first = next(documents)
    assert len(first.tokens) >= 2000
    assert tokenizer.decode_bytes(first.tokens[1:-1].tolist()) == first.raw
    assert len(fingerprint) == 64


def test_documents_are_taken_by_subset():
    def stream():
        for number in range(100):
            yield Document(np.zeros(2, np.int32), str(number), "ab"[number % 2], 1)
        raise AssertionError("read on after every subset was full")

    assert [d.name for d in take_by_subset(stream(), 2, subsets=("a", "b"))] == ["0", "1", "2", "3"]
    assert [d.name for d in take_by_subset(stream(), 1, subsets=("b",))] == ["1"]


@pytest.mark.slow
def test_a_trained_run_is_evaluated(tmp_path):
    run = tmp_path / "micro"
    write_run(run)
    assert open_model(str(run), {}).name == "micro, step 3"
    assert open_model(str(run / "checkpoints" / "3"), {}).name == "micro, step 3"
    out = tmp_path / "out"
    options = [
        f"--config.checkpoint={run}",
        "--config.documents=1",
        "--config.sliding_windows=()",
        "--config.stride=0",
    ]
    assert perplexity.main([f"--out={out}", "--config=configs/eval/perplexity.py:quick", *options]) == 0
    results = Results.read(out)
    assert {v.where["model"] for v in results.values} == {"micro, step 3"}
    assert len(results.select("bits_per_byte")) == 2
    assert results.settings["checkpoint"] == str(run)


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(PretrainedError, match="nowhere"):
        open_model(str(tmp_path / "nowhere"), {})


def test_refusals_are_one_line_and_exit_code_2(tmp_path, capsys):
    quick = "--config=configs/eval/perplexity.py:quick"
    missing = f"--config.checkpoint={tmp_path / 'nowhere'}"
    assert perplexity.main([f"--out={tmp_path / 'out'}", quick, missing]) == 2
    assert perplexity.main([f"--out={tmp_path / 'out'}", quick, "--config.data=/absent/data"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "nowhere" in lines[0]
    assert "/absent/data" in lines[1]
    assert not (tmp_path / "out").exists()
