"""How fast on this device: memory op and mixer beside their floors, train step and peers, prefill and decode.

Nothing is timed unless the backends agree with the definition, in values and gradients, in the same process.
Times are medians over several samples, each long enough to hide the host; compilation is reported apart.
Bytes of a program are those XLA plans for it (arguments, outputs, temporaries), which is its peak.
"""

import dataclasses
import os
import sys
from importlib import metadata

from eval import common
from eval.common import Reporter
from eval.inference_parts import decoding, reading
from eval.speed_parts import block_gate, floors, gate, memory_op, mixer, train_step, turns
from eval.speed_parts.memory_op import Op
from eval.speed_parts.models import Size, model_binding, parse_variant
from eval.speed_parts.peers import driver as peers
from eval.speed_parts.timing import Compiler, say
from eval.speed_view import figures, table
from holo_jax import kernels
from holo_jax.functional.checks import BINDINGS, check_choice

PARTS = ("peers", "memory_op", "mixer", "train", "inference")
# Packages whose versions are noted, beside those of every result.
_NOTED = ("jax-linear-attention", "jax-cuda13-plugin", "jax-cuda12-plugin", "torch", "triton", "fla-core")


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
    bindings: tuple[str, ...]
    tilings: tuple[str, ...]
    mixers: tuple[str, ...]
    train: tuple[str, ...]
    train_long: tuple[str, ...]
    profile: tuple[str, ...]
    peers: tuple[str, ...]
    decoders: tuple[str, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    lengths: tuple[int, ...]
    piece: int
    steps: int
    copy_bytes: int
    matrix: int
    samples: int
    least_seconds: float
    train_samples: int
    train_seconds: float
    workers: int
    seed: int

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"parts names {part!r}; it must be one of {', '.join(PARTS)}")
        for binding in self.bindings:
            check_choice("bindings", binding, BINDINGS)
        for text in self.variants():
            parse_variant(text)
        for name in self._models():
            binding = model_binding(name)
            if binding and binding not in self.bindings:
                raise ValueError(f"bindings is {self.bindings!r}; it must hold {binding!r} to time {name}")
        for text in self.peers:
            peers.parse_peer(text)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < (0 if field.name == "seed" else 1):
                raise ValueError(f"{field.name} is {value}; it must be at least 1")

    def variants(self) -> tuple[str, ...]:
        """All of our models and steps that are named."""
        return (*self.mixers, *self.train, *self.train_long, *self.profile)

    def _models(self) -> dict[str, None]:
        """Models of the chosen parts, whose memory the gate must have tested."""
        timed = {"mixer": self.mixers, "train": (*self.train, *self.train_long)}
        names = [parse_variant(text).model for part in self.parts for text in timed.get(part, ())]
        if "inference" in self.parts:
            names += ["holo", *(text.partition(":")[0] for text in self.decoders)]
        return dict.fromkeys(names)


def memory_ops(settings: Settings, usable: tuple[str, ...]) -> list[Op]:
    """The accumulations to time: both bindings, both rules, every backend and portable chunk."""
    b, t, h, m, d = settings.outer_shape
    hb, ht, hh, hd = settings.hadamard_shape
    ops = []
    for erase in (False, True):
        for chunk in settings.portable_chunks:
            ops.append(Op("outer", erase, "portable", b, t, h, m, d, chunk=chunk))
        for backend in ("hopper",) if erase else ("hopper", "triton_outer"):
            if backend in usable:
                ops.append(Op("outer", erase, backend, b, t, h, m, d))
    if "hopper" in usable:
        ops.append(Op("outer", True, "hopper", b, t, h, m, d, rule="gdn2"))
    for addressing in ("content", "position"):
        for chunk in settings.portable_chunks:
            ops.append(Op("hadamard", False, "portable", hb, ht, hh, hd, hd, addressing, chunk=chunk))
        for tiling in ("", *settings.tilings) if "triton" in usable else ():
            ops.append(Op("hadamard", False, "triton", hb, ht, hh, hd, hd, addressing, rule=tiling))
    return [op for op in ops if op.binding in settings.bindings]


