"""Settings of the evaluations: one file each, with a "full" and a "quick" variant.

``--config=configs/eval/NAME.py`` is the full one, ``--config=configs/eval/NAME.py:quick`` the quick one.
"""

import difflib

from ml_collections import ConfigDict

# What ``--config.checkpoint=random`` builds: a check whose answers are known.
RANDOM_MODEL = dict(
    preset="holo",
    seed=0,
    vocab_size=258,
    hidden_size=32,
    hd_dim=32,
    head_dim=16,
    phasors=8,
    num_hidden_layers=1,
)


def training_grid(
    *,
    steps: int,
    rates: tuple[float, ...],
    log_every: int,
    seeds: tuple[int, ...] = (0, 1, 2),
    weight_decay: float = 0.1,
) -> dict:
    """Fields of ``eval.grid.Grid``: how every model of a comparison is trained."""
    return dict(
        seeds=seeds,
        rates=rates,
        steps=steps,
        warmup=0.1,
        weight_decay=weight_decay,
        clip=1.0,
        b2=0.98,
        log_every=log_every,
    )


def choose(variants: dict[str, dict], variant: str) -> ConfigDict:
    """The locked settings of one variant; every variant starts from "full" and overrides some fields.

    Raises:
      ValueError: for an unknown variant (naming the nearest) or a variant with a field that "full" lacks.
    """
    if variant not in variants:
        near = difflib.get_close_matches(variant, variants, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown variant {variant!r}; did you mean {near!r}? (one of {', '.join(variants)})"
        )
    unknown = set(variants[variant]) - set(variants["full"])
    if unknown:
        raise ValueError(f"variant {variant!r} sets {sorted(unknown)}, which the full one does not have")
    return ConfigDict({**variants["full"], **variants[variant]}).lock()
