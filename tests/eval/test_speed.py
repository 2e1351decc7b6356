"""The speed harness: variants, sizes, the gate that holds speeds back. ``eval.quick`` runs it whole."""

import dataclasses
import importlib.util
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import speed
from eval.common import Reporter, freeze, load_config
from eval.results import Results, exact
from eval.speed_parts import block_gate, gate, timing, train_step, turns
from eval.speed_parts.floors import Ceilings
from eval.speed_parts.models import TARGET_PRODUCTS, Size, model_config, parse_variant, product_parameters
from eval.speed_parts.peers import driver as peers
from eval.speed_parts.peers import tuning
from holo_jax import kernels

SMALL = Size(layers=2, width=64, vocab=128)
CEILINGS = Ceilings(bytes_per_second=3e12, flops_per_second=8e14)


def settings(**changes) -> speed.Settings:
    config = load_config("speed", "quick")
    config.update(changes)
    return freeze(speed.Settings, config)


@pytest.mark.parametrize("name", ["holo", "holo_sum", "attention", "ssm", "seed", "dual"])
def test_models_have_one_size_in_products(name):
    config = model_config(name, Size(12, 1024, 32_000))
    assert abs(product_parameters(config) / TARGET_PRODUCTS - 1) < 0.05


def test_product_parameters_by_hand():
    config = model_config("attention", SMALL)
    block = 4 * 64 * 64 + 3 * 64 * config.mlp_dim
    assert product_parameters(config) == 2 * block + 64 * 128


def test_variants_are_parsed_and_refused():
    variant = parse_variant("holo@2048 remat=full unroll=12 chunk=512")
    assert (variant.model, variant.length, variant.remat, variant.unroll, variant.chunk) == (
        "holo",
        2048,
        "full",
        12,
        512,
    )
    assert variant.batch(32_768) == 16 and parse_variant("holo@65536").batch(32_768) == 1
    shaped = parse_variant("holo_sum@2048 hd=256 head=128").config(SMALL)
    assert (shaped.hd_dim, shaped.head_dim, shaped.num_heads) == (256, 128, 2)
    for text, message in (
        ("holo", "must look like"),
        ("rwkv@64", "names the model 'rwkv'"),
        ("holo@64 rematerialise=full", "unknown key 'rematerialise'"),
        ("holo@64 model=seed", "unknown key 'model'"),
        ("holo@64 graph=on", "it must be auto or off"),
        ("holo@64 chunk=48", "it must divide the length"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_variant(text)


def test_shapes_have_one_size_in_products():
    for text in load_config("speed", "shapes").train:
        config = parse_variant(text).config(Size(12, 1024, 32_000))
        assert abs(product_parameters(config) / TARGET_PRODUCTS - 1) < 0.05, text


@pytest.mark.parametrize("variant", ["step", "shapes", "linear", "lengths", "alone"])
def test_every_variant_is_valid(variant):
    freeze(speed.Settings, load_config("speed", variant))


def test_every_model_is_timed_at_every_length():
    """The curves over length: each of our models, and a peer, from 2k to 256k tokens a row."""
    lengths = freeze(speed.Settings, load_config("speed", "lengths"))
    ours = [parse_variant(text) for text in (*lengths.train, *lengths.train_long)]
    found = {(one.model, one.length) for one in ours}
    models = ("holo", "holo_sum", "seed", "dual", "attention", "ssm")
    asked = {(model, length) for model in models for length in (2048, 16_384, 65_536, 262_144)}
    assert asked <= found
    assert {peers.parse_peer(text).length for text in lengths.peers} == {length for _, length in asked}


def test_every_full_setting_is_valid():
    full = freeze(speed.Settings, load_config("speed", "full"))
    assert set(full.profile) <= set(full.train)
    with pytest.raises(ValueError, match="parts names 'flops'"):
        dataclasses.replace(full, parts=("flops",))
    # One binding is enough where all models have it.
    outer = dict(parts=("train", "memory_op"), bindings=("outer",))
    dataclasses.replace(full, train=("holo@2048", "attention@2048"), train_long=(), **outer)
    with pytest.raises(ValueError, match="must hold 'hadamard' to time seed"):
        dataclasses.replace(full, train=("holo@2048", "seed@2048"), **outer)


def test_failures_are_named():
    assert timing.failure(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))[0] == "oom"
    assert timing.failure(ValueError("no\nmore")) == ("failed", "ValueError: no")
    with timing.Compiler(1, lambda _: None, held=True) as compiler:
        waiting = compiler.submit(timing.Job({}, lambda: jax.jit(jnp.sin).lower(1.0)))
        assert not waiting.done()
    assert waiting.cancelled() or "the run ended" in waiting.result().detail
    built = timing.compile_all([timing.Job({"a": 1}, lambda: 1 / 0)], 1, lambda _: None)[0]
    assert built.program is None and built.status == "failed" and "ZeroDivisionError" in built.detail


@pytest.mark.slow
def test_a_step_in_pieces_of_time_is_the_step():
    """The rematerialised pieces give the loss and the update of the whole sequence."""
    config = model_config("holo_sum", SMALL, precision=speed_precision())
    tokens = jax.random.randint(jax.random.key(0), (2, 64), 0, 128)
    results = []
    for chunk in (0, 16):
        init, step = train_step.make_step(config, 2, 64, chunk)
        (params, _), loss = jax.jit(step)(init(jax.random.key(1)), tokens)
        results.append((loss, params))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), results[0][1], results[1][1])
    # Adam's first step has size 3e-4 whatever the gradient; equal gradients give equal steps.
    assert np.median(jax.tree.leaves(moved)) < 1e-6


