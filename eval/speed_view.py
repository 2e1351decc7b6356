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
    " grows with every token. A row longer than that makes the step larger: without recomputation either then"
    " runs out of memory for activations of every token, not for attention's scores."
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
        settings = " ".join(f"{k}={value.where[k]}" for k in names if value.where.get(k) not in (None, "", 0))
        products = _one(results, "product_parameters", **value.where)
        millions = "" if products is None or products.value is None else f"{products.value / 1e6:.1f}"
        name, length = value.where["model"], value.where["length"]
        rows.append((name, length, settings, cell(value, 0), millions, *(cell(v, 2) for v in found)))
    return rows


_FORM = ("hd", "head", "remat", "unroll", "chunk", "loss", "backend", "block", "gemm", "graph", "tokens")
_HEAD = ("tokens/s", "M in products", "share of product rate", "peak GiB", "compile s")


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
        if results.select("tokens_per_second", part="train") or results.select(
            "tokens_per_second", part="peers"
        ):
            drawn["speed_throughput"] = _over_length(
                results, "tokens_per_second", "tokens a second", "Training throughput"
            )
            drawn["speed_training_memory"] = _over_length(
                results, "peak_gib", "GiB", "Peak memory of a training step"
            )
        if results.select("state_bytes", part="decoding") or results.select("peak_bytes", part="reading"):
            drawn["speed_inference_memory"] = _inference_memory(results)
    return drawn


def _least(results: Results) -> dict[tuple[str, int], Value]:
    """The step of the least memory of each model and length, of models whose fastest step needs more."""
    best: dict[tuple[str, int], Value] = {}
    for value in results.select("peak_gib", part="train"):
        key = (value.where["model"], value.where["length"])
        if value.status == "ok" and (key not in best or value.value < best[key].value):
            best[key] = value
    fast = fastest(results, "train")
    saving = {key[0] for key, value in best.items() if key not in fast or value.where != fast[key].where}
    return {key: value for key, value in best.items() if key[0] in saving}


def _look(peer: str) -> tuple[str, int]:
    """Name and index that give a peer its colour: that of the same mechanism here, else one of its own."""
    own = {"gla": 6, "gated_deltanet": 7}
    return {"llama": "attention", "llama_cudnn": "attention", "seed_eager": "seed"}.get(peer, peer), own.get(
        peer, 0
    )


def _over_length(results: Results, metric: str, unit: str, title: str):
    """The fastest form of each (lines), peers dashed; for memory also the least of any form (dotted)."""
    figure, axes = plots.grid(1, 1, size=(6.8, 4.6))
    axis, lengths = axes[0, 0], set()
    curves = [(part, style, fastest(results, part)) for part, style in (("train", "-"), ("peers", "--"))]
    if metric == "peak_gib":
        curves.append(("least", ":", _least(results)))
    for part, style, chosen in curves:
        for index, model in enumerate(dict.fromkeys(name for name, _ in chosen)):
            values = [_one(results, metric, **v.where) for (name, _), v in chosen.items() if name == model]
            found = [v for v in values if v is not None] + _exhausted(results, part, model, chosen)
            label = {"train": model, "peers": _peer_name(model), "least": f"{model}, least"}[part]
            name, number = (model, index) if part != "peers" else _look(model)
            look = dict(colour=plots.colour(name, number), marker=plots.marker(name, number), ls=style)
            plots.line(axis, found, "length", label=label, **look)
            lengths |= {v.where["length"] for v in found}
    axis.set(ylim=(0, None), xlabel=f"tokens a row, {_tokens(results)}", ylabel=unit, title=title)
    plots.log_ticks(axis, "x", sorted(lengths) or [1])
    if axis.has_data():
        axis.legend(loc="best", fontsize=8)
    return figure


def _exhausted(
    results: Results, part: str, model: str, measured: dict[tuple[str, int], Value]
) -> list[Value]:
    """Lengths at which no form of the model fitted; drawn as crosses."""
    values = results.select("tokens_per_second", part=part, model=model)
    absent = {v.where["length"]: v for v in values if v.status == "oom"}
    return [v for length, v in absent.items() if (model, length) not in measured]


def _tokens(results: Results) -> str:
    return f"{results.settings['tokens']:,} tokens a step (one row where it is longer)"


def _inference_memory(results: Results):
    """Peak of reading (weights included), and the state alone that decoding carries for one row."""
    figure, axes = plots.grid(1, 1, size=(6.8, 4.6))
    axis = axes[0, 0]
    states = results.select("state_bytes", part="decoding", state_dtype="float32")
    batch = min((v.where["batch"] for v in states), default=1)
    states = [v for v in states if v.where["batch"] == batch and v.where["steps"] > 1]
    peaks = [v for v in results.select("peak_bytes", part="reading") if v.status == "ok"]
    contexts = sorted({v.where["context"] for v in states} - {0} | {v.where["tokens"] for v in peaks}) or [1]
    for index, model in enumerate(dict.fromkeys(v.where["model"] for v in (*peaks, *states))):
        look = dict(color=plots.colour(model, index), marker=plots.marker(model, index))
        read = [(v.where["tokens"], v.value) for v in peaks if v.where["model"] == model]
        held = [(v.where["context"], v.value) for v in states if v.where["model"] == model]
        if held and held[0][0] == 0:
            held = [(context, held[0][1]) for context in contexts]
        rows = f"{batch} row{'s' if batch > 1 else ''}"
        for points, style, label in ((read, "-", "reading, all"), (held, "--", f"state of {rows}")):
            if points:
                xs, ys = zip(*sorted(points), strict=True)
                axis.plot(xs, [y / 2**20 for y in ys], label=f"{model}: {label}", ls=style, **look)
    axis.set(yscale="log", xlabel="tokens of context", ylabel="MiB", title="Memory of inference")
    plots.log_ticks(axis, "x", contexts)
    axis.legend(loc="best", fontsize=8)
    return figure
