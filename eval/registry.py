"""Which module draws the results of which evaluation."""

import importlib
from types import ModuleType

VIEWS = {
    "orthogonality": "eval.orthogonality",
    "capacity": "eval.capacity_view",
    "recall": "eval.recall_view",
    "needle": "eval.needle_view",
    "ruler": "eval.ruler_view",
    "perplexity": "eval.perplexity_view",
    "harness": "eval.harness_view",
    "speed": "eval.speed_view",
    "scaling": "eval.scaling",
    "inference": "eval.inference_view",
}


def view_of(evaluation: str) -> ModuleType:
    """The module with ``figures(results, theme)`` and ``table(results)`` of an evaluation.

    Raises:
      ValueError: for an evaluation that is not known.
    """
    if evaluation not in VIEWS:
        raise ValueError(f"no evaluation is called {evaluation!r}; known are {', '.join(VIEWS)}")
    return importlib.import_module(VIEWS[evaluation])
