"""The models of a comparison: names in a config file, each a preset of ``HoloConfig`` and its overrides."""

import dataclasses
import difflib
from collections.abc import Mapping

from holo_jax import HoloConfig
from holo_jax.precision import Precision
from train.model_functions import ModelFunctions, model_functions

MISSING_CONTROL = "attention, the control of the harness, was not among the models of this run"


def has_control(models: Mapping[str, Mapping], select: tuple[str, ...]) -> bool:
    """Whether attention, which must solve the task, is among the selected models."""
    return any(models[name]["preset"] == "attention" for name in select)


def check_selection(models: Mapping[str, Mapping], select: tuple[str, ...]) -> None:
    """Refuses an empty selection or a name that is not defined, naming the nearest.

    Raises:
      ValueError: see above.
    """
    if not select:
        raise ValueError("select is empty; it must name at least one of the models")
    for name in select:
        if name not in models:
            near = difflib.get_close_matches(name, models, n=1, cutoff=0.0)[0]
            raise ValueError(f"select has {name!r}; did you mean {near!r}? (of {', '.join(models)})")


def build_config(entry: Mapping, shared: Mapping, storage: str) -> HoloConfig:
    """Configuration of one model: its ``preset``, then ``shared``, then its own fields."""
    own = {key: value for key, value in entry.items() if key != "preset"}
    return HoloConfig.preset(entry["preset"], **{**shared, "precision": Precision(storage=storage), **own})


def build(config: HoloConfig) -> ModelFunctions:
    """The model as pure functions."""
    return model_functions(config)


def state_floats(config: HoloConfig, length: int) -> int:
    """Real numbers of state over all layers after ``length`` tokens.

    Memories count their numbers; attention its keys and values so far. The taps of short convolutions and
    the compensation of the running sum are bookkeeping and not counted.
    """
    total = 0
    for kind in config.layer_kinds * config.num_periods:
        if kind == "attention":
            width = config.hd_dim if config.mixer == "attention" else config.hidden_size
            total += 2 * width * (min(length, config.attention_window) if config.attention_window else length)
        else:
            total += config.state_floats_per_layer
    return total


def describe(config: HoloConfig) -> dict:
    """The fields of a configuration that differ from the defaults, as plain values."""
    defaults = {f.name: f.default for f in dataclasses.fields(HoloConfig)}
    return {k: v for k, v in config.to_dict().items() if k != "precision" and v != defaults[k]}
