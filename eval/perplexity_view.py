"""Tables and plots of ``eval.perplexity``."""

from eval import plots
from eval.common import cell, markdown_table
from eval.results import Results


def label(where) -> str:
    """A protocol in words."""
    if where["protocol"] == "document":
        return "streamed from the beginning"
    if where["protocol"] == "non_overlapping":
        return f"separate windows of {plots.short(where['window'])}"
    return f"sliding windows of {plots.short(where['window'])} by {plots.short(where['stride'])}"


def _protocols(results: Results) -> list[dict]:
    keys = ("model", "protocol", "window", "stride")
    found = [{k: v.where[k] for k in keys} for v in results.select("nats")]
    return [dict(pairs) for pairs in dict.fromkeys(tuple(f.items()) for f in found)]


def _subsets(results: Results) -> list[str]:
    return list(dict.fromkeys(v.where["subset"] for v in results.select("nats")))


def _models(results: Results) -> list[str]:
    return list(dict.fromkeys(v.where["model"] for v in results.select("nats")))


def _named(results: Results, protocol: dict) -> str:
    """A protocol in words, after the model's name where there are several models."""
    return f"{protocol['model']}: {label(protocol)}" if len(_models(results)) > 1 else label(protocol)


def _first(values):
    return values[0] if values else None


def _buckets(results: Results) -> list[str]:
    return list(
        dict.fromkeys(v.where["bucket"] for v in results.select("nats") if v.where["bucket"] != "all")
    )


def table(results: Results) -> str:
    """Whole-document numbers by protocol and subset, then nats by position."""
    rows, by_position = [], []
    buckets = _buckets(results)
    for subset in _subsets(results):
        for protocol in _protocols(results):
            where = {**protocol, "subset": subset}
            nats = _first(results.select("nats", bucket="all", **where))
            perplexity = _first(results.select("perplexity", bucket="all", **where))
            bits = _first(results.select("bits_per_byte", bucket="all", **where))
            rows.append([_named(results, protocol), subset, cell(nats), cell(perplexity, 2), cell(bits)])
            cells = [cell(_first(results.select("nats", bucket=b, **where))) for b in buckets]
            by_position.append([_named(results, protocol), subset, *cells])
    return "\n\n".join(
        (
            "Whole documents, 95% intervals",
            markdown_table(["protocol", "subset", "nats per token", "perplexity", "bits per byte"], rows),
            "Nats per token by position in the document",
            markdown_table(["protocol", "subset", *buckets], by_position),
        )
    )


def figures(results: Results, theme: str) -> dict:
    """``perplexity``: nats by position, one line a protocol (and model), one panel a subset.

    Lines of one model share a colour where there are several models, else each protocol has its own.
    """
    subsets, models = _subsets(results), _models(results)
    buckets = _buckets(results)
    kinds = list(dict.fromkeys(map(label, _protocols(results))))
    if not buckets:
        return {}
    with plots.style(theme):
        columns = min(3, len(subsets))
        figure, axes = plots.grid(
            -(-len(subsets) // columns), columns, size=(5.8, 4.2 if len(models) == 1 else 6.2)
        )
        for axis, subset in zip(axes.flat, subsets, strict=False):
            for index, protocol in enumerate(_protocols(results)):
                found = [_first(results.select("nats", bucket=b, subset=subset, **protocol)) for b in buckets]
                present = [(x, v) for x, v in enumerate(found) if v is not None and v.status == "ok"]
                number = models.index(protocol["model"]) if len(models) > 1 else index
                look = {
                    "color": plots.PALETTE[number % 8],
                    "ls": {"document": "-", "non_overlapping": "--", "sliding": ":"}[protocol["protocol"]],
                    "marker": plots.MARKERS[kinds.index(label(protocol)) % 8],
                }
                xs = [x for x, _ in present]
                axis.plot(xs, [v.value for _, v in present], label=_named(results, protocol), **look)
                if (
                    protocol["protocol"] == "document" or len(models) == 1
                ):  # bands of all protocols of all models would hide the lines
                    lows, highs = [v.low for _, v in present], [v.high for _, v in present]
                    axis.fill_between(xs, lows, highs, color=look["color"], alpha=0.12, lw=0)
            names = ["-".join(plots.short(float(edge)) for edge in b.split("-")) for b in buckets]
            axis.set_xticks(range(len(buckets)), names)
            axis.set(xlabel="position in the document", ylabel="nats per token")
            axis.set_title("all documents" if subset == "all" else subset or "no subset")
        for axis in axes.flat[len(subsets) :]:
            axis.set_axis_off()
        handles, labels = axes.flat[0].get_legend_handles_labels()
        if len(models) > 1:
            figure.legend(
                handles,
                labels,
                loc="outside lower center",
                ncols=1 if columns == 1 else len(models),
                fontsize=8.5,
            )
        else:
            axes.flat[0].legend()
        return {"perplexity": figure}
