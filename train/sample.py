"""A short sample from a model in training, token by token through its constant-size state."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array
from holo_jax.model import init_state
from train.model_functions import ModelFunctions, Params


def sample_tokens(
    functions: ModelFunctions,
    params: Params,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    vocab_size: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """Tokens that go on from ``prompt``, drawn from softmax(logits / temperature).

    Args:
      functions: the model.
      params: its parameters.
      prompt: at least one token.
      num_tokens: how many to draw.
      vocab_size: ids from here on are padding of the vocabulary and never drawn.
      temperature: 0 takes the likeliest token.
      seed: of the draws.
    """
    key = jax.random.key(seed, impl="threefry2x32")
    draw = partial(_sample, functions, num_tokens, vocab_size, temperature)
    drawn = jax.jit(draw)(params, jnp.asarray(prompt, jnp.int32), key)
    return [int(token) for token in jax.device_get(drawn)]


def _sample(
    functions: ModelFunctions,
    num_tokens: int,
    vocab_size: int,
    temperature: float,
    params: Params,
    prompt: Array,
    key: Array,
) -> Array:
    model = functions.model(params)
    state = init_state(model.config, 1, cache_length=prompt.shape[0] + num_tokens)
    outputs = model(prompt[None], state=state)

    def pick(logits: Array, key: Array) -> Array:
        logits = jnp.where(jnp.arange(logits.shape[0]) < vocab_size, logits, -jnp.inf)
        if temperature == 0:
            return jnp.argmax(logits).astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    def advance(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
        state, logits = carry
        token = pick(logits, key)
        outputs = model(token[None, None], state=state)
        return (outputs.state, outputs.logits[0, -1]), token

    start = (outputs.state, outputs.logits[0, -1])
    return jax.lax.scan(advance, start, jax.random.split(key, num_tokens))[1]
