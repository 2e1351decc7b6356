"""One token mixer: forward, and forward with backward, beside the floor of its products and memory op."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from eval.common import Reporter
from eval.results import exact
from eval.speed_parts.floors import Ceilings
from eval.speed_parts.models import Size, Variant
from eval.speed_parts.timing import Built, Job, compile_all, failure, median, missing, sample_seconds
from holo_jax.config import HoloConfig
from holo_jax.mixers import MIXERS, Context
from holo_jax.model import positional_turns

_SETS = 2


def mixer_functions(config: HoloConfig) -> tuple[Any, Any]:
    """(init: key -> parameters, apply: (parameters, x [b, t, e]) -> [b, t, e]) of one mixer."""

    def build(key: jax.Array) -> nnx.Module:
        return MIXERS[config.mixer](config, rngs=nnx.Rngs(params=key))

    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param)

    def init(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, params)
        turns = positional_turns(config)
        context = Context(jnp.arange(x.shape[1], dtype=jnp.uint32)[None])
        return nnx.merge(graphdef, state)(x, context, None if turns is None else turns[0, 0], None)[0]

    return init, apply


def floor_seconds(
    config: HoloConfig, params: Any, tokens: int, length: int, ceilings: Ceilings, both: bool
) -> float:
    """Floor of the products plus that of the bytes that stay outside them: products and memory op alternate.

    Bytes: input read, output written, in bf16, and values, phases and outputs of the memory op once each way
    (attention: queries, keys, values, outputs); the parameters are small against them.
    """
    matrices = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2 and min(leaf.shape) >= 16)
    flops = 2 * matrices * tokens
    if config.mixer == "attention":
        flops += 2 * tokens * length * config.hd_dim  # both products, the causal half
    nbytes = 2 * tokens * (2 * config.hidden_size + 4 * config.hd_dim)
    passes = 3 if both else 1
    return (
        flops * passes / ceilings.flops_per_second + nbytes * (2.5 if both else 1) / ceilings.bytes_per_second
    )


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
) -> None:
    """Times the mixers of the variants at their lengths."""
    jobs, plans = [], []
    for variant in variants:
        config = variant.config(size)
        init, apply = mixer_functions(config)
        shape = (variant.batch(tokens), variant.length, config.hidden_size)
        params = jax.eval_shape(init, jax.random.key(0))
        x = jax.ShapeDtypeStruct(shape, jnp.dtype(config.precision.storage))

        def forward(params: Any, sets: Any, apply: Any = apply) -> Any:
            return [apply(params, x) for x, _ in sets]

        def both(params: Any, sets: Any, apply: Any = apply) -> Any:
            return [jax.vjp(apply, params, x)[1](cotangent) for x, cotangent in sets]

        for direction, function in (("forward", forward), ("both", both)):
            where = {"part": "mixer", **variant.where, "direction": direction}
            sets = [(x, x)] * _SETS
            jobs.append(Job(where, lambda f=function, p=params, s=sets: jax.jit(f).lower(p, s)))
            plans.append((config, init, shape, direction))
    for built, (config, init, shape, direction) in zip(compile_all(jobs, workers), plans, strict=True):
        where = built.job.where
        if built.program is None:
            reporter.add(*missing(["milliseconds"], built, "compilation"))
            continue
        try:
            seconds = _seconds(built, init, shape, config.precision.storage, samples, least_seconds)
        except Exception as error:
            status, detail = failure(error)
            reporter.add(
                *missing(["milliseconds"], dataclasses.replace(built, status=status, detail=detail), "run")
            )
            continue
        floor = floor_seconds(config, params, shape[0] * shape[1], shape[1], ceilings, direction == "both")
        value = median("milliseconds", [s / _SETS for s in seconds], where, scale=1e3)
        reporter.add(
            value,
            exact("floor_milliseconds", floor * 1e3, **where),
            exact("share_of_floor", floor * 1e3 / value.value, **where),
            exact("compile_seconds", built.seconds, **where),
        )


def _seconds(
    built: Built, init: Any, shape: tuple[int, ...], dtype: str, samples: int, least_seconds: float
) -> list[float]:
    params = jax.jit(init)(jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), 2 * _SETS)
    draws = [jax.random.normal(k, shape, jnp.dtype(dtype)) for k in keys]
    sets = list(zip(draws[::2], draws[1::2], strict=True))
    return sample_seconds(lambda: built.program(params, sets), samples=samples, least_seconds=least_seconds)