def speed_precision():
    from holo_jax.precision import FULL

    return FULL


@pytest.mark.slow
def test_a_wrong_kernel_gets_no_speeds(monkeypatch, tmp_path):
    """A backend that is off by 3% fails the gate, and nothing that could use it is timed."""
    right = kernels.accumulate

    def wrong(*args, **options):
        outputs, state = right(*args, **options)
        return outputs * 1.03, state

    monkeypatch.setattr(kernels, "accumulate", wrong)
    monkeypatch.setattr(gate, "cases", lambda binding, dtype: [gate.Case(binding, False, 5, False, dtype)])
    chosen = settings(train=("attention@64",), train_long=(), layers=1)
    reporter = Reporter("speed", chosen, (0,), out=tmp_path, command="test")
    speed.evaluate(chosen, reporter)
    usable = [backend.name for backend in kernels.available() if backend.usable]
    assert len(reporter.failed_controls) == len(usable) + 1  # the portable form has two bindings
    results = Results.read(tmp_path)
    assert results.select("relative_error") and not results.select("milliseconds")
    assert not results.select("tokens_per_second")


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_peers_without_pytorch_are_unavailable():
    reporter = Reporter("speed", settings(), (0,), out=None, command="test")
    with peers.started([peers.parse_peer("llama@2048")], SMALL, 4096) as others:
        turns.run(reporter, others, CEILINGS, samples=1, least_seconds=0.01)
    assert {v.status for v in reporter.values} == {"unavailable"}
    assert "torch is not installed" in reporter.values[0].detail
    for text in ("llama", "llama@0", "mamba@2048"):
        with pytest.raises(ValueError, match="it must look like llama@2048"):
            peers.parse_peer(text)


def test_rows_longer_than_a_step_warm_up_alone(tmp_path):
    locks = [tmp_path / "a", tmp_path / "b"]
    assert peers._held(locks, 3, longer=False) == locks[1:] and peers._held(locks, 2, longer=True) == locks


