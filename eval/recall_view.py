"""Tables and plots of ``eval.recall``."""

import math

from eval import plots
from eval.common import cell, markdown_table
from eval.published import MQAR, MQAR_ATTENTION
from eval.results import Results, Value

_LEARNED = 0.9
_BASES = ("attention", "holo", "holo_sum", "ssm", "dual", "seed")
_VARIANTS = {"_nomlp": "no MLP", "_linear": "linear MLP", "_nogate": "no output gate"}
_VARIANT_MARKERS = {"_nomlp": "D", "_linear": "v", "_nogate": "P"}
_NAMES = {
    "attention": "softmax attention",
    "holo": "holo (erase)",
    "holo_sum": "holo, pure sum",
    "ssm": "ssm (Mamba-2 style)",
    "dual": "dual (as published)",
    "seed": "seed (as published)",
}
# Where the published points lie close together their names are moved apart (points of the page).
_LABEL_OFFSETS = {"gated DeltaNet": (-36, 7), "Based": (7, -9), "GLA": (7, -5)}


def family(model: str) -> str:
    """A model's name without its size: holo_sum_4k is of the family holo_sum."""
    head, _, tail = model.rpartition("_")
    return head if tail[:1].isdigit() else model


def _split(group: str) -> tuple[str, str]:
    """A family as its base and the suffix of a variant: holo_nomlp is holo and _nomlp."""
    for suffix in _VARIANTS:
        if group.endswith(suffix):
            return group.removesuffix(suffix), suffix
    return group, ""


def _order(group: str) -> tuple[int, str]:
    base, suffix = _split(group)
    return (_BASES.index(base) if base in _BASES else len(_BASES)), suffix


def _look(group: str) -> dict:
    """Colour and marker of the base; variants are hollow, with markers of their own."""
    _, suffix = _split(group)
    index = _order(group)[0]
    look = {"color": plots.PALETTE[index % 8], "marker": plots.MARKERS[index % 8]}
    return look if not suffix else {**look, "mfc": "none", "marker": _VARIANT_MARKERS[suffix]}


def _name(group: str) -> str:
    base, suffix = _split(group)
    return ", ".join(filter(None, (_NAMES.get(base, base), _VARIANTS.get(suffix))))


def _measured(results: Results) -> list[str]:
    found = results.select("accuracy_mean", source="measured")
    return [v.where["model"] for v in found if v.status == "ok"]


def _unlearned(results: Results) -> dict[str, float]:
    """Models with less than ``_LEARNED`` validation accuracy on the training mix, and their accuracy."""
    found = {}
    for name in _measured(results):
        scores = [v.value for v in results.select("validation_accuracy", model=name) if v.status == "ok"]
        if scores and max(scores) < _LEARNED:
            found[name] = max(scores)
    return found


def _tests(results: Results) -> list[tuple[int, int]]:
    return [tuple(t) for t in results.settings["test"]]


def table(results: Results) -> str:
    """One row a model: state, chosen rate, published average, every test; absent models by their status."""
    tests = _tests(results)
    rows = []
    for value in results.select("accuracy_mean", source="measured"):
        name = value.where["model"]
        if value.status != "ok":
            rows.append([name, "", "", cell(value), *[""] * len(tests)])
            continue
        cells = [cell(results.one("accuracy", model=name, length=n, pairs=p)) for n, p in tests]
        size = results.one("state_bytes", model=name).value
        rate = results.one("rate", model=name).value
        rows.append([name, f"{size:,.0f}", f"{rate:g}", cell(value), *cells])
    averaged = results.settings["averaged"]
    head = [
        "model",
        "state bytes",
        "rate",
        f"mean of first {averaged}",
        *(f"{n} tokens, {p} pairs" for n, p in tests),
    ]
    seeds = len(results.settings["grid"]["seeds"])
    parts = [
        f"MQAR accuracy ({results.settings['setting']}): mean over {seeds} seeds, 95% interval over seeds",
        markdown_table(head, rows),
    ]
    late = _unlearned(results)
    if late:
        steps = results.settings["grid"]["steps"]
        named = ", ".join(f"{name} {score:.3f}" for name, score in late.items())
        parts.append(
            f"Had not learned the training mix after {steps:,} steps (accuracy on it below {_LEARNED}), so "
            f"their rows do not show what their state can hold: {named}"
        )
    others = results.select("accuracy_mean", source="published")
    if others:
        parts += [
            f"Published by others, not measured here ({others[0].detail})",
            markdown_table(
                ["model", "state bytes", "mean"],
                [[v.where["model"], f"{v.where['state_bytes']:,}", f"{v.value:g}"] for v in others],
            ),
        ]
    return "\n\n".join(parts)


def figures(results: Results, theme: str) -> dict:
    """``recall``: accuracy by test; ``recall_state``: state bytes against the published average."""
    drawn = {}
    with plots.style(theme):
        if _measured(results):
            drawn["recall"] = _by_test(results, theme)
            drawn["recall_state"] = _by_state(results, theme)
    return drawn


