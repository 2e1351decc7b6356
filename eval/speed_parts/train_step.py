"""The whole train step: forward, loss, backward, AdamW; tokens a second and the bytes it needs, by length."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import optax

from eval.common import Reporter
from eval.results import Value, exact
from eval.speed_parts.floors import Ceilings
from eval.speed_parts.models import Size, Variant, product_parameters
from eval.speed_parts.profile import top_kernels
from eval.speed_parts.timing import (
    Built,
    Compiler,
    Job,
    failure,
    median,
    missing,
    program_bytes,
    sample_seconds,
    say,
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


class Step:
    """The step of one variant: compiled beside others, timed in turns, reported once."""

    def __init__(
        self, variant: Variant, size: Size, tokens: int, compiler: Compiler, inits: dict[str, Future[Built]]
    ) -> None:
        """Begins to compile it, and the drawing of parameters if ``inits`` lacks that of their tree."""
        self.variant, self.length = variant, variant.length
        self.config = variant.config(size)
        self.shape = (variant.batch(tokens), variant.length)
        init, step = make_step(self.config, *self.shape, variant.chunk)
        state = jax.eval_shape(init, jax.random.key(0))
        inputs = jax.ShapeDtypeStruct(self.shape, jnp.int32)
        where = {"part": "train", **variant.where}
        lower = lambda: jax.jit(step, donate_argnums=0).lower(state, inputs)  # noqa: E731
        self._step = compiler.submit(Job(where, lower, variant.options))
        tree = f"{variant.model} {state}"
        if tree not in inits:
            job = Job(
                {"part": "parameters", "model": variant.model}, lambda: jax.jit(init).lower(jax.random.key(0))
            )
            inits[tree] = compiler.submit(job)
        self._init = inits[tree]
        self._seconds: list[float] = []
        self._kernels: list[Value] = []
        self._loss = 0.0
        self._failed: Built | None = None

    def wait(self) -> None:
        """Until it has compiled."""
        self._step.result()
        self._init.result()

    def measure(self, samples: int, least_seconds: float, *, profiled: bool = False) -> None:
        """Times ``samples`` more samples, on parameters drawn anew; does nothing once it has failed."""
        built, drawn = self._step.result(), self._init.result()
        if built.program is None or self._failed is not None:
            return
        try:
            if drawn.program is None:
                raise RuntimeError(f"parameters: {drawn.detail}")
            keys = (jax.random.key(i) for i in range(4))
            inputs = [jax.random.randint(key, self.shape, 0, self.config.vocab_size) for key in keys]
            held = {"state": drawn.program(jax.random.key(0)), "count": 0}

            def one() -> jax.Array:
                held["count"] += 1
                held["state"], loss = built.program(held["state"], inputs[held["count"] % len(inputs)])
                return loss

            self._seconds += sample_seconds(one, samples=samples, least_seconds=least_seconds)
            self._loss = float(one())
        except Exception as error:
            status, detail = failure(error)
            self._failed = dataclasses.replace(built, status=status, detail=detail)
            return
        if profiled:
            try:
                self._kernels = top_kernels(one, built.job.where)
            except Exception as error:
                say(f"no profile of {self.variant.model}@{self.length}: {failure(error)[1]}")

    def report(self, reporter: Reporter, ceilings: Ceilings) -> None:
        """Reports what was measured; the planned bytes also of what did not fit."""
        built = self._step.result()
        where = built.job.where
        if built.program is None:
            reporter.add(*missing(METRICS, built, "compilation"))
            return
        reporter.add(
            exact("peak_gib", program_bytes(built.program) / 2**30, **where),
            exact("compile_seconds", built.seconds, **where),
        )
        if self._failed is not None:
            reporter.add(*missing(METRICS, self._failed, "run"))
            return
        per_step = self.shape[0] * self.shape[1]
        rate = median("tokens_per_second", [per_step / s for s in self._seconds], where)
        products = product_parameters(self.config)
        # 6 operations a product parameter and token; causal attention adds 6 t hd a layer (half of 12 t hd).
        flops = 6 * products
        if self.config.mixer == "attention":
            flops += 6 * self.config.num_hidden_layers * self.length * self.config.hd_dim
        reporter.add(
            rate,
            median("milliseconds", self._seconds, where, scale=1e3),
            exact("share_of_product_rate", rate.value * flops / ceilings.flops_per_second, **where),
            exact("product_parameters", products, **where),
            exact("last_loss", self._loss, detail="random tokens: near the log of the vocabulary", **where),
            *self._kernels,
        )
        say(f"{self.variant.model}@{self.length}: {rate.value:.0f} tokens/s")


def start(
    variants: Sequence[Variant],
    size: Size,
    tokens: int,
    compiler: Compiler,
    inits: dict[str, Future[Built]],
) -> list[Step]:
    """The steps of all variants, compiling; ``inits`` collects the programs that draw parameters."""
    return [Step(variant, size, tokens, compiler, inits) for variant in variants]
