"""Capacity of the raw phasor memory, without a language model: Monte Carlo beside theory.

Sections (``config.sections``): top-1 recall, SNR and squared error against pairs stored, by "dimension",
"vocabulary" and "binding"; "gating" (a few facts among many distractors, written without a gate, with a
soft one, with an ideal one); state "dtype" at equal bytes; write "rules"; the "decoder" protocol for
the published claim "associative recall MSE < 0.005"; and "presets", one trained block of every preset with
and without its denoiser. Definitions: eval/superposition.py, write_rules.py, state_dtypes.py, decoders.py
and raw_recall.py.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from eval import capacity_view, common, decoders, raw_recall, write_rules
from eval.common import Reporter
from eval.results import Value, exact, mean, proportion
from eval.results import theory as theory_value
from eval.state_dtypes import bytes_per_float
from eval.superposition import Load, Shape, measure, theory

SECTIONS = ("dimension", "vocabulary", "binding", "gating", "dtype", "rules", "decoder", "presets")


@dataclasses.dataclass(frozen=True)
class Settings:
    """See configs/eval/capacity.py."""

    sections: tuple[str, ...]
    seed: int
    queries: int
    pairs: tuple[int, ...]
    dimensions: tuple[int, ...]
    vocabulary: int
    vocabularies: tuple[int, ...]
    vocabulary_dimension: int
    outer_shapes: tuple[tuple[int, int], ...]
    gating_dimension: int
    gating_facts: int
    gating_lengths: tuple[int, ...]
    soft_gates: tuple[float, float]
    state_bytes: int
    dtypes: tuple[str, ...]
    rule_shape: tuple[int, int]
    rule_pairs: tuple[int, ...]
    rule_shares: tuple[float, ...]
    rule_vocabulary: int
    rule_memories: int
    decoder_dimensions: tuple[int, ...]
    decoder_pairs: tuple[int, ...]
    decoder_channels: int
    decoder_words: int
    decoder_samples: int
    decoder_steps: int
    decoder_batch: int
    decoder_rates: tuple[float, ...]
    target_mse: float
    presets: raw_recall.Settings

    def __post_init__(self) -> None:
        common.require_positive(
            self, "queries", "vocabulary", "rule_memories", "decoder_samples", "decoder_batch"
        )
        unknown = set(self.sections) - set(SECTIONS)
        if unknown:
            raise ValueError(f"sections has {sorted(unknown)}; known are {', '.join(SECTIONS)}")
        for share in self.rule_shares:
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"rule_shares has {share}; an erase gate lies in [0, 1]")
        for length in self.gating_lengths:
            if length < self.gating_facts:
                raise ValueError(f"gating_lengths has {length}; it must hold the {self.gating_facts} facts")
        for dtype in self.dtypes:
            bytes_per_float(dtype)


def simulate(key: jax.Array, shape: Shape, load: Load, queries: int, **where) -> list[Value]:
    """Monte Carlo values of one cell: accuracy, SNR and error.

    Accuracy counts single reads; SNR and error are averaged by run (fresh keys, words, codebook), and their
    intervals are over runs.
    """
    runs = max(2, -(-queries // shape.queries))
    found = [measure(jax.random.fold_in(key, run), shape, load) for run in range(runs)]
    correct = np.concatenate([np.asarray(f["correct"]) for f in found])
    snr = [float(f["score"].mean() / jnp.sqrt(f["wrong"].mean())) for f in found]
    return [
        proportion("accuracy", correct.sum(), correct.size, **where),
        mean("snr", snr, **where),
        mean("mse", [float(f["mse"].mean()) for f in found], **where),
    ]


def expected(shape: Shape, load: Load, **where) -> list[Value]:
    """Theory of the same cell."""
    return [theory_value(name, value, **where) for name, value in theory(shape, load).items()]


def _sweep(reporter: Reporter, key: jax.Array, settings: Settings, shape: Shape, **where) -> None:
    for pairs in settings.pairs:
        cell = {**where, "pairs": pairs}
        pairs_key = jax.random.fold_in(key, pairs)
        reporter.add(*simulate(pairs_key, shape, Load(pairs), settings.queries, **cell))
        reporter.add(*expected(shape, Load(pairs), **cell))
        reporter.steps.done(" ".join(f"{k} {v}" for k, v in cell.items()))


def by_dimension(settings: Settings, reporter: Reporter, key: jax.Array) -> None:
    """Recall against pairs for each dimension of a hadamard memory."""
    reporter.steps.expect(len(settings.dimensions) * len(settings.pairs))
    for d in settings.dimensions:
        shape = Shape("hadamard", d, d, settings.vocabulary)
        _sweep(reporter, jax.random.fold_in(key, d), settings, shape, section="dimension", dimension=d)


def by_vocabulary(settings: Settings, reporter: Reporter, key: jax.Array) -> None:
    """Recall against pairs for each vocabulary, at one dimension."""
    reporter.steps.expect(len(settings.vocabularies) * len(settings.pairs))
    d = settings.vocabulary_dimension
    for v in settings.vocabularies:
        shape = Shape("hadamard", d, d, v)
        _sweep(reporter, jax.random.fold_in(key, v), settings, shape, section="vocabulary", vocabulary=v)


def by_binding(settings: Settings, reporter: Reporter, key: jax.Array) -> None:
    """Outer memories, each beside the hadamard memory of equally many numbers."""
    reporter.steps.expect(2 * len(settings.outer_shapes) * len(settings.pairs))
    for m, d in settings.outer_shapes:
        equal = m * d
        pair = (
            (f"outer {m} x {d}", Shape("outer", m, d, settings.vocabulary)),
            (f"hadamard {equal}", Shape("hadamard", equal, equal, settings.vocabulary)),
        )
        for name, shape in pair:
            where = {"section": "binding", "memory": name, "floats": shape.floats}
            _sweep(reporter, jax.random.fold_in(key, m * d), settings, shape, **where)


def by_gating(settings: Settings, reporter: Reporter, key: jax.Array) -> None:
    """A few facts in a long stream: what is written counts, not what is read."""
    d, facts = settings.gating_dimension, settings.gating_facts
    fact, other = settings.soft_gates
    gates = {"none": (1.0, 1.0), "soft": (fact, other), "ideal": (1.0, 0.0)}
    shape = Shape("hadamard", d, d, settings.vocabulary)
    reporter.steps.expect(len(gates) * len(settings.gating_lengths))
    for length in settings.gating_lengths:
        for name, (one, two) in gates.items():
            # A distractor written with strength zero is not written: the ideal gate costs nothing.
            load = Load(facts, length - facts if two else 0, one, two)
            where = {"section": "gating", "gate": name, "length": length}
            length_key = jax.random.fold_in(key, length)
            reporter.add(*simulate(length_key, shape, load, min(settings.queries, 512), **where))
            reporter.add(*expected(shape, load, **where))
            reporter.steps.done(f"gate {name}, {length} tokens")


def by_dtype(settings: Settings, reporter: Reporter, key: jax.Array) -> None:
    """Equal bytes of state, spent on more phasors of fewer bits; stored once, and after every write."""
    kinds = [(dtype, False) for dtype in settings.dtypes]
    kinds += [(dtype, True) for dtype in settings.dtypes if dtype != "float32"]
    reporter.steps.expect(len(kinds) * len(settings.pairs))
    for dtype, each_write in kinds:
        d = int(settings.state_bytes / (2 * bytes_per_float(dtype))) // 128 * 128
        shape = Shape("hadamard", d, d, settings.vocabulary, dtype, each_write)
        for pairs in settings.pairs:
            where = {
                "section": "dtype",
                "dtype": dtype,
                "stored": "after every write" if each_write else "once",
                "pairs": pairs,
            }
            pairs_key = jax.random.fold_in(key, pairs)
            reporter.add(*simulate(pairs_key, shape, Load(pairs), settings.queries, **where))
            reporter.steps.done(f"{dtype}, {pairs} pairs")
        bytes_used = 2 * d * bytes_per_float(dtype)
        stored = "after every write" if each_write else "once"
        reporter.add(exact("state_bytes", bytes_used, section="dtype", dtype=dtype, stored=stored))


def by_rule(settings: Settings, reporter: Reporter, key: jax.Array) -> None:
    """Write rules on distinct and on rebound keys, all pairs and the oldest quarter."""
    m, d = settings.rule_shape
    reporter.steps.expect(len(write_rules.TASKS) * len(settings.rule_pairs))
    for task in write_rules.TASKS:
        for pairs in settings.rule_pairs:
            sizes = dict(m=m, d=d, pairs=pairs, vocabulary=settings.rule_vocabulary, task=task)
            for share in settings.rule_shares:
                # The same keys for every share: the rules face the same memories.
                runs = [
                    write_rules.measure(jax.random.fold_in(key, run), jnp.float32(share), **sizes)
                    for run in range(settings.rule_memories)
                ]
                rule = {0.0: "plain", 1.0: "delta"}.get(share, f"erase {share:g}")
                _add_rule(reporter, rule, task, pairs, np.stack([np.asarray(r[0]) for r in runs]))
            _add_rule(reporter, "least squares", task, pairs, np.stack([np.asarray(r[1]) for r in runs]))
            reporter.steps.done(f"rules, {task} keys, {pairs} pairs")


def _add_rule(reporter: Reporter, rule: str, task: str, pairs: int, correct: np.ndarray) -> None:
    where = {"section": "rules", "rule": rule, "task": task, "pairs": pairs}
    oldest = correct[:, : max(1, pairs // 4)]
    reporter.add(
        proportion("accuracy", correct.sum(), correct.size, which="all", **where),
        proportion("accuracy", oldest.sum(), oldest.size, which="oldest quarter", **where),
    )


def by_decoder(settings: Settings, reporter: Reporter, key: jax.Array) -> None:
    """The squared error of trained read-outs, and whether it gets below the claimed one."""
    reporter.steps.expect(
        len(settings.decoder_dimensions) * len(settings.decoder_pairs) * len(decoders.VALUES)
    )
    for d in settings.decoder_dimensions:
        for values in decoders.VALUES:
            for pairs in settings.decoder_pairs:
                errors = decoders.measure(
                    jax.random.fold_in(key, pairs),
                    dimension=d,
                    pairs=pairs,
                    channels=settings.decoder_channels,
                    words=settings.decoder_words,
                    values=values,
                    samples=settings.decoder_samples,
                    rates=settings.decoder_rates,
                    steps=settings.decoder_steps,
                    batch=settings.decoder_batch,
                )
                where = {"section": "decoder", "dimension": d, "values": values, "pairs": pairs}
                for decoder, samples in errors.items():
                    reporter.add(mean("mse", np.asarray(samples), decoder=decoder, **where))
                bound = decoders.linear_bound(d, settings.decoder_channels, pairs)
                reporter.add(theory_value("mse", bound, decoder="linear", **where))
                reporter.steps.done(f"decoder, D = {d}, {values}, {pairs} pairs")
    for decoder in decoders.DECODERS:
        for values in decoders.VALUES:
            if decoder == "nearest" and values != "codebook":
                continue
            for d in settings.decoder_dimensions:
                reporter.add(_most_pairs(reporter, settings, decoder, values, d))


def _most_pairs(reporter: Reporter, settings: Settings, decoder: str, values: str, d: int) -> Value:
    """The largest load, counting up, at which the upper end of the error's interval is below the claim."""
    most = 0
    for pairs in sorted(settings.decoder_pairs):
        found = [
            v
            for v in reporter.values
            if v.metric == "mse"
            and v.source == "measured"
            and v.where
            == {"section": "decoder", "dimension": d, "values": values, "pairs": pairs, "decoder": decoder}
        ]
        if found[0].high >= settings.target_mse:
            break
        most = pairs
    return exact("pairs_below_target", most, section="decoder", dimension=d, values=values, decoder=decoder)


