"""Runs load to the parameters that were saved, or are refused in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from holo_jax import load_pretrained
from holo_jax.pretrained import PretrainedError
from holo_jax.tokenizers import ByteTokenizer
from tests.holo_jax.runs import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "micro"
    write_run(path, steps=(3, 12))
    return path


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "micro"))


def test_parameters_configuration_and_tokenizer_are_those_saved(tmp_path: Path) -> None:
    model = write_run(tmp_path / "run")
    loaded = load_pretrained(tmp_path / "run")
    assert loaded.step == 3 and loaded.config == model.config
    assert isinstance(loaded.tokenizer, ByteTokenizer)

    def same(ours: jax.Array, theirs: jax.Array) -> None:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)

    jax.tree.map(same, loaded.params, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    metadata = lambda m: jax.tree.map(  # noqa: E731
        lambda v: v.get_metadata()["axes"],
        nnx.state(m, nnx.Param),
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    assert nnx.to_pure_dict(metadata(loaded.model)) == nnx.to_pure_dict(metadata(model))
    ids = np.arange(8)[None]
    np.testing.assert_array_equal(loaded.model(ids).logits, model(ids).logits)


def test_checkpoints_are_chosen_by_step_or_path(run: Path) -> None:
    newest, older, by_path = (
        load_pretrained(run),
        load_pretrained(run, step=3),
        load_pretrained(run / "checkpoints" / "3"),
    )
    assert (newest.step, older.step, by_path.step) == (12, 3, 3)
    assert older.weights == by_path.weights != newest.weights
    same = jax.tree.map(lambda a, b: bool((a == b).all()), older.params, newest.params)
    assert not all(jax.tree.leaves(same))


def test_a_save_that_is_under_way_is_passed_over(copy: Path) -> None:
    (copy / "checkpoints" / "20" / "state").mkdir(parents=True)
    (copy / "checkpoints" / "30").mkdir()
    (copy / "checkpoints" / "15.bad-hash").mkdir()
    assert load_pretrained(copy).step == 12


def test_a_tokenizer_in_the_run_comes_first(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    settings["data"] = {"source": "prepared", "paths": ["/absent/data"]}
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        PretrainedError, match=r"the tokenizer of .* cannot be loaded: .*/absent/data.* is not there"
    ):
        load_pretrained(copy)
    assert load_pretrained(copy, tokenizer="bytes").tokenizer.kind == "bytes"
    (copy / "tokenizer").mkdir()
    (copy / "tokenizer" / "marks.json").write_text('{"kind": "bytes"}')
    assert load_pretrained(copy).tokenizer.kind == "bytes"
    settings["data"] = {"source": "random", "paths": []}
    shutil.rmtree(copy / "tokenizer")
    (copy / "config.json").write_text(json.dumps(settings))
    assert load_pretrained(copy).tokenizer is None


def damage(copy: Path, what: str) -> None:
    config, checkpoint = copy / "config.json", copy / "checkpoints" / "12"
    largest = max(
        (p for p in (checkpoint / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    if what == "flip":
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    elif what == "cut":
        largest.write_bytes(largest.read_bytes()[:-1])
    elif what == "manifest":
        (checkpoint / "manifest.sha256.json").write_text("{}")
    elif what == "checkpoints":
        shutil.rmtree(copy / "checkpoints")
    elif what == "config":
        config.unlink()
    elif what == "json":
        config.write_text("{")
    elif what == "list":
        config.write_text("[]")
    elif what == "section":
        config.write_text("{}")
    else:
        settings = json.loads(config.read_text())
        settings["model"] |= {"field": {"fields": 1}, "range": {"hd_dim": 12}, "shape": {"mlp_ratio": 8.0}}[
            what
        ]
        config.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "what,message",
    [
        ("flip", "checkpoints/12 is damaged: .* has changed"),
        ("cut", "checkpoints/12 is damaged: .* bytes; it was committed with"),
        ("manifest", "checkpoints/12 is damaged: manifest.sha256.json does not match"),
        ("checkpoints", "has no committed checkpoint"),
        ("config", "is no run directory: it has no config.json"),
        ("json", "config.json cannot be read"),
        ("list", "holds list; it must be an object"),
        ("section", "has no section model"),
        ("field", "model.fields is no field of HoloConfig"),
        ("range", "model.hd_dim is 12; it must be a multiple of head_dim"),
        ("shape", "holds other arrays than its configuration: .*mlp.* wanted float32"),
    ],
)
def test_unusable_runs_are_refused_in_one_line(copy: Path, what: str, message: str) -> None:
    damage(copy, what)
    with pytest.raises(PretrainedError, match=message) as caught:
        load_pretrained(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_missing_runs_and_steps_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match=r"run .*absent does not exist"):
        load_pretrained(tmp_path / "absent")
    with pytest.raises(PretrainedError, match="has no checkpoint of step 5; there are: 3, 12"):
        load_pretrained(run, step=5)
    with pytest.raises(PretrainedError, match="step is 12, but"):
        load_pretrained(run / "checkpoints" / "3", step=12)


def test_the_library_imports_without_what_only_training_needs() -> None:
    """orbax, the tokenizer libraries and the trainer are imported when they are used, if ever."""
    program = """
import sys
banned = ("orbax", "tokenizers", "sentencepiece", "train", "ml_collections", "grain")
for name in banned:
    sys.modules[name] = None
import holo_jax, holo_jax.generate
from holo_jax.tokenizers import load_tokenizer
assert load_tokenizer("bytes").encode("a") == [97]
from holo_jax.optional import require
try:
    require("orbax.checkpoint", "train")
except ImportError as error:
    assert "pip install 'holo-jax[train]'" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=Path(__file__).parents[2])
