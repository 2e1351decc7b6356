"""Table and plots of ``eval.inference``."""

from eval import plots
from eval.common import cell, markdown_table
from eval.results import Results, Value


def _one(results: Results, metric: str, **where: object) -> Value | None:
    found = results.select(metric, **where)
    return found[0] if found else None


def table(results: Results) -> str:
    """One table a part, those that were measured."""
    parts = [_reading(results), _latency(results), _decoding(results), _storage(results), _logits(results)]
    return "\n\n".join(text for text in [*parts, _drift(results)] if text)


def _reading(results: Results) -> str:
    rows = []
    for value in results.select("peak_bytes", part="reading"):
        rate, state = (
            _one(results, metric, **value.where) for metric in ("tokens_per_second", "state_bytes")
        )
        peak = f"{value.value / 2**20:,.1f}" if value.status == "ok" else value.status
        size = f"{state.value / 2**20:,.2f}" if state else ""
        rows.append((value.where["model"], f"{value.where['tokens']:,}", peak, cell(rate, 0), size))
    head = ("model", "tokens read", "peak MiB", "tokens/s", "state MiB")
    return markdown_table(head, rows) if rows else ""


def _latency(results: Results) -> str:
    rows = [
        (f"{value.where['context']:,}", cell(value))
        for value in results.select("milliseconds_per_step", part="latency")
    ]
    if ratio := _one(results, "latency_ratio", part="latency"):
        rows.append(("ratio", cell(ratio)))
    return markdown_table(("tokens read before", "ms a token"), rows) if rows else ""


def _decoding(results: Results) -> str:
    rows = []
    for value in results.select("milliseconds_per_step", part="decoding"):
        rate, share, traffic = (
            _one(results, m, **value.where)
            for m in ("tokens_per_second", "share_of_bound", "share_of_traffic")
        )
        state = _one(results, "state_bytes", **value.where)
        where = value.where
        name = (
            where["model"]
            if where["state_dtype"] == "float32"
            else f"{where['model']} {where['state_dtype']}"
        )
        size = f"{state.value / 2**20:,.1f}" if state else ""
        context = f"{where['context']:,}" if where["context"] else "any"
        row = (
            where["width"],
            where["batch"],
            context,
            where["steps"],
            cell(value),
            cell(rate, 0),
            cell(share, 2),
            cell(traffic, 2),
            size,
        )
        rows.append((name, *row))
    head = (
        "model",
        "width",
        "batch",
        "context",
        "tokens a call",
        "ms a step",
        "tokens/s",
        "share of bound",
        "of traffic",
        "state MiB",
    )
    return markdown_table(head, rows) if rows else ""


def _storage(results: Results) -> str:
    values = results.select("accuracy", part="storage")
    if not values:
        return ""
    pairs = sorted({value.where["pairs"] for value in values})
    rows = []
    for dtype, mode in dict.fromkeys((v.where["state_dtype"], v.where["mode"]) for v in values):
        found = [
            cell(_one(results, "accuracy", state_dtype=dtype, mode=mode, pairs=count), 2) for count in pairs
        ]
        phasors = _one(results, "phasors", part="storage", state_dtype=dtype)
        rows.append((f"{dtype}, rounded {mode}", f"{phasors.value:,.0f}" if phasors else "", *found))
    return markdown_table(
        (f"in {results.settings['storage_bytes']:,} bytes", "phasors", *(f"{n} pairs" for n in pairs)), rows
    )


def _logits(results: Results) -> str:
    rows = []
    for value in results.select("logit_error", part="logits"):
        nats, same = (_one(results, m, **value.where) for m in ("nats_difference", "same_likeliest"))
        size = _one(results, "state_bytes", part="logits", state_dtype=value.where["state_dtype"])
        name = f"{value.where['state_dtype']}, stored {value.where['mode']}"
        rows.append((name, f"{size.value:,.0f}" if size else "", cell(value, 4), cell(nats, 4), cell(same)))
    head = ("state", "bytes", "logit error / spread", "nats a token more", "same likeliest token")
    return markdown_table(head, rows) if rows else ""