def by_preset(settings: Settings, reporter: Reporter, key: jax.Array) -> None:
    """Recall of vectors through one trained block of each preset."""
    raw_recall.evaluate(settings.presets, reporter, key)


_RUN = {
    "dimension": by_dimension,
    "vocabulary": by_vocabulary,
    "binding": by_binding,
    "gating": by_gating,
    "dtype": by_dtype,
    "rules": by_rule,
    "decoder": by_decoder,
    "presets": by_preset,
}


def evaluate(settings: Settings, reporter: Reporter) -> None:
    """Runs the chosen sections."""
    key = jax.random.key(settings.seed)
    for number, section in enumerate(SECTIONS):
        if section in settings.sections:
            _RUN[section](settings, reporter, jax.random.fold_in(key, number))
    reporter.note(
        "accuracy: top-1 of the clean-up over the vocabulary, Wilson intervals over reads; snr: mean score "
        "of the right word over the root mean square score of wrong ones; mse: of the raw, unscaled read "
        "(values have unit variance per channel), except in sections 'decoder' and 'presets'"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line; returns the exit code."""
    return common.run(
        "capacity",
        Settings,
        evaluate,
        figures=capacity_view.figures,
        table=capacity_view.table,
        seeds=lambda s: (s.seed, *(s.presets.grid.seeds if "presets" in s.sections else ())),
        argv=argv,
    )


figures, table = capacity_view.figures, capacity_view.table

if __name__ == "__main__":
    sys.exit(main())
