"""Tables and plots of ``eval.speed``: floors, train step beside its peers, three curves over length."""

from eval import plots
from eval.common import cell, markdown_table
from eval.inference_view import table as inference_table
from eval.results import Results, Value

# What a reader of the curves must know; also printed below the table.
CAVEATS = (
    "Flash attention needs memory linear in the length, as the phasor memory does: at a fixed number of"
    " tokens a step neither runs out of memory at 32k or later. What separates the curves is operations"
    " (attention's grow with the length of a row) and, when decoding, the cache of keys and values, which"
    " grows with every token."
)


def _one(results: Results, metric: str, **where: object) -> Value | None:
    found = results.select(metric, **where)
    return found[0] if found else None


def _peer_name(model: str) -> str:
    return f"PyTorch {model}" if not model.startswith("fla") else model


def table(results: Results) -> str:
    """Every time in one line, with its floor; every train step with rate, bytes and ratio to the peers."""
    ceilings = [
        f"{name}: {cell(value)}"
        for name in ("copy_tb_per_s", "product_tflop_per_s")
        for value in results.select(name)
    ]
    parts = ["\n".join(ceilings)] if ceilings else []
    parts += [text for part in ("memory_op", "mixer") if (text := _alone(results, part))]
    parts += [text for text in (_steps(results), _peers(results), _ratios(results)) if text]
    if results.select("tokens_per_second", part="train"):
        parts.append(CAVEATS)
    parts += [text for text in (_inference(results), *_profiles(results)) if text]
    return "\n\n".join(parts)


def _alone(results: Results, part: str) -> str:
    rows = []
    for value in results.select("milliseconds", part=part):
        where = [str(v) for k, v in value.where.items() if k != "part" and v not in ("", 0)]
        share = _one(results, "share_of_floor", **value.where)
        rows.append((" ".join(where), cell(value), cell(share)))
    return f"{part}\n\n" + markdown_table(("case", "ms", "share of floor"), rows) if rows else ""


def _rates(results: Results, part: str, names: tuple[str, ...]) -> list[tuple]:
    rows = []
    for value in results.select("tokens_per_second", part=part):
        found = [
            _one(results, metric, **value.where)
            for metric in ("share_of_product_rate", "peak_gib", "compile_seconds")
        ]
        settings = " ".join(f"{k}={value.where[k]}" for k in names if value.where.get(k) not in ("", 0))
        name = value.where["model"]
        rows.append((name, value.where["length"], settings, cell(value, 0), *(cell(v, 2) for v in found)))
    return rows


_FORM = ("remat", "unroll", "chunk", "loss", "backend", "block", "gemm", "tokens")
_HEAD = ("tokens/s", "share of product rate", "peak GiB", "compile s")


def _steps(results: Results) -> str:
    rows = _rates(results, "train", _FORM)
    return "Train step\n\n" + markdown_table(("model", "length", "form", *_HEAD), rows) if rows else ""


def _peers(results: Results) -> str:
    rows = _rates(results, "peers", ("batch",))
    return "Peers\n\n" + markdown_table(("model", "length", "rows", *_HEAD), rows) if rows else ""


def fastest(results: Results, part: str) -> dict[tuple[str, int], Value]:
    """The fastest measured step of each model and length."""
    best: dict[tuple[str, int], Value] = {}
    for value in results.select("tokens_per_second", part=part):
        key = (value.where["model"], value.where["length"])
        if value.status == "ok" and (key not in best or value.value > best[key].value):
            best[key] = value
    return best


def _ratios(results: Results) -> str:
    peers = fastest(results, "peers")
    own = fastest(results, "train")
    names = list(dict.fromkeys(name for name, _ in peers))
    rows = []
    for (model, length), value in own.items():
        cells = []
        for name in names:
            other = peers.get((name, length))
            if other is None:
                cells.append("")
                continue
            memory = [_one(results, "peak_gib", **v.where) for v in (value, other)]
            bytes_ratio = f", {memory[0].value / memory[1].value:.2f}x memory" if all(memory) else ""
            cells.append(f"{value.value / other.value:.2f}x{bytes_ratio}")
        if any(cells):
            rows.append((model, length, *cells))
    if not rows:
        return ""
    return "Fastest form over each peer at the same length\n\n" + markdown_table(
        ("model", "length", *names), rows
    )