def _one_test(results: Results):
    (length, pairs), *_ = _tests(results)
    names = sorted(_measured(results), key=lambda name: _order(family(name)))
    figure, axes = plots.grid(1, 1, size=(8.0, 1.4 + 0.3 * len(names)))
    axis = axes[0, 0]
    for row, name in enumerate(names):
        value = results.one("accuracy", model=name, length=length, pairs=pairs)
        spread = [[value.value - value.low], [value.high - value.value]]
        axis.errorbar([value.value], [row], xerr=spread, capsize=3, ls="none", **_look(family(name)))
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlim=(-0.03, 1.03), xlabel=f"accuracy at {length} tokens with {pairs} pairs")
    axis.set_title("Multi-query associative recall")
    return figure


def _by_test(results: Results, theme: str):
    tests = sorted(_tests(results))
    if len(tests) == 1:
        return _one_test(results)
    figure, axes = plots.grid(1, 1, size=(max(8.0, 0.8 * len(tests) + 3.5), 4.8))
    axis = axes[0, 0]
    sizes = {}
    for name in _measured(results):
        sizes.setdefault(family(name), []).append(name)
    for group in sorted(sizes, key=_order):
        look = _look(group)
        for order, name in enumerate(
            sorted(sizes[group], key=lambda m: results.one("state_bytes", model=m).value)
        ):
            values = [results.one("accuracy", model=name, length=n, pairs=p) for n, p in tests]
            xs = range(len(tests))
            style = {"ls": ("-", "--", ":", "-.")[order % 4], **look}
            axis.plot(xs, [v.value for v in values], label=name, **style)
            axis.fill_between(
                xs, [v.low for v in values], [v.high for v in values], color=look["color"], alpha=0.15, lw=0
            )
    axis.set_xticks(range(len(tests)), [f"{plots.short(n)}\n{p}" for n, p in tests])
    longest = results.settings["width"]
    beyond = sum(n <= longest for n, _ in tests) - 0.5
    if 0 < beyond < len(tests) - 1:
        axis.axvline(beyond, color=plots.muted(theme), lw=1.2, ls="--")
        axis.text(beyond + 0.08, 1.03, "longer than trained", color=plots.muted(theme), fontsize=9.5)
    axis.set(xlabel="tokens (above) and pairs (below) of the test", ylabel="accuracy", ylim=(-0.03, 1.08))
    axis.set_title("Multi-query associative recall")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _by_state(results: Results, theme: str):
    figure, axes = plots.grid(1, 1, size=(8.6, 5.2))
    axis = axes[0, 0]
    if results.select("accuracy_mean", source="published"):
        for index, (name, points) in enumerate(MQAR.items()):
            axis.plot(
                [p[0] for p in points],
                [p[1] for p in points],
                ls=":",
                lw=1.2,
                marker=plots.MARKERS[index % 8],
                ms=6,
                mfc="none",
                color=plots.muted(theme),
            )
            axis.annotate(
                name,
                points[-1],
                xytext=_LABEL_OFFSETS.get(name, (6, -3)),
                textcoords="offset points",
                fontsize=8.5,
                color=plots.muted(theme),
            )
        axis.plot(
            [], [], ls=":", marker="o", mfc="none", color=plots.muted(theme), label="published by others"
        )
    groups: dict[str, list[tuple[float, Value]]] = {}
    for name in _measured(results):
        size = results.one("state_bytes", model=name).value
        groups.setdefault(family(name), []).append(
            (size, results.one("accuracy_mean", model=name, source=None))
        )
    late = _unlearned(results)
    for group in sorted(groups, key=_order):
        points = sorted(groups[group], key=lambda p: p[0])
        label = f"{_name(group)}, ours"
        if group.startswith("attention"):
            label += " (cache grows)"
        values = [v for _, v in points]
        unlearned = [(size, v.value) for size, v in points if v.where["model"] in late]
        if unlearned:
            axis.plot(
                *zip(*unlearned, strict=True),
                ls="none",
                marker="o",
                ms=15,
                mfc="none",
                color=plots.muted(theme),
            )
        axis.errorbar(
            [s for s, _ in points],
            [v.value for v in values],
            yerr=[[v.value - v.low for v in values], [v.high - v.value for v in values]],
            capsize=3,
            label=label,
            **_look(group),
        )
    if late:
        axis.plot(
            [],
            [],
            ls="none",
            marker="o",
            ms=11,
            mfc="none",
            color=plots.muted(theme),
            label="training task not learned",
        )
    axis.axhline(MQAR_ATTENTION, color=plots.muted(theme), lw=0.8)
    sizes = [v.value for v in results.select("state_bytes")]
    sizes += [v.where["state_bytes"] for v in results.select("accuracy_mean", source="published")]
    low, high = math.floor(math.log2(min(sizes))), math.ceil(math.log2(max(sizes)))
    plots.log_ticks(axis, "x", [2**k for k in range(low, high + 1)])
    axis.set(
        ylim=(-0.03, 1.05),
        xlabel="state in bytes (ours: float32, all layers)",
        ylabel=f"accuracy, mean of {results.settings['averaged']} tests",
        title="Recall against state size",
    )
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