def _drift(results: Results) -> str:
    rows = [
        (v.where["inputs"], v.where["method"], f"{v.where['steps']:,}", f"{v.value:.1e}")
        for v in results.select("relative_error", part="drift")
    ]
    return markdown_table(("inputs", "sum", "steps", "relative error"), rows) if rows else ""


def figures(results: Results, theme: str) -> dict:
    """Rate over context, capacity of stored bytes, drift: as many panels as parts were measured."""
    panels = [
        draw
        for part, draw in (("decoding", _draw_rates), ("storage", _draw_storage), ("drift", _draw_drift))
        if any(value.where.get("part") == part for value in results.values)
    ]
    if not panels:
        return {}
    with plots.style(theme):
        figure, axes = plots.grid(1, len(panels), size=(5.8, 4.2))
        for draw, axis in zip(panels, axes[0], strict=True):
            draw(results, axis)
            axis.legend(loc="best")
        return {"inference": figure}


def _draw_rates(results: Results, axis) -> None:
    values = [
        v
        for v in results.select("tokens_per_second", part="decoding", state_dtype="float32")
        if v.where["steps"] > 1 and v.where["width"] == results.settings["width"]
    ]
    contexts = sorted({v.where["context"] for v in values} - {0}) or [1]
    for batch_index, batch in enumerate(sorted({v.where["batch"] for v in values})):
        for model in dict.fromkeys(v.where["model"] for v in values):
            own = [v for v in values if v.where["model"] == model and v.where["batch"] == batch]
            look = dict(
                color=plots.colour(model), marker=plots.marker(model), ls=("-", "--", ":")[batch_index % 3]
            )
            measured = [v for v in own if v.status == "ok"]
            if measured and measured[0].where["context"] == 0:
                xs, ys = contexts, [measured[0].value] * len(contexts)
            else:
                xs, ys = [v.where["context"] for v in measured], [v.value for v in measured]
            axis.plot(xs, ys, label=f"{model}, batch {batch}", **look)
    axis.set(yscale="log", xlabel="tokens of context", ylabel="tokens a second", title="Decoding")
    plots.log_ticks(axis, "x", contexts)


def _draw_storage(results: Results, axis) -> None:
    values = results.select("accuracy", part="storage")
    for index, dtype in enumerate(dict.fromkeys(v.where["state_dtype"] for v in values)):
        for mode, style in (("once", "-"), ("every", ":")):
            own = [v for v in values if (v.where["state_dtype"], v.where["mode"]) == (dtype, mode)]
            if own:
                label = dtype if mode == "once" else f"{dtype}, each write"
                look = dict(colour=plots.PALETTE[index], marker=plots.MARKERS[index], ls=style)
                plots.line(axis, own, "pairs", label=label, **look)
    size = results.settings["storage_bytes"]
    axis.set(ylim=(0, 1.02), xlabel="pairs stored", ylabel="read right", title=f"Recall from {size:,} bytes")
    plots.log_ticks(axis, "x", sorted({v.where["pairs"] for v in values}))


def _draw_drift(results: Results, axis) -> None:
    values = results.select("relative_error", part="drift")
    for index, kind in enumerate(dict.fromkeys(v.where["inputs"] for v in values)):
        for method, style in (("compensated", "-"), ("plain", "--")):
            own = [v for v in values if (v.where["inputs"], v.where["method"]) == (kind, method)]
            xs, ys = [v.where["steps"] for v in own], [max(v.value, 1e-17) for v in own]
            axis.plot(
                xs, ys, color=plots.PALETTE[index], marker="o", ls=style, label=f"{method}, {kind} inputs"
            )
    axis.set(yscale="log", xlabel="steps", ylabel="relative error", title="Drift of the running sum")
    plots.log_ticks(axis, "x", sorted({v.where["steps"] for v in values}), base=10)
