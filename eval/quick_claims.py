"""What the numbers of a quick run must show: answers that are known at its size."""

import math
from collections.abc import Callable, Iterator, Mapping

from eval import inference_view
from eval.results import Results


def _perplexity(results: Results) -> Iterator[str]:
    """An untrained model knows nothing: every byte, and each of two marks, is as likely as any other."""
    found = results.select("perplexity", bucket="all")
    bits = results.select("bits_per_byte")
    if len(bits) != 3 or not found:
        yield f"{len(found)} perplexities and {len(bits)} bits per byte; three protocols give three"
    yield from (f"perplexity {v.value}; it must be near 258" for v in found if abs(v.value / 258 - 1) > 0.02)
    want = math.log2(258)
    yield from (f"{v.value} bits; it must be near {want:.2f}" for v in bits if abs(v.value / want - 1) > 0.01)


def _speed(results: Results) -> Iterator[str]:
    """Every time of the memory op or the mixer beside its floor, every step with its rate."""
    asked = {*results.settings["train"], *results.settings["train_long"]}
    rates = results.select("tokens_per_second", part="train")
    if len(rates) != len(asked):
        yield f"{len(rates)} rates of {len(asked)} train steps"
    for value in results.select("milliseconds"):
        if value.value <= 0:
            yield f"{value.value} ms at {dict(value.where)}"
        if "direction" in value.where and not results.select("floor_milliseconds", **value.where):
            yield f"no floor for the time at {dict(value.where)}"


def _inference(results: Results) -> Iterator[str]:
    """Few pairs are read back from eight bits, more than the state holds are not; its sums do not drift."""
    if not results.select("peak_ratio", part="reading"):
        yield "the memory of reading was not compared"
    few, many = (pick(results.settings["storage_pairs"]) for pick in (min, max))
    where = dict(part="storage", mode="once")
    if results.one("accuracy", state_dtype="int8", pairs=few, **where).value != 1:
        yield f"{few} pairs are not all read back from int8"
    if results.one("accuracy", state_dtype="compensated", pairs=many, **where).value >= 0.5:
        yield f"{many} pairs are read back, more than the state can hold"
    steps = max(results.settings["drift_steps"])
    plain, ours = (
        results.one("relative_error", inputs="coherent", method=method, steps=steps).value
        for method in ("plain", "compensated")
    )
    if not ours < 1e-12 < 1e-5 < plain:
        yield f"after {steps} steps a plain sum is off by {plain}, the compensated by {ours}"
    error = results.one("logit_error", state_dtype="int8", mode="once").value
    if not 0 < error < 0.1:
        yield f"logits of an int8 state are off by {error} of their spread"
    rates = results.select("tokens_per_second", part="decoding")
    models = {name.split(":")[0] for name in results.settings["decoders"]}
    if {v.where["model"] for v in rates} != models or not all(v.value > 0 for v in rates):
        yield f"not every one of {sorted(models)} decodes"
    text = inference_view.table(results)
    words = ("ms a token", "share of bound", "int4, rounded every", "nats a token more", "relative error")
    yield from (f"the table says nothing of {word!r}" for word in words if word not in text)


CLAIMS: Mapping[str, Callable[[Results], Iterator[str]]] = {
    "perplexity": _perplexity,
    "speed": _speed,
    "inference": _inference,
}
