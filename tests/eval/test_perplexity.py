"""Protocols by hand, losses against the model, the statistics, and the known answer of an untrained model."""

import math

import numpy as np
import pytest
from flax import nnx

from eval import perplexity, perplexity_view
from eval.common import Reporter, freeze, load_config
from eval.merge import merge
from eval.perplexity import losses_of, predicted_bytes, summarise
from eval.protocols import Reading, readings
from eval.token_losses import LossReader, read_all
from holo_jax import FULL, HoloConfig, HoloForCausalLM
from holo_jax.tokenizers import load_tokenizer
from train.corpus.dataset import Document

SMALL = dict(vocab_size=32, hidden_size=16, hd_dim=16, head_dim=8, num_hidden_layers=1, precision=FULL)


def test_readings_by_hand():
    assert list(readings("document", 7)) == [Reading(0, 7, 1)]
    assert list(readings("non_overlapping", 8, window=3)) == [
        Reading(0, 4, 1),
        Reading(3, 7, 4),
        Reading(6, 8, 7),
    ]
    assert list(readings("sliding", 9, window=4, stride=3)) == [
        Reading(0, 5, 1),
        Reading(3, 8, 5),
        Reading(4, 9, 8),
    ]
    assert list(readings("sliding", 4, window=8, stride=3)) == [Reading(0, 4, 1)]


@pytest.mark.parametrize("protocol", ["document", "non_overlapping", "sliding"])
@pytest.mark.parametrize("length", [2, 5, 16, 17, 40])
def test_every_protocol_predicts_every_target_once(protocol, length):
    counts = np.zeros(length, int)
    for start, end, counted in readings(protocol, length, window=8, stride=3):
        assert 0 <= start < counted < end <= length
        assert protocol == "document" or end - 1 - start <= 8
        if protocol == "sliding" and start > 0:
            assert counted - start >= 8 - 3 + 1
        counts[counted:end] += 1
    assert counts.tolist() == [0] + [1] * (length - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("backwards", 5), "protocol is 'backwards'"),
        (("document", 1), "length is 1"),
        (("non_overlapping", 5), "window is 0"),
        (("sliding", 5, 4, 5), "stride is 5"),
    ],
)
def test_readings_are_checked(arguments, message):
    name, length, *sizes = arguments
    with pytest.raises(ValueError, match=message):
        list(readings(name, length, **dict(zip(("window", "stride"), sizes, strict=False))))


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 32, n).astype(np.int32) for n in (9, 40, 2)]


@pytest.fixture(scope="module")
def streamed(texts):
    model = HoloForCausalLM(HoloConfig.seed(**SMALL), rngs=nnx.Rngs(0))
    reader = LossReader(model, rows=2, piece=16)
    return model, reader, read_all(reader, texts)


_forward = nnx.jit(lambda model, ids: model(ids).logits)


def logits_of(model, text: np.ndarray) -> np.ndarray:
    return np.asarray(_forward(model, text[None])[0, :-1])


def expected(model, text: np.ndarray) -> np.ndarray:
    """From the definition: logits of one pass, in float64."""
    logits = np.float64(logits_of(model, text))
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(text) - 1), text[1:]]


def test_streamed_losses_are_the_models_own(texts, streamed):
    model, _, found = streamed
    for text, scores in zip(texts, found, strict=True):
        np.testing.assert_allclose(scores.nats, expected(model, text), atol=2e-5)
        assert (scores.likeliest == (logits_of(model, text).argmax(-1) == text[1:])).all()


def test_windows_restart_the_context(texts, streamed):
    model, reader, whole = streamed
    text = texts[1]
    split = losses_of(reader, [text], dict(protocol="non_overlapping", window=16, stride=0))[0]
    np.testing.assert_allclose(split[:16], whole[1].nats[:16], atol=2e-5)
    np.testing.assert_allclose(split[16:32], expected(model, text[16:33]), atol=2e-5)
    assert np.abs(split[16:] - whole[1].nats[16:]).max() > 1e-3
    sliding = losses_of(reader, [text], dict(protocol="sliding", window=16, stride=10))[0]
    np.testing.assert_allclose(sliding[16:26], expected(model, text[10:27])[6:], atol=2e-5)


