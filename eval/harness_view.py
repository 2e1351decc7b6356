"""Table and plot of ``eval.harness``: a panel a metric, a row a task."""

from eval import plots
from eval.common import cell, markdown_table
from eval.results import Results, Value


def table(results: Results) -> str:
    """One row a task and metric."""
    rows = [[v.where["task"], v.metric, v.where["filter"], v.n, cell(v)] for v in results.values]
    return markdown_table(["task", "metric", "filter", "n", "score"], rows)


def _row(value: Value) -> str:
    chosen = value.where["filter"]
    return value.where["task"] if chosen == "none" else f"{value.where['task']} ({chosen})"


def figures(results: Results, theme: str) -> dict:
    """``scores``: the value of every task by metric, with the harness's own intervals."""
    metrics = list(dict.fromkeys(v.metric for v in results.values))
    if not metrics:
        return {}
    most = max(len(results.select(metric)) for metric in metrics)
    with plots.style(theme):
        figure, axes = plots.grid(
            len(metrics), 1, size=(7.0, 1.3 + 0.35 * most), title=results.values[0].where["model"]
        )
        for index, (metric, axis) in enumerate(zip(metrics, axes[:, 0], strict=True)):
            found = results.select(metric)
            for place, value in enumerate(found):
                spread = [[value.value - value.low], [value.high - value.value]]
                axis.errorbar(
                    [value.value], [place], xerr=spread, color=plots.colour("", index), marker="o", capsize=3
                )
            axis.set_yticks(range(len(found)), [f"{_row(v)}, n = {v.n}" for v in found])
            axis.set_ylim(len(found) - 0.5, -0.5)
            axis.set_title(metric)
    return {"scores": figure}
