"""Drawing tokens by two kernels after the head's product: the highest scores, and all that follows.

A token of few rows is few kernels, and between any two of them a device stands still for a microsecond or
two. Without filters and penalty the token drawn is that of the highest score, so that none is needed but one
that finds the highest of each part of the ids and one that looks at these.
"""

from typing import Any

import jax.numpy as jnp

from holo_jax.array_types import Array, Float, Int, UInt32
from holo_jax.generate.counts import Counts
from holo_jax.generate.sampling import Plan, SamplingNumbers
from holo_jax.generate.stepping import Form, embed, logits_of, unscaled, unscaled_logits
from holo_jax.kernels.decode import choose as decode_choose
from holo_jax.kernels.decode import scores as decode_scores
from holo_jax.layers import embedding_std
from holo_jax.model import HoloForCausalLM


def drawing_of(
    numbers: SamplingNumbers,
    keys: UInt32[Array, "c b k"],
    allowed: Int[Array, ""],
    plan: Plan,
) -> decode_scores.Drawing:
    """Of a group of tokens with these keys of ``row_keys``."""
    if plan.greedy:
        return decode_scores.Drawing(None, None, allowed[None])
    return decode_scores.Drawing(keys, 1 / numbers.temperature[None], allowed[None])


def first_input(model: HoloForCausalLM, counts: Counts) -> Float[Array, "b e"]:
    """The embedded token before the first block, as ``next_token`` returns it."""
    return embed(model, jnp.where(counts.active, counts.token, 0))


def next_token(
    model: HoloForCausalLM,
    hidden: Float[Array, "b e"],
    drawing: decode_scores.Drawing,
    numbers: Int[Array, "n b"],
    stop_tokens: Int[Array, "s"],
    form: Form,
    packed: Any,
) -> tuple[Float[Array, "b v"], Int[Array, "n b"], Array]:
    """``stepping.logits_of``, ``sampling.draw``, ``Counts.after`` and ``first_input``.

    Args:
      model: in decoding form.
      hidden: the residual stream after the last block.
      drawing: of the group.
      numbers: ``Counts.packed`` before the token that was read.
      stop_tokens: ids that end a row.
      form, packed: see ``stepping``; a form with ``drawn``.

    Returns:
      Logits, or ``stepping.unscaled_logits``; ``numbers`` before the next token; and what that enters the
      first block as.
    """
    config, interpret = model.config, form.interpret
    stream, eps = None, model.model.norm.eps
    if unscaled(config, form):
        logits, stream = unscaled_logits(hidden, packed), hidden
    else:
        logits = logits_of(model, hidden, form, packed)
    scores = decode_scores.of_logits(logits, drawing, numbers, stream, eps=eps, interpret=interpret)
    numbers, x = decode_choose.choose(
        scores,
        numbers,
        stop_tokens,
        model.model.embedding[...].astype(config.precision.storage),
        divisor=embedding_std(config) if config.tie_embeddings else None,
        interpret=interpret,
    )
    return logits, numbers, x
