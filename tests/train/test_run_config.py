"""The run configuration: read strictly, written to JSON and back, compared field by field."""

import copy
import dataclasses
import json
import re
import typing

import pytest

from configs import base
from holo_jax.config import HoloConfig
from holo_jax.precision import Precision
from tests.train.common import micro_config
from train.errors import ConfigError, UsageError
from train.run_config import RunConfig, differences


def plain() -> dict:
    return micro_config().to_dict()


def changed(name: str, value: object) -> dict:
    values = plain()
    *sections, field = name.split(".")
    place = values
    for section in sections:
        place = place[section]
    place[field] = value
    return values


def test_json_round_trip() -> None:
    config = micro_config(data__num_threads=3)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_file_round_trip(tmp_path) -> None:
    micro_config().write(tmp_path)
    assert RunConfig.read(tmp_path) == micro_config()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_base_lists_exactly_the_fields() -> None:
    def compare(section, kind) -> None:
        names = {field.name for field in dataclasses.fields(kind)}
        assert {name for name in section if name != "preset"} == names, kind
        for name, hint in typing.get_type_hints(kind).items():
            if dataclasses.is_dataclass(hint):
                compare(section[name], hint)

    compare(base.get_config(), RunConfig)
    compare(base.model_section(), HoloConfig)
    compare(base.model_section().precision, Precision)


def test_model_fields_left_out_take_the_presets_values() -> None:
    values = base.get_config().to_dict()
    values["model"] |= {"preset": "dual", "hidden_size": 64, "hd_dim": 64}
    values["model"]["precision"] = {"storage": "float32"}
    model = RunConfig.from_dict(values).model
    assert model == HoloConfig.dual(hidden_size=64, hd_dim=64, precision=Precision(storage="float32"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_steps", 0, "num_steps is 0; it must be positive"),
        ("num_steps", 1.5, "num_steps is 1.5"),
        ("num_steps", True, "num_steps is True"),
        ("num_steps", "10", "num_steps is '10'"),
        ("name", "a/b", "name is 'a/b'; it must be a directory name"),
        ("name", "..", "it must be a directory name"),
        ("accumulation_steps", 3, "accumulation_steps is 3; it must be a divisor"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate is nan"),
        ("optimizer.learning_rate", float("inf"), "optimizer.learning_rate is inf"),
        ("optimizer.learning_rate", 10**400, "optimizer.learning_rate is 1000"),
        ("optimizer.b1", 1.0, "optimizer.b1 is 1.0; it must be in [0, 1)"),
        ("optimzer", {}, "optimzer is no field of the configuration; did you mean optimizer?"),
        ("optimizer.learning_rat", 1.0, "did you mean optimizer.learning_rate?"),
        ("model.hidden_sise", 8, "did you mean model.hidden_size?"),
        ("model.hidden_size", -1, "model.hidden_size is -1; it must be positive"),
        ("model.hidden_size", "wide", "model.hidden_size is 'wide'"),
        ("model.preset", "mamba", "preset is 'mamba'; it must be one of"),
        ("model.precision.storage", "int8", "precision.storage is 'int8'"),
        ("model", 3, "model is 3; it must hold fields"),
        ("mesh.fsdp", 0, "mesh.fsdp is 0"),
        ("mesh.data", -2, "mesh.data is -2"),
        ("mesh.transport", "post", "mesh.transport is 'post'; it must be collectives or copies"),
        ("data.source", "web", "data.source is 'web'; it must be one of"),
        ("data.paths", ["x"], "data.paths is"),
        ("data.weights", [1.0], "data.weights is"),
        ("checkpoint.keep_latest", 0, "checkpoint.keep_latest is 0"),
        ("log", [], "log is"),
    ],
)
def test_bad_values_are_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        RunConfig.from_dict(changed(name, value))


def test_missing_field_is_named() -> None:
    values = plain()
    del values["optimizer"]["b2"]
    with pytest.raises(ConfigError, match=r"optimizer\.b2 is missing"):
        RunConfig.from_dict(values)


def test_runs_from_before_a_field_was_there_are_read() -> None:
    values = plain()
    for name in ("transport", "reduce_dtype", "reshard_after_forward", "in_order"):
        del values["mesh"][name]
    assert RunConfig.from_dict(values) == RunConfig.from_dict(plain())


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"name": NaN}', "[" * 100000, "\x00"])
def test_unreadable_files_are_refused(tmp_path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError):
        RunConfig.read(tmp_path)


def test_a_huge_file_is_refused_unread(tmp_path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(UsageError, match="larger than"):
        RunConfig.read(tmp_path)


def test_missing_file_says_what_it_is(tmp_path) -> None:
    with pytest.raises(UsageError, match="no run directory"):
        RunConfig.read(tmp_path)


def test_differences_are_named_by_their_path() -> None:
    old = plain()
    new = copy.deepcopy(old)
    new["optimizer"]["learning_rate"] = 1.0
    new["model"]["precision"]["storage"] = "bfloat16"
    del new["seed"]
    assert differences(old, new) == {
        "optimizer.learning_rate": (0.01, 1.0),
        "model.precision.storage": ("float32", "bfloat16"),
        "seed": (0, None),
    }
    assert differences(old, old) == {}
