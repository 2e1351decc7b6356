"""The whole train step: forward, loss, backward, AdamW; tokens a second and the bytes it needs, by length."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from eval.common import Reporter
from eval.results import exact
from eval.speed_parts.floors import Ceilings
from eval.speed_parts.models import Size, Variant, product_parameters
from eval.speed_parts.profile import top_kernels
from eval.speed_parts.timing import (
    Job,
    compile_all,
    failure,
    median,
    missing,
    program_bytes,
    sample_seconds,
)
from holo_jax import kernels
from holo_jax.config import HoloConfig
from holo_jax.functional.cross_entropy import IGNORE
from holo_jax.model import init_state
from train.model_functions import model_functions
from train.optimizer import decay_mask

METRICS = ("tokens_per_second", "milliseconds")


def make_step(config: HoloConfig, batch: int, length: int, chunk: int) -> tuple[Any, Any]:
    """(init: key -> train state, step: (state, tokens [b, t]) -> (state, loss)).

    With ``chunk``, time is walked in pieces of that many tokens that hand on the memory's state, each
    rematerialised: the gradient is that of the whole sequence, the activations those of one piece.
    """
    functions = model_functions(config)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(3e-4, b1=0.9, b2=0.95, weight_decay=0.1, mask=decay_mask(functions.axes)),
    )

    def init(key: jax.Array) -> Any:
        params = functions.init(key)
        return params, optimizer.init(params)

    def piece_loss(params: Any, tokens: jax.Array, targets: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        model = functions.model(params)
        hidden, state = model.model(tokens, None, state)
        total, _ = kernels.linear_cross_entropy(
            hidden,
            model.output_weights,
            targets,
            chunk_tokens=config.loss_chunk,
            logits_dtype=config.precision.logits,
            backend=config.products_backend,
        )
        return total, state

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        if not chunk or chunk >= length:
            return functions.model(params)(tokens, labels=tokens).loss
        targets = jnp.concatenate([tokens[:, 1:], jnp.full_like(tokens[:, :1], IGNORE)], axis=1)
        pieces = [jnp.moveaxis(a.reshape(batch, length // chunk, chunk), 1, 0) for a in (tokens, targets)]

        @jax.checkpoint
        def body(state: Any, xs: Any) -> tuple[Any, jax.Array]:
            total, state = piece_loss(params, *xs, state)
            return state, total

        _, totals = jax.lax.scan(body, init_state(config, batch), tuple(pieces))
        return jnp.sum(totals) / (batch * (length - 1))

    def step(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return init, step


def run(
    reporter: Reporter,
    variants: Sequence[Variant],
    size: Size,
    tokens: int,
    ceilings: Ceilings,
    *,
    workers: int,
    samples: int,
    least_seconds: float,
    profiled: Sequence[Variant] = (),
    before: Callable[[], None] = lambda: None,
) -> None:
    """Compiles all variants, then times one after the other; memory is reported also for what does not fit.

    ``before`` is called once, after compiling and before anything is timed.

    ``profiled`` variants also report their largest kernels.
    """
    jobs, plans = [], []
    for variant in variants:
        config = variant.config(size)
        batch = variant.batch(tokens)
        if variant.chunk and variant.length % variant.chunk:
            raise ValueError(f"chunk is {variant.chunk}; it must divide the length {variant.length}")
        init, step = make_step(config, batch, variant.length, variant.chunk)
        state = jax.eval_shape(init, jax.random.key(0))
        inputs = jax.ShapeDtypeStruct((batch, variant.length), jnp.int32)
        where = {"part": "train", **variant.where}
        lower = lambda f=step, s=state, x=inputs: jax.jit(f, donate_argnums=0).lower(s, x)  # noqa: E731
        jobs.append(Job(where, lower, variant.options))
        plans.append((variant, config, init))
    programs = compile_all(jobs, workers)
    before()
    for built, (variant, config, init) in zip(programs, plans, strict=True):
        where = built.job.where
        if built.program is None:
            reporter.add(*missing(METRICS, built, "compilation"))
            continue
        reporter.add(
            exact("peak_gib", program_bytes(built.program) / 2**30, **where),
            exact("compile_seconds", built.seconds, **where),
        )
        shape = (variant.batch(tokens), variant.length)
        state = jax.jit(init)(jax.random.key(0))
        inputs = [jax.random.randint(jax.random.key(i), shape, 0, config.vocab_size) for i in range(4)]
        held = {"state": state, "count": 0}
        del state

        def one(program: Any = built.program, held: dict = held, inputs: Any = inputs) -> jax.Array:
            held["count"] += 1
            held["state"], loss = program(held["state"], inputs[held["count"] % len(inputs)])
            return loss

        try:
            seconds = sample_seconds(one, samples=samples, least_seconds=least_seconds)
            loss = float(one())
        except Exception as error:
            status, detail = failure(error)
            reporter.add(*missing(METRICS, dataclasses.replace(built, status=status, detail=detail), "run"))
            held.clear()
            continue
        if variant in profiled:
            try:
                reporter.add(*top_kernels(one, where))
            except Exception as error:
                reporter.note(f"no profile of {variant.model}@{variant.length}: {failure(error)[1]}")
        held.clear()
        per_step = shape[0] * shape[1]
        rate = median("tokens_per_second", [per_step / s for s in seconds], where)
        products = product_parameters(config)
        # 6 operations a product parameter and token; causal attention adds 6 t hd a layer (half of 12 t hd).
        flops = 6 * products
        if config.mixer == "attention":
            flops += 6 * config.num_hidden_layers * variant.length * config.hd_dim
        reporter.add(
            rate,
            median("milliseconds", seconds, where, scale=1e3),
            exact("share_of_product_rate", rate.value * flops / ceilings.flops_per_second, **where),
            exact("product_parameters", products, **where),
            exact("last_loss", loss, detail="random tokens: near the log of the vocabulary", **where),
        )
