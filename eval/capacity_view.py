"""Tables and plots of ``eval.capacity``."""

from eval import plots, raw_recall_view
from eval.common import cell, markdown_table
from eval.results import Results


def table(results: Results) -> str:
    """One Markdown table for each section that was run."""
    parts = []
    for section in results.settings["sections"]:
        parts += _TABLES[section](results)
    return "\n\n".join(parts)


def _by_pairs(
    results: Results,
    title: str,
    key: str,
    section: str,
    metric: str = "accuracy",
    digits: int = 2,
    **where,
) -> list[str]:
    """Rows by ``where[key]``, columns by pairs."""
    values = results.select(metric, source="measured", section=section, **where)
    names = list(dict.fromkeys(v.where[key] for v in values))
    loads = sorted({v.where["pairs"] for v in values})
    rows = [
        [
            name,
            *(
                cell(_only(results, metric, section=section, pairs=n, **{key: name}, **where), digits)
                for n in loads
            ),
        ]
        for name in names
    ]
    return [title, markdown_table([key, *(f"{n} pairs" for n in loads)], rows)]


def _only(results: Results, metric: str, **where):
    found = results.select(metric, source="measured", **where)
    return found[0] if found else None


def _gating_table(results: Results) -> list[str]:
    lengths = results.settings["gating_lengths"]
    rows = [
        [gate, *(cell(_only(results, "accuracy", section="gating", gate=gate, length=n), 2) for n in lengths)]
        for gate in ("none", "soft", "ideal")
    ]
    settings = results.settings
    title = (
        f"Top-1 of {settings['gating_facts']} facts among n tokens, D = {settings['gating_dimension']}; "
        f"soft gate {settings['soft_gates'][0]:g} / {settings['soft_gates'][1]:g}"
    )
    return [title, markdown_table(["write gate", *(f"n = {n:,}" for n in lengths)], rows)]


def _dtype_table(results: Results) -> list[str]:
    parts = []
    for stored in ("once", "after every write"):
        if results.select("accuracy", section="dtype", stored=stored):
            title = f"Top-1 at {results.settings['state_bytes']:,} bytes of state, stored {stored}"
            parts += _by_pairs(results, title, "dtype", "dtype", stored=stored)
    return parts


def _rules_table(results: Results) -> list[str]:
    parts = []
    for task in ("distinct", "rebound"):
        for which in ("all", "oldest quarter"):
            title = f"Top-1 by write rule, {task} keys, {which}, m x d = {results.settings['rule_shape']}"
            parts += _by_pairs(results, title, "rule", "rules", task=task, which=which)
    return parts


def _decoder_table(results: Results) -> list[str]:
    parts = []
    target = results.settings["target_mse"]
    for values in ("codebook", "gaussian"):
        for d in results.settings["decoder_dimensions"]:
            title = f"Mean square error, {values} values, D = {d} (state {2 * d} floats); claim: < {target:g}"
            where = {"values": values, "dimension": d}
            parts += _by_pairs(results, title, "decoder", "decoder", metric="mse", digits=4, **where)
    reached = results.select("pairs_below_target")
    dims = results.settings["decoder_dimensions"]
    names = list(dict.fromkeys((v.where["values"], v.where["decoder"]) for v in reached))
    rows = [
        [
            f"{values}, {decoder}",
            *(
                f"{results.one('pairs_below_target', values=values, decoder=decoder, dimension=d).value:.0f}"
                for d in dims
            ),
        ]
        for values, decoder in names
    ]
    parts += [
        f"Most pairs (of those tried) with the error's upper bound below {target:g}; 0 is none",
        markdown_table(["values, decoder", *(f"D = {d}" for d in dims)], rows),
    ]
    return parts


def _presets_table(results: Results) -> list[str]:
    sizes = results.settings["presets"]
    trained = (
        f"one block, {sizes['channels']} channels, {sizes['words']} words, trained at "
        f"{sizes['train_pairs']} pairs"
    )
    return [
        *_by_pairs(results, f"Top-1 by preset and denoiser: {trained}", "model", "presets", digits=3),
        *_by_pairs(results, "The same: mean square error", "model", "presets", metric="mse", digits=3),
    ]


_TABLES = {
    "dimension": lambda r: _by_pairs(
        r,
        f"Top-1 by dimension D (state 2D floats), vocabulary {r.settings['vocabulary']}",
        "dimension",
        "dimension",
    ),
    "vocabulary": lambda r: _by_pairs(
        r, f"Top-1 by vocabulary, D = {r.settings['vocabulary_dimension']}", "vocabulary", "vocabulary"
    ),
    "binding": lambda r: _by_pairs(r, "Top-1 by binding at equal state", "memory", "binding"),
    "gating": _gating_table,
    "dtype": _dtype_table,
    "rules": _rules_table,
    "decoder": _decoder_table,
    "presets": _presets_table,
}


