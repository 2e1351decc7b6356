"""The models that are compared: one size in product parameters, one block, one word each."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np

from holo_jax.config import HoloConfig
from train.model_functions import model_functions

# hd_dim brings each within 5% of the 184M parameters in products of the attention model.
_HD_DIM = {"holo": 1024, "holo_sum": 1024, "attention": 1024, "ssm": 1152, "seed": 2048, "dual": 1344}
MODELS = tuple(_HD_DIM)
TARGET_PRODUCTS = 184e6


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes shared by all models; ``scale`` shrinks hd_dim for tests."""

    layers: int
    width: int
    vocab: int


def model_config(name: str, size: Size, **changes: Any) -> HoloConfig:
    """The configuration of a model by name ("holo_sum" is ``holo`` without erase).

    Raises:
      ValueError: for an unknown name.
    """
    if name not in _HD_DIM:
        raise ValueError(f"model is {name!r}; it must be one of {', '.join(_HD_DIM)}")
    preset, own = ("holo", {"erase": False}) if name == "holo_sum" else (name, {})
    hd_dim = max(64, _HD_DIM[name] * size.width // 1024 // 64 * 64)
    return HoloConfig.preset(
        preset,
        **{
            "vocab_size": size.vocab,
            "hidden_size": size.width,
            "num_hidden_layers": size.layers,
            "hd_dim": hd_dim,
            **own,
            **changes,
        },
    )


def product_parameters(config: HoloConfig) -> int:
    """Parameters in a matrix product for every token: all matrices but the embedding table."""
    functions = model_functions(config)
    total = 0
    for (path, shape), (_, axes) in zip(
        jax.tree_util.tree_leaves_with_path(functions.shapes),
        jax.tree_util.tree_leaves_with_path(functions.axes, is_leaf=lambda node: isinstance(node, tuple)),
        strict=True,
    ):
        own = axes[1:] if axes[:1] == ("layers",) else axes
        table = "embedding" in jax.tree_util.keystr(path) and not config.tie_embeddings
        if len(own) == 2 and own[0] is not None and None not in own and not table:
            total += int(np.prod(shape.shape))
    return total


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model at a length: ``NAME@LENGTH[ key=value ...]``.

    Keys: remat (none, dots, full), unroll (blocks per iteration of the scan over depth), chunk (tokens of
    a rematerialised piece of time, 0 for none), loss (tokens with logits at one time), backend, tokens.
    """

    model: str
    length: int
    remat: str = "dots"
    unroll: int = 1
    chunk: int = 0
    loss: int = 8192
    backend: str = "auto"
    tokens: int = 0

    @property
    def where(self) -> dict[str, Any]:
        """Its settings in results."""
        return dataclasses.asdict(self)

    def batch(self, tokens: int) -> int:
        """Rows of a step of about ``tokens`` tokens, at least one."""
        return max(1, (self.tokens or tokens) // self.length)

    def config(self, size: Size) -> HoloConfig:
        """The model's configuration."""
        return model_config(
            self.model,
            size,
            remat=self.remat,
            scan_unroll=self.unroll,
            loss_chunk=self.loss,
            memory_backend=self.backend,
        )


def parse_variant(text: str) -> Variant:
    """The variant written as ``text``.

    Raises:
      ValueError: for another form or an unknown key.
    """
    match = re.fullmatch(r"(\w+)@(\d+)((?:\s+\w+=\w+)*)", text.strip())
    if not match:
        raise ValueError(f"variant is {text!r}; it must look like holo@2048 remat=dots unroll=12")
    fields = {f.name: f.type for f in dataclasses.fields(Variant)}
    options: dict[str, Any] = {}
    for pair in match[3].split():
        key, value = pair.split("=")
        if key not in fields or key in ("model", "length"):
            raise ValueError(f"variant {text!r} has the unknown key {key!r}")
        options[key] = int(value) if fields[key] is int else value
    if match[1] not in MODELS:
        raise ValueError(
            f"variant {text!r} names the model {match[1]!r}; it must be one of {', '.join(MODELS)}"
        )
    return Variant(match[1], int(match[2]), **options)
