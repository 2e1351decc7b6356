"""Compiling what Triton's autotuner tries on threads, all of a kernel's candidates at a time.

Triton compiles and times one candidate after the other: the models of ``fla`` need minutes before their first
step, nearly all of it compiling on one core. What is tried, timed and chosen stays Triton's.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def compile_candidates_together(workers: int | None = None) -> bool:
    """From here on, in this process, candidates compile on ``workers`` threads (one a core by default).

    A candidate that does not compile is left to Triton, which meets the same error and passes it over.

    Returns:
      Whether this Triton can; if not, candidates compile one by one as always.
    """
    from triton.runtime.autotuner import Autotuner

    try:
        from triton import AsyncCompileMode
    except ImportError:
        return False

    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    # The autotuner asks for candidates exactly when it is about to time them.
    candidates_of = Autotuner.prune_configs

    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        candidates = candidates_of(self, kwargs)
        given = {name: value for name, value in kwargs.items() if name != "warmup"}
        with AsyncCompileMode(pool, ignore_errors=True):
            for one in candidates:
                self.fn.warmup(*self.nargs.values(), **given, **one.all_kwargs())
        return candidates

    Autotuner.prune_configs = prune_configs
    return True
