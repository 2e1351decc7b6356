"""Tables and plots of ``eval.needle``: one heatmap of length x depth for each model."""

from eval import plots
from eval.common import cell, markdown_table
from eval.results import Results

_SPREAD = 0.1


def _models(results: Results) -> list[str]:
    return list(dict.fromkeys(v.where["model"] for v in results.select("accuracy")))


def _find(results: Results, model: str, length: int, depth: float):
    found = results.select("accuracy", model=model)
    here = [v for v in found if (v.where.get("length"), v.where.get("depth")) == (length, depth)]
    whole = [v for v in found if "length" not in v.where]  # a model that could not be trained
    return next(iter(here + whole), None)


def _spread(results: Results, value) -> str:
    """The lowest and highest seed, where training runs differ more than the interval over sequences says."""
    if value is None or value.status != "ok":
        return ""
    seeds = [v.value for v in results.select("accuracy_seed", **value.where)]
    if not seeds or max(seeds) - min(seeds) <= _SPREAD:
        return ""
    return f", seeds {min(seeds):.2f} to {max(seeds):.2f}"


def table(results: Results) -> str:
    """Accuracy by model, depth and length."""
    lengths, depths = results.settings["lengths"], results.settings["depths"]
    rows = []
    for model in _models(results):
        for depth in depths:
            found = [_find(results, model, n, depth) for n in lengths]
            rows.append([model, f"{depth:g}", *(cell(v, 2) + _spread(results, v) for v in found)])
    title = (
        f"Needle accuracy (trained at up to {results.settings['width']} tokens), 95% intervals over "
        f"sequences; seeds more than {_SPREAD} apart are named"
    )
    return f"{title}\n\n{markdown_table(['model', 'depth', *(f'{n:,} tokens' for n in lengths)], rows)}"


def figures(results: Results, theme: str) -> dict:
    """``needle``: the heatmaps."""
    names = _models(results)
    lengths, depths = results.settings["lengths"], results.settings["depths"]
    with plots.style(theme):
        columns = min(3, len(names))
        size = (1.2 + 0.62 * len(lengths), 1.5 + 0.42 * len(depths))
        figure, axes = plots.grid(-(-len(names) // columns), columns, size=size)
        for axis, name in zip(axes.flat, names, strict=False):
            cells = [[_find(results, name, n, depth) for n in lengths] for depth in depths]
            image = plots.heatmap(
                axis, cells, [f"{100 * d:g}%" for d in depths], [plots.short(n) for n in lengths], theme=theme
            )
            axis.set(title=name, xlabel="tokens", ylabel="depth of the needle")
        for axis in axes.flat[len(names) :]:
            axis.set_axis_off()
        figure.colorbar(image, ax=axes, label="accuracy", shrink=0.8)
        return {"needle": figure}