def _inference(results: Results) -> str:
    return inference_table(results) if results.settings.get("decoders") else ""


def _profiles(results: Results) -> list[str]:
    tables: dict[str, list[tuple[str, str, str]]] = {}
    for value in results.select("kernel_milliseconds"):
        form = " ".join(f"{k}={value.where[k]}" for k in _FORM if value.where.get(k) not in (None, "", 0))
        title = f"{value.where['model']}@{value.where['length']} {form}: device time of one step"
        tables.setdefault(title, []).append((value.where["kernel"], f"{value.value:.3f}", value.detail))
    return [title + "\n\n" + markdown_table(("kernel", "ms", ""), rows) for title, rows in tables.items()]


def figures(results: Results, theme: str) -> dict:
    """``speed_throughput``, ``speed_training_memory``, ``speed_inference_memory``: those measured."""
    drawn = {}
    with plots.style(theme):
        if results.select("tokens_per_second", part="train"):
            drawn["speed_throughput"] = _over_length(
                results, "tokens_per_second", "tokens a second", "Training throughput, same tokens a step"
            )
            drawn["speed_training_memory"] = _over_length(results, "peak_gib", "GiB", "Peak memory of a step")
        if results.select("state_bytes", part="decoding"):
            drawn["speed_inference_memory"] = _inference_memory(results)
    return drawn


def _over_length(results: Results, metric: str, unit: str, title: str):
    figure, axes = plots.grid(1, 1, size=(6.4, 4.4))
    axis, lengths = axes[0, 0], set()
    for part, style in (("train", "-"), ("peers", "--")):
        best = fastest(results, part)
        for index, model in enumerate(dict.fromkeys(name for name, _ in best)):
            values = [_one(results, metric, **v.where) for (name, _), v in best.items() if name == model]
            found = [v for v in values if v is not None]
            label = model if part == "train" else _peer_name(model)
            look = dict(colour=plots.colour(model, index), marker=plots.marker(model, index), ls=style)
            plots.line(axis, found, "length", label=label, **look)
            lengths |= {v.where["length"] for v in found}
    axis.set(ylim=(0, None), xlabel="tokens a row", ylabel=unit, title=title)
    plots.log_ticks(axis, "x", sorted(lengths) or [1])
    if axis.has_data():
        axis.legend(loc="best", fontsize=8.5)
    return figure


def _inference_memory(results: Results):
    figure, axes = plots.grid(1, 1, size=(6.4, 4.4))
    axis = axes[0, 0]
    values = [
        v
        for v in results.select("state_bytes", part="decoding", state_dtype="float32")
        if v.where["steps"] > 1
    ]
    contexts = sorted({v.where["context"] for v in values} - {0}) or [1]
    batch = min(v.where["batch"] for v in values)
    for index, model in enumerate(dict.fromkeys(v.where["model"] for v in values)):
        own = [v for v in values if v.where["model"] == model and v.where["batch"] == batch]
        if own[0].where["context"] == 0:
            xs, ys = contexts, [own[0].value] * len(contexts)
        else:
            xs, ys = [v.where["context"] for v in own], [v.value for v in own]
        look = dict(color=plots.colour(model, index), marker=plots.marker(model, index))
        axis.plot(xs, [y / 2**20 for y in ys], label=model, **look)
    axis.set(yscale="log", xlabel="tokens of context", ylabel="MiB of state")
    axis.set_title(f"State that decoding carries, {batch} row{'s' if batch > 1 else ''}")
    plots.log_ticks(axis, "x", contexts)
    axis.legend(loc="best")
    return figure
