"""The end of a run on text: bits per byte against a plain computation, a sample, a directory to load."""

import functools
import gzip
import json
import math

import jax
import numpy as np
import pytest

from holo_jax import load_pretrained
from tests.train.common import Quiet, micro_config
from train.corpus.python_source import python_source, split_of
from train.loop import train

TEXT = "def add(left, right):\n    return left + right\n\n\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    names = [f"module{number}.py" for number in range(160)]
    for number, name in enumerate(names):
        (root / name).write_text(TEXT * (1 + number % 5) + f"x = {number}\n" * (number % 7))
    assert sum(split_of(name) == "heldout" for name in names) > 1
    workdir = tmp_path_factory.mktemp("run") / "run"
    config = micro_config(
        data__source="python",
        model__vocab_size=260,
        num_steps=4,
        context_length=32,
        eval__global_batch_size=2,
        eval__heldout_summary=True,
        eval__sample_tokens=12,
        eval__sample_prompt="def ",
    )
    display = Quiet()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.inputs.python_source", functools.partial(python_source, root=root))
        result = train(config, workdir, devices=jax.devices()[:1], display=display)
    return workdir, root, result.summary, display.messages


def test_bits_per_byte_is_the_code_length_of_every_heldout_byte(finished) -> None:
    workdir, root, summary, messages = finished
    model = load_pretrained(workdir).model
    read = jax.jit(lambda tokens: model(tokens[None]).logits[0])
    nats, size, raw = 0.0, 0, b""
    for document in python_source(32, "heldout", root=root).documents("heldout"):
        for begin in range(0, len(document.tokens) - 1, 31):
            window = np.asarray(document.tokens[begin : begin + 32])
            padded = np.pad(window, (0, 32 - len(window)))  # what follows a token cannot change it
            logits = np.asarray(read(padded), np.float64)
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            nats -= sum(logs[i, token] for i, token in enumerate(window[1:]))
        size, raw = size + document.text_bytes, raw + document.raw
    assert summary["heldout_bytes"] == size == len(raw)
    assert summary["heldout_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert summary["gzip_bits_per_byte"] == 8 * len(gzip.compress(raw, 9, mtime=0)) / size
    assert f"held out: {summary['heldout_bits_per_byte']:.3f} bits per byte (gzip -9: " in "\n".join(messages)


def test_the_summary_file_has_what_is_promised(finished) -> None:
    workdir, _, summary, _ = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    promised = {
        "heldout_bits_per_byte",
        "gzip_bits_per_byte",
        "xz_bits_per_byte",
        "tokens_per_second",
        "params",
    }
    assert promised <= summary.keys() and summary["tokens_per_second"] > 0


def test_a_sample_goes_on_from_the_prompt(finished) -> None:
    sample = next(text for text in finished[3] if text.startswith("sample:\n"))
    assert sample.startswith("sample:\ndef ") and len(sample) > len("sample:\ndef ")


def test_the_end_says_how_to_get_more_text(finished) -> None:
    commands = finished[3][-1]
    assert commands.startswith("next:\n")
    assert f"python -m eval.generate --run={finished[0]} --prompt 'def '" in commands


def test_the_run_directory_loads_as_a_model(finished) -> None:
    run = load_pretrained(finished[0])
    assert run.step == 4 and run.tokenizer.decode(run.tokenizer.encode("def f")) == "def f"
