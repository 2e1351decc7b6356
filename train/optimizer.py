"""AdamW or Muon with warm-up and cosine decay; what each parameter gets follows from its logical axes."""

from typing import Any

import jax
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from train.run_config import OptimizerConfig

Axes = tuple[str | None, ...]

_NARROW = 16


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

    return jax.tree.map(decayed, axes, is_leaf=_is_axes)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def _orthogonalised(names: Axes, shape: Any) -> MuonDimensionNumbers | None:
    """Which dimensions of a parameter Muon takes as a matrix: those of the blocks' matrices, else None.

    Embedding and output projection are sparse in tokens, and a map to a few gates has no spectrum to
    level: both stay with AdamW.
    """
    if isinstance(shape, optax.MaskedNode):
        return None
    if names[:1] == ("layers",) and len(names) == 3 and "embed" in names and min(shape.shape[1:]) >= _NARROW:
        return MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return None


def make_optimizer(config: OptimizerConfig, num_steps: int, axes: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov and Hutter, 2019) with decoupled weight decay.

    "muon" gives the blocks' matrices orthogonalised momentum instead (Jordan et al., 2024), at the
    same learning rate, and Nesterov's form of Adam to the rest.

    Args:
      config: hyper-parameters.
      num_steps: length of the schedule.
      axes: tree of logical axis names, one tuple a parameter.
    """
    schedule, mask = learning_rate_schedule(config, num_steps), decay_mask(axes)
    if config.name == "muon":
        rule = optax.contrib.muon(
            schedule,
            eps=config.eps,
            weight_decay=config.weight_decay,
            weight_decay_mask=mask,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            adam_learning_rate=schedule,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(
                _orthogonalised, axes, params, is_leaf=_is_axes
            ),
        )
    else:
        rule = optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=mask,
        )
    if not config.clip_norm:
        return rule
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
