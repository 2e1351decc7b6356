"""Two forms of a model and its state: stacked over depth, as trained, and split, as decoded.

A ``lax.scan`` over stacked layers compiles once for any depth, which suits reading many tokens at a time. For
one token it copies every layer's weights out of the stack, and every attention cache out of and into it; the
split form has separate arrays instead, which are updated in place.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from holo_jax.array_types import Array, Int
from holo_jax.layers import Denoiser, Linear, join
from holo_jax.mixers import (
    AttentionMixer,
    AttentionState,
    MemoryMixer,
    MemoryMixerState,
    SsmMixer,
    SsmState,
)
from holo_jax.model import HoloForCausalLM, ModelState


def is_mixer_state(node: Any) -> bool:
    """Whether a node of a state tree is the state of one mixer (stacked or not)."""
    return isinstance(node, AttentionState | MemoryMixerState | SsmState)


def is_split(layers: Any) -> bool:
    """Whether ``ModelState.layers`` is a tuple over periods rather than stacked."""
    return not is_mixer_state(layers[0])


def split_state(state: ModelState) -> ModelState:
    """The state with ``layers`` as a tuple over periods; a split state is returned as it is."""
    return state if is_split(state.layers) else state._replace(layers=_unstack(state.layers))


def stack_state(state: ModelState) -> ModelState:
    """Inverse of ``split_state``; a stacked state is returned as it is."""
    return state._replace(layers=_stack(state.layers)) if is_split(state.layers) else state


def take_rows(state: ModelState, rows: Int[Array, "r"]) -> ModelState:
    """The given rows of a state's batch, in this order; ``[0] * n`` forks row 0 for n continuations.

    Raises:
      IndexError: for a row that is not there.
    """
    batch = state.position.shape[0]
    rows = jnp.asarray(rows, jnp.int32)
    if rows.ndim != 1 or rows.size < 1 or int(rows.min()) < 0 or int(rows.max()) >= batch:
        raise IndexError(f"rows is {rows.tolist()}; it must be a list of rows in [0, {batch})")
    return _take_rows(state, rows)


def state_bytes(state: ModelState) -> int:
    """Bytes of all arrays of a state, whatever they are for."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def decoding_form(model: HoloForCausalLM) -> HoloForCausalLM:
    """The same function with weights in the storage dtype, joined and unstacked; for decoding only.

    Linear maps and the embedding are cast to the storage dtype where they are used, at every use: doing it
    once gives the same numbers and reads half the bytes a token. Maps of the same input become one product.
    Everything else stays float32. A model in this form is returned as it is.
    """
    if isinstance(model.model.periods, nnx.List):
        return model
    return _to_decoding_form(model)


def training_form(model: HoloForCausalLM) -> HoloForCausalLM:
    """The model with stacked periods (the weights keep their dtype); under jit, a copy of the weights."""
    periods: Any = model.model.periods
    if not isinstance(periods, nnx.List):
        return model
    graphdef, params = nnx.split(model, nnx.Param)
    stacked = nnx.merge(graphdef, params)
    parts: list[Any] = [nnx.split(period, nnx.Param) for period in periods]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(part[1] for part in parts))
    stacked.model.periods = nnx.merge(parts[0][0], together)
    return stacked


@partial(jax.jit, keep_unused=True)
def owned(params: Any, tree: Any) -> Any:
    """Copies of the arrays, placed as results of functions of ``params`` are.

    A loop must get its first input placed like its own output: JAX compiles once for arrays that are bound
    to a device (as loaded parameters, and all that is computed from them) and once for those that are not.
    """
    del params
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def _unstack(layers: Any) -> Any:
    count = jax.tree.leaves(layers)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf, n=n: leaf[n], layers) for n in range(count))


@jax.jit
def _stack(layers: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


@jax.jit
def _take_rows(state: ModelState, rows: Array) -> ModelState:
    axis = 0 if is_split(state.layers) else 1
    layers = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=axis), state.layers)
    return ModelState(layers, state.position[rows], state.segment[rows])


@jax.jit
def _to_decoding_form(model: HoloForCausalLM) -> HoloForCausalLM:
    dtype = jnp.dtype(model.config.precision.storage)

    def cast(param: nnx.Param) -> nnx.Param:
        return nnx.Param(param[...].astype(dtype), axes=param.get_metadata()["axes"])

    graphdef, params = nnx.split(model, nnx.Param)
    model = nnx.merge(graphdef, params)
    stacked: Any = model.model.periods
    graphdef, params = nnx.split(stacked, nnx.Param)
    count = model.config.num_periods
    periods = [nnx.merge(graphdef, jax.tree.map(lambda leaf, n=n: leaf[n], params)) for n in range(count)]
    model.model.periods = nnx.List(periods)  # type: ignore[assignment]
    modules = [module for _, module in nnx.iter_modules(model)]
    for module in modules:
        if isinstance(module, Denoiser | MemoryMixer | AttentionMixer | SsmMixer):
            join(module, tuple(module.maps))
    for module in modules:
        if isinstance(module, Linear) and hasattr(module, "weight"):
            module.weight = cast(module.weight)
    model.model.embedding = cast(model.model.embedding)
    return model
