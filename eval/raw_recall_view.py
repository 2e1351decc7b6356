"""The plot of ``eval.raw_recall``: recall and error by pairs, a column for each denoiser."""

from eval import plots
from eval.results import Results

_DENOISERS = {"": "own MLP", "_linear": "linear map", "_nomlp": "none"}
_FLOOR = 1e-4  # least error drawn


def _split(name: str) -> tuple[str, str]:
    """A model's name without the suffix of its denoiser, and that suffix."""
    suffix = next((s for s in _DENOISERS if s and name.endswith(s)), "")
    return name.removesuffix(suffix), suffix


def figure(results: Results, theme: str):
    """Top-1 recall above mean square error; one line a preset, in the same colour everywhere."""
    sizes = results.settings["presets"]
    present = list(dict.fromkeys(v.where["model"] for v in results.select("accuracy", section="presets")))
    bases = list(dict.fromkeys(_split(name)[0] for name in present))
    columns = [suffix for suffix in _DENOISERS if any(_split(name)[1] == suffix for name in present)]
    made, axes = plots.grid(2, len(columns), size=(4.6, 3.6), sharex=True, sharey="row")
    for column, suffix in enumerate(columns):
        for index, base in enumerate(bases):
            look = dict(colour=plots.PALETTE[index % 8], marker=plots.MARKERS[index % 8], label=base)
            where = {"section": "presets", "model": base + suffix}
            for axis, metric in zip(axes[:, column], ("accuracy", "mse"), strict=True):
                if mine := results.select(metric, **where):
                    plots.line(axis, mine, "pairs", **look)
        top, bottom = axes[:, column]
        top.set(title=f"denoiser: {_DENOISERS[suffix]}", ylim=(-0.03, 1.03))
        bottom.set(yscale="log", ylim=(_FLOOR, 2), xlabel=f"pairs (trained at {sizes['train_pairs']})")
        plots.log_ticks(bottom, "x", sizes["test_pairs"])
    axes[0, 0].set_ylabel("top-1 recall")
    axes[1, 0].set_ylabel("mean square error")
    # Of every panel: not all presets may be in each.
    named: dict = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    axes[1, -1].legend(named.values(), named, loc="lower right", fontsize=8.5, ncols=2)
    return made
