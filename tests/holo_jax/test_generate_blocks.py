"""Blocks of ``generate``: each begins before the host hears of the one before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from holo_jax.generate import Sampling, generate
from holo_jax.generate.decoding import Decoding, DecodingInputs, decode_block, loop_state
from holo_jax.generate.forms import decoding_form, owned, split_state
from holo_jax.generate.pending import release_layers
from holo_jax.generate.stepping import choose
from tests.holo_jax.models import variant

PROMPTS = [[3, 1, 4, 1, 5], [2], [6, 5]]
SIZES = dict(block_size=4, piece_size=4)


@pytest.mark.parametrize(("name", "block_size"), [("holo", 1), ("holo", 5), ("hybrid", 3)])
def test_a_block_is_begun_before_the_last_is_heard_of_and_changes_nothing(name: str, block_size: int) -> None:
    """Blocks one by one until all rows have ended give the same bits, with stops in different blocks."""
    model = decoding_form(variant(name))
    sampling, seeds = Sampling(temperature=2.0, repetition_penalty=1.3), [1, 2, 3]
    options = dict(max_new_tokens=12, sampling=sampling, seeds=seeds, block_size=block_size)
    first = generate(model, PROMPTS, **{**options, "max_new_tokens": 1}, piece_size=4)
    after = dict(state=first.state, logits=first.logits, seen=first.seen)
    free = generate(model, **after, **options).tokens
    stops = sorted({free[0][1], free[1][4], free[2][2]})

    config, (graphdef, params) = model.config, nnx.split(model, nnx.Param)
    form = choose(config, 3)
    state = loop_state(config, first.state, form)
    now = owned(params, Decoding(first.logits, state, jnp.full((3,), 12, jnp.int32), first.seen))
    padded = jnp.asarray(np.pad(np.asarray(stops, np.int32), (0, 4 - len(stops)), constant_values=-1))
    allowed = jnp.int32(config.vocab_size)
    inputs = DecodingInputs(sampling.numbers, jnp.asarray(seeds, jnp.uint32), padded, allowed)
    blocks = []
    while np.asarray(now.remaining).any():
        now, tokens, finite = decode_block(
            graphdef, params, now, inputs, None, steps=block_size, plan=sampling.plan, form=form
        )
        assert finite
        blocks.append([[int(id) for id in row if id >= 0] for row in np.asarray(tokens)])

    heard: list[list[list[int]]] = []
    found = generate(model, **after, **options, stop_tokens=stops, callback=heard.append)
    assert heard == blocks and max(map(len, found.tokens)) < 12
    assert found.tokens == [[id for new in blocks for id in new[row]] for row in range(3)]
    assert found.stopped == [True] * 3
    layers = release_layers(now.state.layers)
    wanted = (split_state(now.state._replace(layers=layers)), now.logits, now.seen)
    own = (split_state(found.state), found.logits, found.seen)
    jax.tree.map(np.testing.assert_array_equal, own, wanted)


def test_an_error_of_the_callback_comes_out_and_ends_it() -> None:
    heard = []

    def listen(new: list[list[int]]) -> None:
        heard.append(new)
        if len(heard) == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        generate(variant("holo"), PROMPTS, max_new_tokens=9, callback=listen, **{**SIZES, "block_size": 2})
    assert len(heard) == 2