def figures(results: Results, theme: str) -> dict:
    """``capacity``: a panel a section that was run; ``decoder`` and ``presets`` have their own."""
    panels = [s for s in results.settings["sections"] if s in _PANELS]
    drawn = {}
    with plots.style(theme):
        if panels:
            panels = [p for s in panels for p in _PANELS[s]]
            columns = min(3, len(panels))
            figure, axes = plots.grid(-(-len(panels) // columns), columns, size=(5.2, 4.2))
            for axis, panel in zip(axes.flat, panels, strict=False):
                panel(results, axis, theme)
            for axis in axes.flat[len(panels) :]:
                axis.set_axis_off()
            drawn["capacity"] = figure
        if "decoder" in results.settings["sections"]:
            drawn["decoder"] = _decoder_figure(results, theme)
        if results.select("accuracy", section="presets"):
            drawn["presets"] = raw_recall_view.figure(results, theme)
    return drawn


def _curves(results: Results, axis, theme: str, key: str, label, metric: str = "accuracy", **where) -> None:
    values = results.select(metric, source="measured", **where)
    names = list(dict.fromkeys(v.where[key] for v in values))
    for index, name in enumerate(names):
        colour = plots.PALETTE[index % len(plots.PALETTE)]
        theory = results.select(metric, source="theory", **where, **{key: name})
        measured = results.select(metric, source="measured", **where, **{key: name})
        solid = {} if not theory else {"ls": "none"}
        plots.line(
            axis,
            measured,
            "pairs",
            label=label(name),
            colour=colour,
            marker=plots.MARKERS[index % 8],
            **solid,
        )
        if theory:
            theory = sorted(theory, key=lambda v: v.where["pairs"])
            axis.plot([v.where["pairs"] for v in theory], [v.value for v in theory], color=colour, lw=1.5)
    plots.log_ticks(axis, "x", sorted({v.where["pairs"] for v in values}))
    axis.set_xlabel("pairs stored N")
    if metric == "accuracy":
        axis.set(ylabel="top-1 recall", ylim=(-0.03, 1.03))


def _dimension_panel(results: Results, axis, theme: str) -> None:
    _curves(results, axis, theme, "dimension", lambda d: f"D = {d:,}", section="dimension")
    axis.set_title("Dimension: Monte Carlo (marks), theory (lines)")
    axis.legend(loc="lower left")


def _snr_panel(results: Results, axis, theme: str) -> None:
    values = results.select("snr", source="measured", section="dimension")
    for index, d in enumerate(dict.fromkeys(v.where["dimension"] for v in values)):
        mine = [v for v in values if v.where["dimension"] == d]
        axis.plot(
            [2 * d / v.where["pairs"] for v in mine],
            [v.value for v in mine],
            plots.MARKERS[index % 8],
            color=plots.PALETTE[index % 8],
            ls="none",
            label=f"D = {d:,}",
        )
    ends = [min(2 * v.where["dimension"] / v.where["pairs"] for v in values)]
    ends.append(max(2 * v.where["dimension"] / v.where["pairs"] for v in values))
    axis.plot(ends, [e**0.5 for e in ends], color=plots.ink(theme), lw=1.2, ls="--", label="sqrt(2D/N)")
    axis.set(
        xscale="log", yscale="log", xlabel="state numbers per pair, 2D/N", ylabel="signal-to-noise ratio"
    )
    axis.set_title("SNR against theory")
    axis.legend(loc="upper left")


def _vocabulary_panel(results: Results, axis, theme: str) -> None:
    _curves(results, axis, theme, "vocabulary", lambda v: f"{v:,} words", section="vocabulary")
    axis.set_title(f"Vocabulary, D = {results.settings['vocabulary_dimension']:,}")
    axis.legend(loc="lower left")


def _binding_panel(results: Results, axis, theme: str) -> None:
    values = results.select("accuracy", source="measured", section="binding")
    for index, name in enumerate(dict.fromkeys(v.where["memory"] for v in values)):
        mine = results.select("accuracy", source="measured", section="binding", memory=name)
        look = {"ls": "-" if name.startswith("outer") else ":", "marker": plots.MARKERS[index % 2]}
        plots.line(axis, mine, "pairs", label=name, colour=plots.PALETTE[index // 2], **look)
    plots.log_ticks(axis, "x", sorted({v.where["pairs"] for v in values}))
    axis.set(xlabel="pairs stored N", ylabel="top-1 recall", ylim=(-0.03, 1.03))
    axis.set_title("Binding at equal state")
    axis.legend(loc="lower left")


def _gating_panel(results: Results, axis, theme: str) -> None:
    names = {"none": "no gate", "soft": "soft gate", "ideal": "ideal gate"}
    for index, (gate, label) in enumerate(names.items()):
        mine = results.select("accuracy", source="measured", section="gating", gate=gate)
        colour = plots.PALETTE[(1, 0, 2)[index]]
        plots.line(axis, mine, "length", label=label, colour=colour, marker=plots.MARKERS[index], ls="none")
        bound = sorted(
            results.select("accuracy", source="theory", section="gating", gate=gate),
            key=lambda v: v.where["length"],
        )
        axis.plot([v.where["length"] for v in bound], [v.value for v in bound], color=colour, lw=1.5)
    plots.log_ticks(axis, "x", results.settings["gating_lengths"])
    axis.set(xlabel="tokens read", ylabel="top-1 recall of the facts", ylim=(-0.03, 1.03))
    axis.set_title(
        f"{results.settings['gating_facts']} facts in a stream, D = {results.settings['gating_dimension']:,}"
    )
    axis.legend(loc="center right")


def _dtype_panel(results: Results, axis, theme: str) -> None:
    for index, dtype in enumerate(results.settings["dtypes"]):
        for stored, ls in (("once", "-"), ("after every write", ":")):
            mine = results.select("accuracy", section="dtype", dtype=dtype, stored=stored)
            if mine:
                label = dtype if stored == "once" else f"{dtype}, re-stored each write"
                look = {"colour": plots.PALETTE[index], "marker": plots.MARKERS[index], "ls": ls}
                plots.line(axis, mine, "pairs", label=label, **look)
    plots.log_ticks(axis, "x", results.settings["pairs"])
    axis.set(xlabel="pairs stored N", ylabel="top-1 recall", ylim=(-0.03, 1.03))
    axis.set_title(f"State dtype at {plots.short(results.settings['state_bytes'])} bytes")
    axis.legend(loc="lower left", fontsize=8.5)


def _rule_panel(task: str, which: str):
    def draw(results: Results, axis, theme: str) -> None:
        values = results.select("accuracy", section="rules", task=task, which=which)
        for index, rule in enumerate(dict.fromkeys(v.where["rule"] for v in values)):
            mine = [v for v in values if v.where["rule"] == rule]
            look = {"ls": "--", "lw": 1.3} if rule == "least squares" else {}
            colour = plots.muted(theme) if look else plots.PALETTE[index]
            plots.line(axis, mine, "pairs", label=rule, colour=colour, marker=plots.MARKERS[index], **look)
        plots.log_ticks(axis, "x", results.settings["rule_pairs"])
        axis.set(xlabel="pairs stored N", ylabel="top-1 recall", ylim=(-0.03, 1.03))
        axis.set_title(f"Write rule, {task} keys, {which}")
        axis.legend(loc="lower left")

    return draw


_PANELS = {
    "dimension": (_dimension_panel, _snr_panel),
    "vocabulary": (_vocabulary_panel,),
    "binding": (_binding_panel,),
    "gating": (_gating_panel,),
    "dtype": (_dtype_panel,),
    "rules": (
        _rule_panel("distinct", "all"),
        _rule_panel("distinct", "oldest quarter"),
        _rule_panel("rebound", "all"),
    ),
}


_FLOOR = 1e-4  # least error drawn; what is smaller stands on the axis


def _decoder_figure(results: Results, theme: str):
    dims = results.settings["decoder_dimensions"]
    target = results.settings["target_mse"]
    loads = results.settings["decoder_pairs"]
    figure, axes = plots.grid(2, len(dims), size=(4.6, 3.8), sharex=True, sharey=True)
    names = {"linear": "linear", "mlp": "linear + MLP denoiser", "nearest": "nearest word (ideal clean-up)"}
    for row, values in enumerate(("codebook", "gaussian")):
        for axis, d in zip(axes[row], dims, strict=True):
            where = {"section": "decoder", "values": values, "dimension": d}
            for index, (decoder, label) in enumerate(names.items()):
                mine = results.select("mse", source="measured", decoder=decoder, **where)
                if not mine:
                    continue
                mine = sorted(mine, key=lambda v: v.where["pairs"])
                axis.plot(
                    [v.where["pairs"] for v in mine],
                    [max(v.value, _FLOOR) for v in mine],
                    color=plots.PALETTE[(1, 0, 2)[index]],
                    marker=plots.MARKERS[index],
                    label=label,
                    clip_on=False,
                )
            bound = sorted(results.select("mse", source="theory", **where), key=lambda v: v.where["pairs"])
            axis.plot(
                [v.where["pairs"] for v in bound],
                [max(v.value, _FLOOR) for v in bound],
                color=plots.ink(theme),
                lw=1.2,
                ls="--",
                label="linear optimum, theory",
            )
            axis.axhline(target, color=plots.muted(theme), lw=1.2, ls=":")
            place = dict(ha="right", va="bottom", transform=axis.get_yaxis_transform())
            axis.text(1, target, f"claim {target:g} ", fontsize=9, color=plots.muted(theme), **place)
            axis.set_yscale("log")
            axis.set_ylim(_FLOOR, 2)
            plots.log_ticks(axis, "x", loads)
            axis.set_title(f"{values} values, D = {d:,}")
            axis.set_xlabel("pairs stored N" if row else "")
        axes[row, 0].set_ylabel("mean square error")
    axes[0, -1].legend(loc="upper left", fontsize=8.5)
    axes[1, 0].set_xlabel(f"pairs stored N (on the axis: at most {_FLOOR:g})")
    return figure
