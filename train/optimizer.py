"""AdamW with warm-up and cosine decay; which parameters are decayed follows from their logical axes."""

from typing import Any

import jax
import optax

from train.run_config import OptimizerConfig

Axes = tuple[str | None, ...]


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by number of applied updates c.

    With peak r, w warm-up steps, n steps in all and final ratio f: ``r (c + 1) / (w + 1)`` for
    c < w, then ``r (f + (1 - f) (1 + cos(pi (c - w) / (n - w))) / 2)``. The first update is not
    wasted on a rate of 0. f = 1 is constant after warm-up.
    """
    rate, warmup = config.learning_rate, min(config.warmup_steps, num_steps - 1)
    ramp = optax.linear_schedule(rate / (warmup + 1), rate, warmup)
    cosine = optax.cosine_decay_schedule(rate, max(1, num_steps - warmup), alpha=config.final_ratio)
    return optax.join_schedules([ramp, cosine], [warmup])


def decay_mask(axes: Any) -> Any:
    """True for the parameters that weight decay shrinks: the matrices at the residual stream.

    A matrix has two axes or more besides depth, one of them "embed". Vectors (norm scales, biases,
    gate biases), norms of heads and short convolution taps are left alone: decay would pull a
    norm's scale to 0, a gate to one half and a tap away from the shift it starts as.
    """

    def decayed(names: Axes) -> bool:
        own = names[1:] if names[:1] == ("layers",) else names
        return len(own) >= 2 and "embed" in own

    return jax.tree.map(decayed, axes, is_leaf=lambda node: isinstance(node, tuple))


def make_optimizer(config: OptimizerConfig, num_steps: int, axes: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov and Hutter, 2019) with decoupled weight decay.

    Args:
      config: hyper-parameters.
      num_steps: length of the schedule.
      axes: tree of logical axis names, one tuple a parameter.
    """
    adamw = optax.adamw(
        learning_rate_schedule(config, num_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask(axes),
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