def evaluate(settings: Settings, reporter: Reporter) -> None:
    """Gate, ceilings, then the chosen parts."""
    covered = {"hopper": ("outer",), "triton": ("hadamard",), "triton_outer": ("outer",)}
    usable = {
        b.name: tuple(x for x in covered.get(b.name, settings.bindings) if x in settings.bindings)
        for b in kernels.available()
        if b.usable
    }
    for backend in kernels.available():
        reporter.note(
            f"backend {backend.name}: {'usable' if backend.usable else 'not usable'}, {backend.reason}"
        )
    reporter.note(f"XLA_FLAGS: {os.environ.get('XLA_FLAGS', '')!r}")
    for name in _NOTED:
        try:
            reporter.note(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    ceilings = floors.measure(
        reporter,
        copy_bytes=settings.copy_bytes,
        matrix=settings.matrix,
        samples=settings.samples,
        least_seconds=settings.least_seconds,
    )
    save(reporter)
    size = Size(settings.layers, settings.width, settings.vocab)
    asked = [peers.parse_peer(text) for text in settings.peers if "peers" in settings.parts]
    training = "train" in settings.parts
    with (
        peers.started(asked, size, settings.tokens) as others,
        Compiler(settings.workers) as compiler,
        Compiler(settings.workers, held=True) as later,
    ):
        # All compile at the same time, the longest first; nothing is timed before all of them have.
        inits: dict = {}
        steps, long_steps = (
            train_step.start(
                [parse_variant(text) for text in texts if training], size, settings.tokens, by, inits
            )
            for texts, by in ((settings.train, compiler), (settings.train_long, later))
        )
        tests = gate.Gate(usable, seed=settings.seed, compiler=compiler)
        blocks_sound = block_gate.run(reporter, seed=settings.seed)
        passed = tests.judge(reporter)
        save(reporter)
        # What a model may use must have passed: all that "auto" picks from, and what a variant names.
        serving = {parse_variant(text).backend for text in settings.variants()}
        serving |= {"portable", *kernels.AUTOMATIC}
        needed = {(name, x) for name, bindings in usable.items() if name in serving for x in bindings}
        sound = blocks_sound and needed <= passed
        if not sound:
            reporter.note("something failed the gate, so mixer and train step are not timed")
            steps, long_steps = [], []
        profiled = {parse_variant(text) for text in settings.profile}
        options = dict(
            least_seconds=settings.train_seconds,
            profiled=lambda one: getattr(one, "variant", None) in profiled,
            save=lambda: save(reporter),
        )
        turns.run(reporter, [*others, *steps], ceilings, samples=settings.train_samples, **options)
        for one in others:
            one.close()
        # Long rows have no peers to take turns with; their steps are long.
        later.release()
        few = max(1, settings.train_samples // 2)
        turns.run(reporter, long_steps, ceilings, samples=few, rounds=1, **options)
    ours(reporter, settings, size, ceilings, usable, passed, sound)


def ours(
    reporter: Reporter,
    settings: Settings,
    size: Size,
    ceilings: floors.Ceilings,
    usable: dict[str, tuple[str, ...]],
    passed: set[tuple[str, str]],
    sound: bool,
) -> None:
    """The other chosen parts."""
    options = dict(workers=settings.workers, least_seconds=settings.least_seconds, samples=settings.samples)
    if "memory_op" in settings.parts:
        ops = memory_ops(settings, tuple(usable))
        memory_op.run(reporter, ops, passed, ceilings, seed=settings.seed, **options)
        save(reporter)
    if "mixer" in settings.parts and sound:
        variants = [parse_variant(text) for text in settings.mixers]
        mixer.run(reporter, variants, size, settings.tokens, ceilings, **options)
        save(reporter)
    if "inference" in settings.parts and sound:
        inference(reporter, settings, size, ceilings)


def inference(reporter: Reporter, settings: Settings, size: Size, ceilings: floors.Ceilings) -> None:
    """Memory and rate of reading by length, and of decoding by context."""
    dtype = "bfloat16"
    models = list(dict.fromkeys(text.partition(":")[0] for text in settings.decoders))
    reading.run(reporter, size, dtype, settings.lengths, settings.piece, settings.seed, models)
    save(reporter)
    planned = decoding.plan(
        settings.decoders,
        size,
        activations=dtype,
        batches=settings.batches,
        contexts=settings.contexts,
        steps=settings.steps,
        single_steps=False,
        seed=settings.seed,
    )
    decoding.run(reporter, planned, samples=settings.samples, ceilings=ceilings, workers=settings.workers)


def save(reporter: Reporter) -> None:
    """Writes what there is, so that a run that is stopped leaves it."""
    say(f"{len(reporter.values)} values")
    reporter.save()


def main(argv: list[str] | None = None) -> int:
    """Runs the evaluation; returns the exit code."""
    # Peers and readers run in processes of their own, which must find memory on the same device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return common.run("speed", Settings, evaluate, figures=figures, table=table, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
