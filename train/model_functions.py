"""The model as pure functions of a parameter tree: what the step, the sharding and the checkpoint see."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from holo_jax.array_types import Array
from holo_jax.config import HoloConfig
from holo_jax.model import HoloForCausalLM, logical_axes

Params = Any


class ModelFunctions(NamedTuple):
    """A model without state of its own.

    Attributes:
      init: key -> parameters (a nested dict of arrays).
      loss: (parameters, tokens [b, t], segment_ids [b, t], key) -> (summed nats, number of targets).
        ``key`` is for layers that draw random numbers.
      model: parameters -> the module, for anything else.
      shapes: tree of ``jax.ShapeDtypeStruct``.
      axes: tree of tuples of logical axis names.
    """

    init: Callable[[Array], Params]
    loss: Callable[[Params, Array, Array, Array], tuple[Array, Array]]
    model: Callable[[Params], Any]
    shapes: Params
    axes: Params


def model_functions(config: HoloConfig) -> ModelFunctions:
    """Pure functions of ``HoloForCausalLM(config)``."""

    def build(key: Array) -> HoloForCausalLM:
        return HoloForCausalLM(config, rngs=nnx.Rngs(params=key))

    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param)

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    def model(params: Params) -> HoloForCausalLM:
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    def loss(params: Params, tokens: Array, segment_ids: Array, key: Array) -> tuple[Array, Array]:
        del key  # no layer of this model draws random numbers
        outputs = model(params)(tokens, labels=tokens, segment_ids=segment_ids)
        assert outputs.loss_sum is not None and outputs.num_targets is not None
        return outputs.loss_sum, outputs.num_targets

    return ModelFunctions(init, loss, model, nnx.to_pure_dict(abstract), logical_axes(abstract))
