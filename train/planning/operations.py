"""Operations of a train step, counted from the shapes of the parameters."""

import math

import jax

from holo_jax.config import HoloConfig
from train.model_functions import ModelFunctions


def product_parameters(functions: ModelFunctions, config: HoloConfig) -> int:
    """Parameters in a matrix product for every token: all matrices but the embedding table."""
    total = 0
    for (path, shape), (_, axes) in zip(
        jax.tree_util.tree_leaves_with_path(functions.shapes),
        jax.tree_util.tree_leaves_with_path(functions.axes, is_leaf=lambda node: isinstance(node, tuple)),
        strict=True,
    ):
        own = axes[1:] if axes[:1] == ("layers",) else axes
        table = "embedding" in jax.tree_util.keystr(path) and not config.tie_embeddings
        if len(own) == 2 and None not in own and not table:
            total += math.prod(shape.shape)
    return total


def operations_per_token(config: HoloConfig, products: int, length: int) -> float:
    """Operations of forward and backward for a token: 6 a product parameter, and 6 t hd a layer of attention.

    Causal attention reads t / 2 tokens on average, 4 hd operations each, three times. What ``remat="dots"``
    computes twice are not products and not counted; ``"full"`` adds a forward pass, here of all products.
    """
    layers = config.num_periods * sum(kind == "attention" for kind in config.layer_kinds)
    width = config.hd_dim if config.mixer == "attention" else config.hidden_size
    reach = min(length, 2 * config.attention_window) if config.attention_window else length
    total = 6.0 * products + 6.0 * layers * reach * width
    return total * 4 / 3 if config.remat == "full" else total
