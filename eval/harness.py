"""lm-evaluation-harness on a checkpoint: ``pip install holo-jax[eval]``, then any of its tasks.

With ``include_path`` tasks are read from a directory of YAML files only, and nothing is looked up online.
Requests that do not fit raise an error: nothing is truncated. Values: the harness's metrics by (task,
filter), with its own standard error as a normal 95% interval.
"""

import dataclasses
import os
import sys

from eval import common
from eval.common import Reporter, UsageError
from eval.harness_view import figures, table
from eval.opened import open_model, require_checkpoint
from eval.results import Value

_Z = 1.959963984540054


@dataclasses.dataclass(frozen=True)
class Settings:
    """See configs/eval/harness.py."""

    checkpoint: str
    random_model: dict
    tasks: tuple[str, ...]
    include_path: str
    num_fewshot: int
    limit: int
    max_length: int
    rows: int
    piece: int
    seed: int

    def __post_init__(self) -> None:
        require_checkpoint(self.checkpoint)
        if not self.tasks:
            raise ValueError("tasks is empty; name at least one task")
        if self.num_fewshot < -1:
            raise ValueError(f"num_fewshot is {self.num_fewshot}; it must be -1 (the task's own), 0 or more")
        for name in ("limit", "max_length", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be zero or positive")


def evaluate(settings: Settings, reporter: Reporter) -> None:
    """Runs the tasks.

    Raises:
      UsageError: without lm_eval, saying how to install it; for a request that does not fit.
    """
    if settings.include_path:
        # The harness's data library asks its hub for newer versions unless it is told not to.
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise UsageError(f"{error}; install the extra: pip install 'holo-jax[eval]'") from error
    from eval.lm import HoloLM, TruncationError

    opened = open_model(settings.checkpoint, settings.random_model)
    model = HoloLM(opened, max_length=settings.max_length, rows=settings.rows, piece=settings.piece)
    manager = TaskManager(
        include_path=settings.include_path or None, include_defaults=not settings.include_path
    )
    reporter.steps.expect(1)
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(settings.tasks),
            task_manager=manager,
            num_fewshot=None if settings.num_fewshot < 0 else settings.num_fewshot,
            limit=settings.limit or None,
            log_samples=False,
            bootstrap_iters=1000,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    except TruncationError as error:
        raise UsageError(str(error)) from error
    reporter.steps.done("lm_eval")
    counts = found["n-samples"]
    for task, entries in sorted(found["results"].items()):
        for name, number in sorted(entries.items(), key=lambda item: str(item[0])):
            metric, comma, chosen = str(name).partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(number, int | float):
                continue
            n = int(counts[task]["effective"]) if task in counts else 1
            error = entries.get(f"{metric}_stderr,{chosen}")
            where = {"model": opened.name, "task": task, "filter": chosen}
            known = isinstance(error, int | float)
            low, high = (number - _Z * error, number + _Z * error) if known else (number, number)
            kind = "normal" if known else "exact"
            detail = "" if known else "the harness gives no standard error"
            reporter.add(Value(metric, where, float(number), float(low), float(high), n, kind, detail=detail))
    reporter.note(f"lm_eval {lm_eval.__version__ if hasattr(lm_eval, '__version__') else ''}".strip())


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line; returns the exit code."""
    return common.run("harness", Settings, evaluate, figures=figures, table=table, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