def test_answers_of_peers_become_values_and_curves(monkeypatch):
    """A peer that measures, one out of memory before its turn and one that dies, beside our step."""
    answers = {
        "llama": {
            "seconds": [0.1, 0.11],
            "compile_seconds": 1.0,
            "peak_bytes": 2**31,
            "product_parameters": 1000,
            "last_loss": 5.0,
            "torch": "2",
            "device": "test",
        },
        "seed": {"status": "oom", "detail": "CUDA out of memory"},
        "seed_eager": {},
        "llama_cudnn": {"status": "oom", "detail": "CUDA out of memory"},
    }
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    # Ready, then an answer a turn; out of memory before its turn; an end without a word; one in its turn.
    script = "import sys; print('ready', flush=True)\nfor line in sys.stdin: print(sys.argv[1], flush=True)"
    scripts = {"seed": "import sys; print(sys.argv[1])", "seed_eager": "raise SystemExit('boom')"}

    def start(request):
        answer, code = answers[request["model"]], scripts.get(request["model"], script)
        return peers.launch([sys.executable, "-c", code, json.dumps(answer)])

    monkeypatch.setattr(peers, "_start", start)
    reporter = Reporter("speed", settings(), (0,), out=None, command="test")
    asked = [peers.parse_peer(f"{name}@2048") for name in answers]
    with peers.started(asked, SMALL, 4096) as others:
        turns.run(reporter, others, CEILINGS, samples=3, least_seconds=0.01)
    ours = {"part": "train", **parse_variant("holo@2048").where}
    reporter.add(timing.median("tokens_per_second", [80_000.0], ours))
    reporter.add(exact("peak_gib", 1.0, **ours))
    results = reporter.results()
    rate = results.one("tokens_per_second", model="llama")
    assert rate.n == 4  # two turns of two
    assert rate.low <= 4096 / 0.11 + 1 and rate.high >= 4096 / 0.1 - 1
    # 6 operations a product parameter, and 6 t e a layer for the causal half of attention.
    share = results.one("share_of_product_rate", model="llama").value
    assert np.isclose(share, rate.value * (6000 + 6 * 2 * 2048 * 64) / CEILINGS.flops_per_second)
    for model in ("seed", "llama_cudnn"):
        assert results.one("tokens_per_second", model=model).status == "oom"
    assert results.one("milliseconds", model="seed_eager").detail == "boom"
    text = speed.table(results)
    assert "2.05x, 0.50x memory" in text and "OOM" in text and "neither runs out of memory" in text
    for theme in ("light", "dark"):
        assert set(speed.figures(results, theme)) == {"speed_throughput", "speed_training_memory"}


class Fake:
    """Something to time that writes down its turns; a long one is cut by a time limit."""

    def __init__(self, name, length, told):
        self.name, self.length, self.told = name, length, told

    def wait(self):
        self.told.append((self.name, "compiled"))

    def measure(self, samples, least_seconds, *, profiled=False):
        if self.length > 64:
            raise KeyboardInterrupt
        self.told.append((self.name, samples, profiled))

    def report(self, reporter, ceilings):
        reporter.add(exact("tokens_per_second", 1.0, part="train", model=self.name, length=self.length))


def test_what_was_timed_in_turns_outlives_the_run(tmp_path):
    """Those of one length take turns; a run that is cut keeps each that was reported before."""
    reporter, told = Reporter("speed", settings(), (0,), out=tmp_path, command="test"), []
    timed = [Fake("peer", 64, told), Fake("peer", 128, told), Fake("own", 64, told)]
    with pytest.raises(KeyboardInterrupt):
        turns.run(
            reporter,
            timed,
            CEILINGS,
            samples=5,
            least_seconds=0.01,
            profiled=lambda one: one.name == "own",
            save=reporter.save,
        )
    assert told[:3] == [("peer", "compiled"), ("peer", "compiled"), ("own", "compiled")]
    assert told[3:] == [("peer", 3, False), ("own", 3, False), ("peer", 3, False), ("own", 3, True)]
    kept = Results.read(tmp_path)
    assert [v.where["model"] for v in kept.values] == ["peer", "own"]
    assert any("unfinished" in note for note in kept.notes)