@pytest.mark.slow
def test_attention_reads_in_one_pass(texts):
    model = HoloForCausalLM(HoloConfig.attention(**SMALL), rngs=nnx.Rngs(0))
    reader = LossReader(model, rows=2, piece=16)
    assert reader.one_pass
    np.testing.assert_allclose(read_all(reader, texts[:1])[0].nats, expected(model, texts[0]), atol=2e-5)


def test_the_reader_refuses(streamed):
    _, reader, _ = streamed
    with pytest.raises(ValueError, match="3 texts were given"):
        reader.scores([np.zeros(4, np.int32)] * 3)
    with pytest.raises(ValueError, match="has 1 tokens"):
        reader.scores([np.zeros(1, np.int32)])


def settings(**changes):
    config = load_config("perplexity", "quick")
    config.update(changes)
    return freeze(perplexity.Settings, config)


def test_statistics_by_hand():
    chosen = settings(buckets=(0, 3, 10))
    losses = [np.array([1.0, 2.0, 3.0], np.float32), np.array([2.0], np.float32)]
    values = {
        (v.metric, v.where["bucket"]): v for v in summarise(losses, [4, 1], chosen, model="m", subset="all")
    }
    assert values["nats", "all"].value == pytest.approx(8 / 4)
    assert values["perplexity", "all"].value == pytest.approx(math.exp(2.0))
    assert values["bits_per_byte", "all"].value == pytest.approx(8 / 5 / math.log(2))
    # Targets stand at positions 1, 2, 3 and 1: positions 0-2 hold 1, 2 and 2; position 3 holds 3.
    assert values["nats", "0-3"].value == pytest.approx(5 / 3)
    assert values["nats", "3-10"].value == pytest.approx(3.0)
    assert values["nats", "0-3"].n == 2
    assert values["nats", "3-10"].n == 1


def test_two_checkpoints_share_a_table_and_a_plot():
    losses = [np.array([1.0, 2.0, 3.0], np.float32), np.array([2.0], np.float32)]
    runs = []
    for checkpoint, model in (("runs/a", "a, step 1"), ("runs/b", "b, step 2")):
        chosen = settings(buckets=(0, 3, 10), checkpoint=checkpoint)
        reporter = Reporter("perplexity", chosen, (0,), out=None, command=f"read {checkpoint}")
        for protocol in chosen.protocols:
            where = {**protocol, "model": model, "subset": "all"}
            reporter.add(*summarise([x * len(runs) for x in losses], [4, 1], chosen, **where))
        runs.append(reporter.results())
    joined = merge(runs)
    assert joined.settings["checkpoint"] == "runs/a, runs/b"
    text = perplexity_view.table(joined)
    assert "a, step 1: streamed from the beginning" in text and "b, step 2: streamed" in text
    assert "a, step 1" not in perplexity_view.table(runs[0])
    figure = perplexity_view.figures(joined, "light")["perplexity"]
    (axis,) = figure.axes
    assert len(axis.lines) == 2 * len(chosen.protocols)
    assert len({line.get_color() for line in axis.lines}) == 2
    assert len(axis.collections) == 2


def test_bytes_are_those_of_the_predicted_text():
    tokenizer = load_tokenizer("bytes")
    marked = Document(np.array([256, 104, 105, 257], np.int32), "a", "", 2)
    assert predicted_bytes(tokenizer, marked, marked.tokens) == 2
    assert predicted_bytes(tokenizer, marked, marked.tokens[:2]) == 1
    bare = Document(np.array([104, 105], np.int32), "a", "", 2)
    assert predicted_bytes(tokenizer, bare, bare.tokens) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(checkpoint=""), "checkpoint is empty"),
        (dict(buckets=(1, 2)), "borders from 0"),
        (dict(min_tokens=1), "min_tokens is 1"),
        (dict(stride=512), "must not exceed the sliding window"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)
