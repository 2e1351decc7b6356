"""A synthetic needle in a haystack: small models trained alike, asked far beyond their training length.

Every model is trained on the same sequences (needle at a random depth) with the same optimiser, steps,
seeds and learning rates; the rate is chosen per model by validation accuracy at the training lengths. Then
every cell of lengths x depths is asked ``rows`` times per seed: the answer is right if the largest of all
logits after the question is the needle's value. Models with a memory of constant size read the haystack in
pieces and carry their state; attention reads it in one pass. A cell that does not fit is "oom", not 0.

Control: attention must reach ``control_from`` at every depth of the trained lengths (exit code 1 if not).
RULER's tasks on any checkpoint are in ``eval.ruler``.
"""

import dataclasses
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eval import common, haystack, models, needle_view
from eval.common import Reporter
from eval.failures import as_status
from eval.grid import Grid, choose_rate, once, select_rate, train
from eval.results import absent, exact, mean, proportion
from holo_jax.array_types import Array
from holo_jax.config import HoloConfig
from holo_jax.model import init_state
from train.model_functions import ModelFunctions


@dataclasses.dataclass(frozen=True)
class Settings:
    """See configs/eval/needle.py."""

    models: dict
    select: tuple[str, ...]
    shared: dict
    storage: str
    kinds: int
    filler_from: int
    train: tuple[tuple[int, int], ...]
    width: int
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    rows: int
    piece: int
    forward_rows: int
    grid: Grid
    control_from: float

    def __post_init__(self) -> None:
        common.require_positive(self, "rows", "piece", "forward_rows")
        models.check_selection(self.models, self.select)
        if not haystack.KEYS <= self.filler_from < self.shared["vocab_size"]:
            raise ValueError(f"filler_from is {self.filler_from}; it must be an id from {haystack.KEYS} on")
        if haystack.KEYS + 2 * self.kinds > self.shared["vocab_size"]:
            raise ValueError(f"kinds is {self.kinds}; keys and values must fit into the vocabulary")
        for length, _ in self.train:
            if self.width % length:
                raise ValueError(f"train has length {length}; it must divide width ({self.width})")
        for length in self.lengths:
            if length % self.piece or length < haystack.NEEDLE + haystack.QUESTION:
                raise ValueError(f"lengths has {length}; it must be a multiple of piece ({self.piece})")
        if any(not 0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths is {self.depths}; depths lie in [0, 1]")
        if self.rows % self.forward_rows:
            raise ValueError(f"rows is {self.rows}; it must be a multiple of forward_rows")

    @property
    def ids(self) -> dict:
        """Ids of the generator."""
        return {"vocab_size": self.shared["vocab_size"], "filler_from": self.filler_from}


def training_batch(key: Array, settings: Settings) -> tuple[Array, Array, Array, Array, Array]:
    """Packed sequences of every training length with needles at random depths.

    Returns:
      tokens, segment_ids [rows, width]; row and place of each question's last token; answers.
    """
    parts = []
    first_row = 0
    for number, (length, count) in enumerate(settings.train):
        fact_key, depth_key, filler_key = jax.random.split(jax.random.fold_in(key, number), 3)
        keys, values = haystack.facts(fact_key, count, settings.kinds)
        start = haystack.needle_start(jax.random.uniform(depth_key, (count,)), length)
        tokens = haystack.piece(filler_key, keys, values, start, length, 0, size=length, **settings.ids)
        per_row = settings.width // length
        if count % per_row:
            raise ValueError(f"train asks for {count} sequences of {length} tokens; {per_row} fill a row")
        index = jnp.arange(count, dtype=jnp.int32)
        segments = jnp.repeat(index % per_row + 1, length)
        shape = (count // per_row, settings.width)
        ends = (first_row + index // per_row, index % per_row * length + length - 1)
        parts.append((tokens.reshape(shape), segments.reshape(shape), *ends, values))
        first_row += count // per_row
    return tuple(jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))


def answer_logits(functions: ModelFunctions, params, batch) -> Array:
    """Logits [q, v] after each question of a packed batch."""
    tokens, segment_ids, rows, places, _ = batch
    model = functions.model(params)
    hidden = model.model(tokens, segment_ids).hidden
    return model.logits(hidden[rows, places][None])[0]


def streamed(functions: ModelFunctions, config: HoloConfig, settings: Settings, params, key, length, depth):
    """Whether each of ``rows`` answers is right, read piece by piece; ``length`` and ``depth`` are traced."""
    model = functions.model(params)
    fact_key, filler_key = jax.random.split(key)
    keys, values = haystack.facts(fact_key, settings.rows, settings.kinds)
    start = jnp.broadcast_to(haystack.needle_start(depth, length), keys.shape)

    def body(number, carry):
        state, _ = carry
        tokens = haystack.piece(
            filler_key,
            keys,
            values,
            start,
            length,
            number * settings.piece,
            size=settings.piece,
            **settings.ids,
        )
        hidden, state = model.model(tokens, None, state)
        return state, hidden[:, -1]

    last = jnp.zeros((settings.rows, config.hidden_size), config.precision.storage)
    _, last = jax.lax.fori_loop(0, length // settings.piece, body, (init_state(config, settings.rows), last))
    return model.logits(last[:, None])[:, 0].argmax(-1) == values


def forwarded(functions: ModelFunctions, settings: Settings, params, key, length: int, depth):
    """The same from one pass over whole sequences, ``forward_rows`` at a time; ``length`` is static."""
    model = functions.model(params)
    fact_key, filler_key = jax.random.split(key)
    keys, values = haystack.facts(fact_key, settings.rows, settings.kinds)
    start = jnp.broadcast_to(haystack.needle_start(depth, length), keys.shape)
    firsts = jnp.arange(0, length, settings.piece)
    make = functools.partial(haystack.piece, size=settings.piece, **settings.ids)
    whole = jax.lax.map(lambda first: make(filler_key, keys, values, start, length, first), firsts)
    whole = whole.transpose(1, 0, 2).reshape(-1, settings.forward_rows, length)
    last = jax.lax.map(lambda tokens: model.model(tokens).hidden[:, -1], whole)
    last = last.reshape(settings.rows, 1, -1)
    return model.logits(last)[:, 0].argmax(-1) == values


def run_model(name: str, settings: Settings, reporter: Reporter) -> None:
    """Trains one model over the grid and asks every cell."""
    config = models.build_config(settings.models[name], settings.shared, settings.storage)
    functions = models.build(config)
    grid = settings.grid

    def loss(params, batch):
        logits = answer_logits(functions, params, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[-1]).mean()

    started = time.monotonic()
    trained = train(
        grid,
        functions.init,
        loss,
        lambda key: training_batch(key, settings),
        done=lambda steps: reporter.steps.done(f"{name}: trained {steps} more steps", steps),
    )
    seconds = time.monotonic() - started

    def right(params, batch):
        return jnp.mean(answer_logits(functions, params, batch).argmax(-1) == batch[-1])

    test_key = jax.random.key(2**31 - 1)
    held_out = once(lambda k: training_batch(k, settings))(jax.random.fold_in(test_key, 0))
    scores = once(jax.vmap(jax.vmap(right, (0, None)), (0, None)))(trained.params, held_out)
    scores = trained.score(scores)
    best = choose_rate(scores)
    params = select_rate(trained.params, best)
    where = {"model": name, "preset": settings.models[name]["preset"]}
    reporter.add(
        exact("rate", grid.rates[best], **where),
        exact("train_seconds", seconds, detail="all seeds and rates, compilation included", **where),
        mean("validation_accuracy", scores[:, best], **where),
    )
    growing = "attention" in config.layer_kinds
    if not growing:
        ask = jax.jit(jax.vmap(functools.partial(streamed, functions, config, settings), (0, 0, None, None)))
    for length in settings.lengths:
        if growing:
            # Seeds one after the other: whole sequences fill the memory, and the flash kernel stays as it is.
            one = functools.partial(forwarded, functions, settings, length=length)
            ask = jax.jit(
                lambda params, keys, _, depth, one=one: jax.lax.map(
                    lambda pair: one(*pair, depth=depth), (params, keys)
                )
            )
        for number, depth in enumerate(settings.depths):
            cell_key = jax.random.fold_in(jax.random.fold_in(test_key, length), number + 1)
            key = jax.random.split(cell_key, len(grid.seeds))
            cell = {**where, "length": length, "depth": depth}
            try:
                correct = np.asarray(ask(params, key, length, depth))
                reporter.add(proportion("accuracy", correct.sum(), correct.size, **cell))
                seeds = zip(grid.seeds, correct.mean(1), strict=True)
                reporter.add(*(exact("accuracy_seed", a, n=settings.rows, seed=s, **cell) for s, a in seeds))
            except Exception as error:
                reporter.add(absent("accuracy", as_status(error), detail=str(error)[:500], **cell))
            reporter.steps.done(f"{name}: {length} tokens, depth {depth:g}")
        reporter.add(exact("state_bytes", 4 * models.state_floats(config, length), length=length, **where))
    if settings.models[name]["preset"] == "attention":
        _control(name, settings, reporter)


def _control(name: str, settings: Settings, reporter: Reporter) -> None:
    for value in reporter.values:
        inside = (
            value.where.get("model") == name
            and value.where.get("length", settings.width + 1) <= settings.width
        )
        if (
            value.metric == "accuracy"
            and inside
            and (value.value is None or value.value < settings.control_from)
        ):
            reporter.fail_control(
                f"{name} scored {value.value} at {value.where['length']} tokens, depth "
                f"{value.where['depth']}; it must reach {settings.control_from}: "
                "the harness or the training budget is wrong"
            )


def evaluate(settings: Settings, reporter: Reporter) -> None:
    """Trains and asks the selected models."""
    cells = len(settings.lengths) * len(settings.depths)
    reporter.steps.expect(len(settings.select) * (settings.grid.steps + cells))
    for name in settings.select:
        try:
            run_model(name, settings, reporter)
        except Exception as error:
            reporter.add(absent("accuracy", as_status(error), detail=str(error)[:500], model=name))
            if settings.models[name]["preset"] == "attention":
                reporter.fail_control(f"{name} could not be trained: {str(error)[:200]}")
        reporter.save()
    if not models.has_control(settings.models, settings.select):
        reporter.note(models.MISSING_CONTROL)
    reporter.note(
        f"n = {settings.rows} sequences a seed, {len(settings.grid.seeds)} seeds pooled, Wilson intervals "
        "over sequences (seeds apart in accuracy_seed); learning rate chosen per model from the same rates"
    )


figures, table = needle_view.figures, needle_view.table


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line; returns the exit code."""
    return common.run(
        "needle", Settings, evaluate, figures=figures, table=table, seeds=lambda s: s.grid.seeds, argv=argv
    )


if __name__ == "__main__":
    sys.exit(main())
