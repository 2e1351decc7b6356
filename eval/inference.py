"""Inference on this device: what reading costs in memory, what a token costs, what fewer bits cost.

* reading: peak memory of reading 4k, 64k and 1M tokens, each in a process of its own;
* latency: a token after 1k and after 1M tokens;
* decoding: tokens a second by batch and context, a block of tokens begun before the last one is waited for
  as ``generate`` does it (single tokens one by one), beside attention with its cache in the same code, as a
  share of the bound set by reading weights and state once at this device's copy bandwidth (all of the state:
  memories with the residues of their sums, tails, caches), and of the traffic of a token as it is decoded;
* storage, logits: capacity and logit error of states in bfloat16, int8 and int4;
* drift: error of the running sum over a million steps.

A control fails (exit code 1) if peak memory differs by more than 2% or latency by more than 3%.
"""

import dataclasses
import sys

from eval import common
from eval.common import Reporter
from eval.inference_parts import decoding, drift, logits, reading, storage
from eval.inference_view import figures, table
from eval.speed_parts import floors
from eval.speed_parts.models import MODELS, Size
from holo_jax.generate import STATE_DTYPES
from holo_jax.precision import Precision

PARTS = ("reading", "latency", "decoding", "storage", "logits", "drift")


@dataclasses.dataclass(frozen=True)
class Settings:
    """See configs/eval/inference.py."""

    parts: tuple[str, ...]
    layers: int
    width: int
    vocab: int
    activations: str
    piece: int
    lengths: tuple[int, ...]
    latency_contexts: tuple[int, ...]
    decoders: tuple[str, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int
    single_steps: bool
    large: tuple[int, ...]
    samples: int
    copy_bytes: int
    matrix: int
    workers: int
    storage_bytes: int
    storage_pairs: tuple[int, ...]
    storage_alternatives: int
    storage_trials: int
    logit_tokens: int
    run: str
    drift_steps: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"parts names {part!r}; it must be one of {', '.join(PARTS)}")
        if len(self.large) not in (0, 2):
            raise ValueError(f"large is {self.large}; it must be (layers, width), or empty for none")
        Precision(storage=self.activations)
        for text in self.decoders:
            model, _, dtype = text.partition(":")
            if model not in MODELS or (dtype or "float32") not in STATE_DTYPES:
                raise ValueError(
                    f"decoders names {text!r}; it must be one of {', '.join(MODELS)}, with :DTYPE or without"
                )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "seed" else 65 if field.name == "logit_tokens" else 1
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers and field.name != "large":
                raise ValueError(f"{field.name} is empty; it needs at least one entry")
            for number in numbers:
                if isinstance(number, int) and not isinstance(number, bool) and number < least:
                    raise ValueError(f"{field.name} is {value}; it must be at least {least}")


def evaluate(settings: Settings, reporter: Reporter) -> None:
    """The chosen parts; reading first, in processes that find the device free."""
    size = Size(settings.layers, settings.width, settings.vocab)
    seed = settings.seed
    if "reading" in settings.parts:
        reading.run(reporter, size, settings.activations, settings.lengths, settings.piece, seed)
        reporter.save()
    if "latency" in settings.parts:
        decoding.latency(
            reporter,
            size,
            settings.activations,
            settings.latency_contexts,
            piece=settings.piece,
            steps=settings.steps,
            samples=settings.samples,
            seed=seed,
        )
        reporter.save()
    if "decoding" in settings.parts:
        ceilings = floors.measure(
            reporter,
            copy_bytes=settings.copy_bytes,
            matrix=settings.matrix,
            samples=settings.samples,
            least_seconds=0.03,
        )
        shared = dict(activations=settings.activations, steps=settings.steps, seed=seed)
        planned = decoding.plan(
            settings.decoders,
            size,
            batches=settings.batches,
            contexts=settings.contexts,
            single_steps=settings.single_steps,
            **shared,
        )
        if settings.large:
            large = Size(*settings.large, settings.vocab)
            planned += decoding.plan(
                ("holo",), large, batches=(1,), contexts=(), single_steps=False, **shared
            )
        decoding.run(reporter, planned, samples=settings.samples, ceilings=ceilings, workers=settings.workers)
        reporter.save()
    if "storage" in settings.parts:
        storage.run(
            reporter,
            total_bytes=settings.storage_bytes,
            pairs=settings.storage_pairs,
            alternatives=settings.storage_alternatives,
            trials=settings.storage_trials,
            seed=seed,
        )
        reporter.save()
    if "logits" in settings.parts:
        logits.run(reporter, run_directory=settings.run, tokens=settings.logit_tokens, seed=seed)
    if "drift" in settings.parts:
        drift.run(reporter, settings.drift_steps, seed)


def main(argv: list[str] | None = None) -> int:
    """Runs the evaluation; returns the exit code."""
    return common.run("inference", Settings, evaluate, figures=figures, table=table, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
