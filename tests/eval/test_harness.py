"""The lm-evaluation-harness adapter: likelihoods from the definition, no truncation, an offline run."""

import types

import jax
import numpy as np
import pytest
from flax import nnx

from eval import harness
from eval.common import freeze, load_config
from eval.opened import Opened
from eval.results import Results
from holo_jax import FULL, HoloConfig, HoloForCausalLM
from holo_jax.tokenizers import load_tokenizer

pytest.importorskip("lm_eval", reason="lm_eval is not installed; it comes with the [eval] extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # third-party imports warn

SMALL = dict(vocab_size=258, hidden_size=16, hd_dim=16, head_dim=8, num_hidden_layers=1, precision=FULL)


@pytest.fixture(scope="module")
def opened():
    model = HoloForCausalLM(HoloConfig.seed(**SMALL), rngs=nnx.Rngs(0))
    return Opened(model, load_tokenizer("bytes"), "small")


@pytest.fixture(scope="module")
def adapter(opened):
    from eval.lm import HoloLM

    return HoloLM(opened, max_length=40, rows=2, piece=16)


def request(*arguments):
    return types.SimpleNamespace(args=arguments)


_forward = nnx.jit(lambda model, ids: jax.nn.log_softmax(model(ids).logits))


def log_likelihood(opened, ids: list[int], count: int) -> tuple[float, bool]:
    """Of the last ``count`` ids, from the logits of one pass."""
    logits = np.asarray(_forward(opened.model, np.array([ids]))[0, :-1])
    chosen = [float(logits[i, ids[i + 1]]) for i in range(len(ids) - 1)][-count:]
    best = [int(logits[i].argmax()) == ids[i + 1] for i in range(len(ids) - 1)][-count:]
    return sum(chosen), all(best)


def test_loglikelihoods_are_those_of_the_definition(opened, adapter):
    pairs = [("abc", " de"), ("", "xy"), ("a b ", "c"), ("abc", "d")]
    found = adapter.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    expected = [
        log_likelihood(opened, [256, *b"abc de"], 3),
        log_likelihood(opened, [256, *b"xy"], 2),
        log_likelihood(opened, [256, *b"a b c"], 2),
        log_likelihood(opened, [256, *b"abcd"], 1),
    ]
    for (value, greedy), (right, best) in zip(found, expected, strict=True):
        assert value == pytest.approx(right, abs=1e-4)
        assert greedy == best


def test_rolling_reads_the_whole_text(opened, adapter):
    (value,) = adapter.loglikelihood_rolling([request("hello world")])
    assert value == pytest.approx(log_likelihood(opened, [256, *b"hello world"], 11)[0], abs=1e-4)


def test_generation_stops_before_the_string(adapter, opened):
    options = {"until": ["."], "max_gen_toks": 6, "do_sample": False}
    (text,) = adapter.generate_until([request("ab", {**options, "until": []})])
    assert len(text) >= 1
    stop = text[1] if len(text) > 1 else text[0]
    cuts = adapter.generate_until([request("ab", {**options, "until": [stop]}), request("ab", options)])
    assert cuts[0] == text[: text.index(stop)]
    assert cuts[1] == text.split(".")[0]


def test_nothing_is_truncated(adapter):
    from eval.lm import TruncationError

    with pytest.raises(TruncationError, match="has 54 tokens; the model may read 40"):
        adapter.loglikelihood([request("x" * 50, "abc")], disable_tqdm=True)
    with pytest.raises(TruncationError, match="loglikelihood_rolling"):
        adapter.loglikelihood_rolling([request("x" * 50)])
    with pytest.raises(TruncationError, match="has 259 tokens"):
        adapter.generate_until([request("ab", {"until": ["."]})])


def test_what_is_refused(adapter, opened):
    from eval.lm import HoloLM, cut

    with pytest.raises(ValueError, match="num_beams"):
        adapter.generate_until([request("ab", {"num_beams": 4})])
    with pytest.raises(ValueError, match="empty continuation"):
        adapter._loglikelihood_tokens([(None, [1], [])])
    bare = types.SimpleNamespace(bos_id=None, eos_id=None)
    with pytest.raises(ValueError, match="neither a begin nor an end mark"):
        HoloLM(Opened(opened.model, bare, "x"))
    assert cut("one. two\nthree", ["\n", "."]) == "one"
    assert cut("one", ["."]) == "one"
    assert cut("one", [""]) == "one"


@pytest.mark.slow
def test_an_offline_run_of_local_tasks(tmp_path):
    assert harness.main([f"--out={tmp_path}", "--config=configs/eval/harness.py:quick"]) == 0
    results = Results.read(tmp_path)
    assert 0 <= results.one("acc", task="capitals_choice").value <= 1
    assert results.one("acc", task="capitals_choice").n == 4
    bits = results.one("bits_per_byte", task="capitals_rolling").value
    assert bits == pytest.approx(np.log2(258), rel=0.02)
    assert results.one("exact_match", task="capitals_generate").value == 0.0


def test_settings_are_checked():
    config = load_config("harness", "full")
    with pytest.raises(ValueError, match="checkpoint is empty"):
        freeze(harness.Settings, config)
    config.update({"checkpoint": "random", "tasks": ()})
    with pytest.raises(ValueError, match="tasks is empty"):
        freeze(harness.Settings, config)
