"""Settings of the evaluations: one file each, with a "full" and a "quick" variant.

``--config=configs/eval/NAME.py`` is the full one, ``--config=configs/eval/NAME.py:quick`` the quick one.
"""

import difflib

from ml_collections import ConfigDict


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
