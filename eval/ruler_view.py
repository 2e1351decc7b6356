"""Tables and plots of ``eval.ruler``: a heatmap of length x depth a single task, rows of the others."""

from eval import plots
from eval.common import cell, markdown_table
from eval.results import Results
from eval.ruler_tasks import SINGLES


def _models(results: Results) -> list[str]:
    return list(dict.fromkeys(v.where["model"] for v in results.select("score", source="measured")))


def _find(results: Results, model: str, task: str, length: int, depth: float | None):
    found = results.select("score", source="measured", model=model, task=task, length=length)
    found = [v for v in found if v.where["depth"] == depth]
    return found[0] if found else None


def _depths(results: Results, task: str) -> list[float | None]:
    return list(results.settings["depths"]) if task in SINGLES else [None]


def table(results: Results) -> str:
    """Scores by task, depth and length, then the published ones."""
    lengths = results.settings["lengths"]
    parts = []
    for model in _models(results):
        rows = [
            [
                task,
                "any" if depth is None else f"{depth:g}",
                *(cell(_find(results, model, task, n, depth), 2) for n in lengths),
            ]
            for task in results.settings["tasks"]
            for depth in _depths(results, task)
        ]
        parts += [
            f"{model}: share of expected strings in the answer, 95% intervals",
            markdown_table(["task", "depth", *(f"{n:,} tokens" for n in lengths)], rows),
        ]
    others = results.select("score", source="published")
    if others:
        sizes = sorted({v.where["length"] for v in others})
        names = list(dict.fromkeys((v.where["model"], v.where["task"]) for v in others))
        by_cell = {(v.where["model"], v.where["task"], v.where["length"]): v for v in others}
        parts += [
            f"Published by others, not measured here ({others[0].detail})",
            markdown_table(
                ["model", "task", *(f"{n:,} tokens" for n in sizes)],
                [[m, t, *(cell(by_cell.get((m, t, n))) for n in sizes)] for m, t in names],
            ),
        ]
    return "\n\n".join(parts)


def figures(results: Results, theme: str) -> dict:
    """``ruler``: one heatmap a single task, one for all others; a row of them a model."""
    lengths, models = results.settings["lengths"], _models(results)
    singles = [t for t in results.settings["tasks"] if t in SINGLES]
    others = [t for t in results.settings["tasks"] if t not in SINGLES]
    panels = [(t, results.settings["depths"], [(t, d) for d in results.settings["depths"]]) for t in singles]
    if others:
        panels.append(("several needles", others, [(t, None) for t in others]))
    tallest = max(len(names) for _, names, _ in panels)
    with plots.style(theme):
        size = (1.9 + 0.62 * len(lengths), 1.6 + 0.42 * tallest)
        figure, axes = plots.grid(len(models), len(panels), size=size)
        for model, row in zip(models, axes, strict=True):
            for axis, (title, names, keys) in zip(row, panels, strict=True):
                cells = [[_find(results, model, task, n, depth) for n in lengths] for task, depth in keys]
                labels = [n if isinstance(n, str) else f"{100 * n:g}%" for n in names]
                image = plots.heatmap(axis, cells, labels, [plots.short(n) for n in lengths], theme=theme)
                axis.set(title=title, xlabel="tokens", ylabel="" if title == "several needles" else "depth")
            if len(models) > 1:
                row[0].set_ylabel(f"{model}\n{row[0].get_ylabel()}")
        figure.colorbar(image, ax=axes, label="score", shrink=0.8)
        return {"ruler": figure}
