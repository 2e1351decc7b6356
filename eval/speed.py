"""How fast on this device: memory op and mixer beside their floors, train step, prefill and decode.

Nothing is timed unless the backends agree with the definition, in values and gradients, in the same process.
Times are medians over several samples, each long enough to hide the host; compilation is reported apart.
Bytes of a program are those XLA plans for it (arguments, outputs, temporaries), which is its peak.
"""

import dataclasses
import os
import sys
from importlib import metadata

from eval import common
from eval.common import Reporter, cell, markdown_table
from eval.results import Results
from eval.speed_parts import floors, gate, memory_op, mixer, train_step
from eval.speed_parts.memory_op import Op
from eval.speed_parts.models import Size, parse_variant
from eval.speed_parts.timing import say
from holo_jax import kernels

PARTS = ("memory_op", "mixer", "train")


@dataclasses.dataclass(frozen=True)
class Settings:
    """See configs/eval/speed.py."""

    parts: tuple[str, ...]
    layers: int
    width: int
    vocab: int
    tokens: int
    outer_shape: tuple[int, int, int, int, int]
    hadamard_shape: tuple[int, int, int, int]
    portable_chunks: tuple[int, ...]
    mixers: tuple[str, ...]
    train: tuple[str, ...]
    profile: tuple[str, ...]
    copy_bytes: int
    matrix: int
    samples: int
    least_seconds: float
    train_samples: int
    workers: int
    seed: int

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"parts names {part!r}; it must be one of {', '.join(PARTS)}")
        for text in (*self.mixers, *self.train, *self.profile):
            parse_variant(text)
        for name in ("layers", "width", "vocab", "tokens", "samples", "train_samples", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def memory_ops(settings: Settings, usable: tuple[str, ...]) -> list[Op]:
    """The accumulations to time: both bindings, both rules, every backend and portable chunk."""
    b, t, h, m, d = settings.outer_shape
    hb, ht, hh, hd = settings.hadamard_shape
    ops = []
    for erase in (False, True):
        for chunk in settings.portable_chunks:
            ops.append(Op("outer", erase, "portable", b, t, h, m, d, chunk=chunk))
        if "hopper" in usable:
            ops.append(Op("outer", erase, "hopper", b, t, h, m, d))
    if "hopper" in usable:
        ops.append(Op("outer", True, "hopper", b, t, h, m, d, rule="gdn2"))
    for addressing in ("content", "position"):
        for chunk in settings.portable_chunks:
            ops.append(Op("hadamard", False, "portable", hb, ht, hh, hd, hd, addressing, chunk=chunk))
    return ops


def evaluate(settings: Settings, reporter: Reporter) -> None:
    """Gate, ceilings, then the chosen parts."""
    usable = {
        b.name: ("outer",) if b.name == "hopper" else ("outer", "hadamard")
        for b in kernels.available()
        if b.usable
    }
    for backend in kernels.available():
        reporter.note(
            f"backend {backend.name}: {'usable' if backend.usable else 'not usable'}, {backend.reason}"
        )
    reporter.note(f"XLA_FLAGS: {os.environ.get('XLA_FLAGS', '')!r}")
    for name in ("jax-linear-attention", "jax-cuda13-plugin", "jax-cuda12-plugin", "torch", "triton"):
        try:
            reporter.note(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    passed = gate.run(reporter, usable, seed=settings.seed, workers=settings.workers)
    save(reporter)
    ceilings = floors.measure(
        reporter,
        copy_bytes=settings.copy_bytes,
        matrix=settings.matrix,
        samples=settings.samples,
        least_seconds=settings.least_seconds,
    )
    save(reporter)
    size = Size(settings.layers, settings.width, settings.vocab)
    options = dict(workers=settings.workers, least_seconds=settings.least_seconds)
    if "memory_op" in settings.parts:
        ops = memory_ops(settings, tuple(usable))
        memory_op.run(
            reporter, ops, passed, ceilings, seed=settings.seed, samples=settings.samples, **options
        )
        save(reporter)
    # A model with backend "auto" uses whatever is usable, so everything usable must have passed.
    sound = len(passed) == sum(len(bindings) for bindings in usable.values())
    if not sound:
        reporter.note("a backend failed the gate, so mixer and train step are not timed")
        return
    if "mixer" in settings.parts:
        variants = [parse_variant(text) for text in settings.mixers]
        mixer.run(reporter, variants, size, settings.tokens, ceilings, samples=settings.samples, **options)
        save(reporter)
    if "train" in settings.parts:
        variants = [parse_variant(text) for text in settings.train]
        profiled = [parse_variant(text) for text in settings.profile]
        train_step.run(
            reporter,
            variants,
            size,
            settings.tokens,
            ceilings,
            samples=settings.train_samples,
            profiled=profiled,
            **options,
        )


def save(reporter: Reporter) -> None:
    """Writes what there is, so that a run that is stopped leaves it."""
    say(f"{len(reporter.values)} values")
    if reporter.out is not None:
        reporter.results().write(reporter.out)


def table(results: Results) -> str:
    """Every time in one line, with its floor; every train step with its rate and bytes."""
    parts = []
    for name in ("copy_tb_per_s", "product_tflop_per_s"):
        for value in results.select(name):
            parts.append(f"{name}: {cell(value)}")
    for part in ("memory_op", "mixer"):
        rows = []
        for value in results.select("milliseconds", part=part):
            where = {k: v for k, v in value.where.items() if k != "part" and v not in ("", 0)}
            share = results.select("share_of_floor", **value.where)
            rows.append(
                (" ".join(str(v) for v in where.values()), cell(value), cell(share[0]) if share else "")
            )
        if rows:
            parts.append(f"\n{part}\n\n" + markdown_table(("case", "ms", "share of floor"), rows))
    rows = []
    for value in results.select("tokens_per_second", part="train"):
        found = [
            results.select(m, **value.where) for m in ("share_of_product_rate", "peak_gib", "compile_seconds")
        ]
        where = " ".join(f"{k}={v}" for k, v in value.where.items() if k != "part")
        rows.append((where, cell(value, 6), *(cell(f[0]) if f else "" for f in found)))
    if rows:
        head = ("train step", "tokens/s", "share of product rate", "peak GiB", "compile s")
        parts.append("\n" + markdown_table(head, rows))
    for text in dict.fromkeys(
        f"{v.where['model']}@{v.where['length']}" for v in results.select("kernel_milliseconds")
    ):
        model, length = text.split("@")
        found = results.select("kernel_milliseconds", model=model, length=int(length))
        rows = [(v.where["kernel"], f"{v.value:.3f}", v.detail) for v in found]
        parts.append(f"\n{text}: device time of one step\n\n" + markdown_table(("kernel", "ms", ""), rows))
    return "\n".join(parts)


def figures(results: Results, theme: str) -> dict:
    """Plots; none for a partial run."""
    del results, theme
    return {}


def main(argv: list[str] | None = None) -> int:
    """Runs the evaluation; returns the exit code."""
    return common.run(
        "speed",
        Settings,
        evaluate,
        figures=figures,
        table=table,
        seeds=lambda settings: (settings.seed,),
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
