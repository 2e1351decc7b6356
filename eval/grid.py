"""Training a grid of small models at once: one compiled program over all seeds and learning rates.

Every model of an evaluation is trained by this function with the same optimiser, steps, seeds and rates.
Seeds and rates are mapped axes, so a grid costs little more than its largest member: the batches of a seed
are shared by its rates, and one ``lax.scan`` runs many steps without returning to the host.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from holo_jax.array_types import Array

Params = Any
Batch = Any


@dataclasses.dataclass(frozen=True)
class Grid:
    """What every model of a comparison shares.

    Attributes:
      seeds: each gives an initialisation and a stream of batches.
      rates: peak learning rates.
      steps: optimiser steps.
      warmup: share of the steps in which the rate rises from 0; it falls to 0 along a cosine after.
      weight_decay: AdamW's, on parameters of two or more dimensions.
      clip: gradients are scaled down to this global norm.
      b2: AdamW's second decay (the first is 0.9).
      log_every: steps a call of the compiled program, and a logged loss.
    """

    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    steps: int
    warmup: float
    weight_decay: float
    clip: float
    b2: float
    log_every: int

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; it needs at least one, all different")
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"rates is {self.rates}; it needs positive learning rates")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; it is a share of the steps in [0, 1)")
        if self.log_every < 1 or self.steps < 1 or self.steps % self.log_every:
            raise ValueError(
                f"steps is {self.steps}; it must be a positive multiple of log_every ({self.log_every})"
            )
        for name in ("clip", "b2"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")

    def schedule(self, step: Array) -> Array:
        """Share of the peak rate at a step."""
        rise = max(1.0, self.warmup * self.steps)
        done = jnp.clip((step - rise) / max(1.0, self.steps - rise), 0.0, 1.0)
        return jnp.minimum((step + 1) / rise, 1.0) * 0.5 * (1 + jnp.cos(math.pi * done))


@dataclasses.dataclass(frozen=True)
class Trained:
    """Result of a grid.

    Attributes:
      params: parameters [seeds, rates, ...], the last finite ones of each member.
      losses: [seeds, rates, logged]; NaN where a step was not finite.
      steps: the logged steps.
      skipped: steps [seeds, rates] whose loss or gradient was not finite; they changed nothing.
    """

    params: Params
    losses: np.ndarray
    steps: np.ndarray
    skipped: np.ndarray

    @property
    def diverged(self) -> np.ndarray:
        """Members [seeds, rates] whose last step was not finite: what they score is no result."""
        return ~np.isfinite(self.losses[..., -1])

    def score(self, scores: np.ndarray) -> np.ndarray:
        """Scores [seeds, rates] with NaN for members that diverged, so that ``choose_rate`` leaves them."""
        return np.where(self.diverged, np.nan, np.asarray(scores, np.float64))


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit`` of what runs once: on a CPU without optimisation, which compiles in a third of the time."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)


def train(
    grid: Grid,
    init: Callable[[Array], Params],
    loss: Callable[[Params, Batch], Array],
    draw: Callable[[Array], Batch],
    *,
    done: Callable[[int], None] = lambda steps: None,
) -> Trained:
    """Trains every (seed, rate).

    Args:
      grid: see ``Grid``.
      init: key -> parameters (a pytree of arrays).
      loss: (parameters, batch) -> scalar.
      draw: key -> batch, traceable; called once a step and seed.
      done: called after each ``log_every`` steps.

    A step whose loss or gradient is not finite changes nothing, is counted and logged as NaN.
    """
    adam = optax.chain(
        optax.clip_by_global_norm(grid.clip),
        optax.scale_by_adam(b2=grid.b2),
        optax.add_decayed_weights(grid.weight_decay, mask=lambda p: jax.tree.map(lambda x: x.ndim >= 2, p)),
    )
    rates = jnp.array(grid.rates)
    keys = jnp.stack([jax.random.key(seed) for seed in grid.seeds])

    @once
    def start(keys):
        def one(key):
            params = init(jax.random.fold_in(key, 0))
            return params, adam.init(params), jnp.int32(0)

        single = jax.vmap(one)(keys)
        return jax.tree.map(lambda x: jnp.repeat(x[:, None], len(grid.rates), axis=1), single)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, first):
        def update(params, moments, skipped, rate, batch, step):
            value, gradient = jax.value_and_grad(loss)(params, batch)
            change, after = adam.update(gradient, moments, params)
            size = rate * grid.schedule(step)
            moved = jax.tree.map(lambda p, c: p - size * c, params, change)
            good = jnp.isfinite(optax.global_norm(gradient)) & jnp.isfinite(value)
            keep = functools.partial(jnp.where, good)
            params, moments = jax.tree.map(keep, (moved, after), (params, moments))
            return (params, moments, skipped + ~good), jnp.where(good, value, jnp.nan)

        over_rates = jax.vmap(update, in_axes=(0, 0, 0, 0, None, None))
        over_seeds = jax.vmap(over_rates, in_axes=(0, 0, 0, None, 0, None))

        def body(state, step):
            batches = jax.vmap(lambda key: draw(jax.random.fold_in(jax.random.fold_in(key, 1), step)))(keys)
            return over_seeds(*state, rates, batches, step)

        state, values = jax.lax.scan(body, state, first + jnp.arange(grid.log_every))
        return state, values[-1]

    state = start(keys)
    logged = []
    for first in range(0, grid.steps, grid.log_every):
        state, value = run(state, jnp.int32(first))
        logged.append(np.asarray(value))
        done(grid.log_every)
    steps = np.arange(grid.log_every, grid.steps + 1, grid.log_every)
    return Trained(state[0], np.stack(logged, -1), steps, np.asarray(state[2]))


def choose_rate(scores: np.ndarray) -> int:
    """Index of the learning rate with the best mean validation score over seeds; scores [seeds, rates].

    A rate with a score that is not finite on any seed is out.

    Raises:
      FloatingPointError: if all are.
    """
    averages = np.asarray(scores, np.float64).mean(0)
    finite = np.isfinite(averages)
    if not finite.any():
        raise FloatingPointError("training ended with losses that are not finite at every learning rate")
    return int(np.argmax(np.where(finite, averages, -np.inf)))


def select_rate(params: Params, index: int) -> Params:
    """Parameters [seeds, ...] of one learning rate."""
    return jax.tree.map(lambda x: x[:, index], params)
