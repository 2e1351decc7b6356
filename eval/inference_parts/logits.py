"""What storing the state in fewer bits does to the logits: error, loss, agreement on the likeliest token."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eval.common import Reporter
from eval.results import exact, mean
from eval.speed_parts.models import Size, model_config
from eval.speed_parts.timing import say
from holo_jax import load_pretrained
from holo_jax.array_types import Array
from holo_jax.generate import (
    STATE_DTYPES,
    compress_state,
    decoding_form,
    expand_state,
    init_state,
    state_bytes,
)
from holo_jax.generate.forms import split_state
from holo_jax.generate.reading import next_logits, read
from holo_jax.model import HoloForCausalLM, ModelState

_MEASURED = 64  # last tokens whose logits are compared


def run(reporter: Reporter, *, run_directory: str, tokens: int, seed: int) -> None:
    """Reads ``tokens`` one by one with every state dtype; compares the last ones' logits with float32's.

    "every" stores the state after each token; "once" reads in float32, stores the state before the last
    tokens, and goes on in float32.
    """
    model, ids = _model_and_tokens(run_directory, tokens, seed)
    decoding = decoding_form(model)
    graphdef, params = nnx.split(decoding, nnx.Param)
    step = partial(_read_all, graphdef, params)
    first, last = jnp.asarray(ids[:-_MEASURED]), jnp.asarray(ids[-_MEASURED:])
    start = split_state(init_state(model.config, 1, cache_length=len(ids)))
    before, _ = step(start, first)
    _, exact_logits = step(before, last)
    targets = np.append(ids[-_MEASURED + 1 :], 0)
    for dtype in STATE_DTYPES:
        stored = compress_state(before, dtype)
        reporter.add(exact("state_bytes", state_bytes(stored), part="logits", state_dtype=dtype, mode="once"))
        if dtype == "float32":
            continue
        every, _ = step(compress_state(start, dtype), first)
        for mode, state in (("once", expand_state(stored)), ("every", every)):
            _, logits = step(state, last)
            _report(reporter, dtype, mode, np.asarray(logits), np.asarray(exact_logits), targets)


def _report(
    reporter: Reporter, dtype: str, mode: str, logits: np.ndarray, wanted: np.ndarray, targets: np.ndarray
) -> None:
    where = {"part": "logits", "state_dtype": dtype, "mode": mode}
    errors = np.sqrt(np.mean((logits - wanted) ** 2, axis=-1)) / wanted.std(axis=-1)
    nats = _nats(logits, targets) - _nats(wanted, targets)
    agree = logits.argmax(-1) == wanted.argmax(-1)
    reporter.add(
        mean("logit_error", errors, **where),
        mean("nats_difference", nats[:-1], **where),
        mean("same_likeliest", agree.astype(float), **where),
    )
    say(
        f"{dtype} {mode}: logit error {errors.mean():.4f} of the spread, {nats[:-1].mean():+.4f} nats a token"
    )


def _nats(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    most = logits.max(-1, keepdims=True)
    normaliser = most[:, 0] + np.log(np.exp(logits - most).sum(-1))
    return normaliser - logits[np.arange(len(targets)), targets]


@partial(jax.jit, static_argnums=0)
def _read_all(graphdef: Any, params: Any, state: ModelState, ids: Array) -> tuple[ModelState, Array]:
    model = nnx.merge(graphdef, params)

    def body(state: ModelState, token: Array) -> tuple[ModelState, Array]:
        hidden, state = read(model, token.reshape(1, 1), state)
        return state, next_logits(model, hidden)[0]

    return jax.lax.scan(body, state, ids)


def _model_and_tokens(directory: str, count: int, seed: int) -> tuple[HoloForCausalLM, np.ndarray]:
    if not directory:
        config = model_config("holo", Size(layers=2, width=128, vocab=512), hd_dim=128)
        model = jax.jit(lambda: HoloForCausalLM(config, rngs=nnx.Rngs(seed)))()
        return model, np.random.default_rng(seed).integers(0, config.vocab_size, count, np.int32)
    loaded = load_pretrained(directory)
    if loaded.tokenizer is None:
        raise ValueError(f"{directory} has no tokenizer; its model cannot read text")
    text = Path(argparse.__file__).read_text()  # a text that every machine has
    ids = np.asarray(loaded.tokenizer.encode(text)[:count], np.int32)
    if len(ids) < count:
        raise ValueError(f"logit_tokens is {count}; the text has only {len(ids)}")
    return loaded.model, ids