def test_inference_memory_is_drawn():
    values = []
    for model, context, size in (("holo", 0, 2**20), ("attention", 64, 2**18), ("attention", 256, 2**20)):
        where = {"part": "decoding", "model": model, "state_dtype": "float32", "batch": 1, "steps": 4}
        values.append(exact("state_bytes", size, context=context, **where))
    reporter = Reporter("speed", settings(), (0,), out=None, command="test")
    reporter.add(*values)
    assert set(speed.figures(reporter.results(), "light")) == {"speed_inference_memory"}


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("model", ["llama", "seed"])
def test_pytorch_peers_train(model):
    from eval.speed_parts.peers.torch_step import Training

    training = Training(model=model, compiled="none", length=32, batch=2, layers=2, width=64, vocab=128)
    found = training.measure(samples=1, seconds=0.01)
    ours = product_parameters(model_config({"llama": "attention"}.get(model, model), SMALL))
    assert abs(found["product_parameters"] / ours - 1) < 0.02 and 4 < found["last_loss"] < 6


class Candidate(types.SimpleNamespace):
    """Of Triton's autotuner, as far as ``tuning`` sees it."""

    def all_kwargs(self):
        return {"num_warps": self.num_warps}


def test_candidates_of_triton_compile_together(monkeypatch):
    began, modes = [], []

    class Mode:
        def __init__(self, executor, *, ignore_errors=False):
            assert ignore_errors  # one that does not compile is passed over when its turn comes
            executor.submit(int).result()

        def __enter__(self):
            modes.append(len(began))

        def __exit__(self, *error):
            modes.append(len(began))

    class Autotuner:
        configs = (Candidate(num_warps=1), Candidate(num_warps=2), Candidate(num_warps=4))
        fn = types.SimpleNamespace(warmup=lambda *args, **given: began.append((args, given)))

        def __init__(self):
            self.nargs = {"x": 3, "y": 5}

        def prune_configs(self, kwargs):
            return self.configs[1:]

    triton = types.ModuleType("triton")
    tuner = types.ModuleType("triton.runtime.autotuner")
    tuner.Autotuner = Autotuner
    for name in ("triton.runtime", "triton.runtime.autotuner"):
        monkeypatch.setitem(sys.modules, name, tuner)
    monkeypatch.setitem(sys.modules, "triton", triton)
    assert not tuning.compile_candidates_together()
    triton.AsyncCompileMode = Mode
    assert tuning.compile_candidates_together(workers=2)
    own = Autotuner()
    assert own.prune_configs({"grid": (7,), "warmup": False, "K": 64}) == own.configs[1:]
    assert began == [((3, 5), {"grid": (7,), "K": 64, "num_warps": n}) for n in (2, 4)]
    assert modes == [0, 2]


def test_denoiser_and_loss_are_gated(monkeypatch):
    """What runs here passes against float64; a denoiser that is off by 4% does not."""
    reporter = Reporter("speed", settings(), (0,), out=None, command="test")
    assert block_gate.run(reporter, seed=0)
    every = {v.where["case"] for v in reporter.values}
    assert every == set(block_gate.cases()) and {"denoiser", "loss"} <= every
    assert jax.default_backend() == "gpu" or every == {"denoiser", "loss"}
    right = block_gate.swiglu
    monkeypatch.setattr(block_gate, "swiglu", lambda *a: 1.04 * right(*a))
    reporter = Reporter("speed", settings(), (0,), out=None, command="test")
    assert not block_gate.run(reporter, seed=0) and len(reporter.failed_controls) == 1


@pytest.mark.slow
def test_inference_part_runs(monkeypatch):
    """Reading is replaced (a process of its own, tested with ``eval.inference``); decoding is measured."""
    monkeypatch.setattr(speed.reading, "run", lambda *arguments: None)
    chosen = settings(layers=1, vocab=64, samples=1)
    reporter = Reporter("speed", chosen, (0,), out=None, command="test")
    speed.inference(reporter, chosen, Size(chosen.layers, chosen.width, chosen.vocab), CEILINGS)
    assert reporter.results().one("tokens_per_second", part="decoding", model="holo").value > 0
