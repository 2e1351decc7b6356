"""Multi-query associative recall (MQAR): small models trained alike, tested by pairs and length.

Every selected model is trained on the same stream of sequences with the same optimiser, steps, seeds and
learning rates (``eval.grid``). The rate is chosen by validation accuracy on the training lengths, averaged
over seeds; accuracy is then measured on fresh sequences, also longer and fuller than any seen in training.
A query counts as right if the largest of all logits is its value. Controls: attention must reach
``control_from`` on the training lengths, or the harness is wrong and the exit code is 1.

Values: "accuracy" by (model, length, pairs): mean over seeds with its bootstrap interval over seeds;
"accuracy_seed" of each seed, with Wilson's; "accuracy_mean": over the first ``averaged`` tests (the
published average); "train_loss", "train_seconds", "state_bytes" (float32, all layers), "rate" (the chosen).
"""

import dataclasses
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eval import common, models, mqar, recall_view
from eval.common import Reporter
from eval.failures import as_status
from eval.grid import Grid, choose_rate, once, select_rate, train
from eval.published import MQAR, MQAR_CITATION
from eval.results import Value, absent, exact, mean, proportion, published
from holo_jax.array_types import Array
from train.model_functions import ModelFunctions


@dataclasses.dataclass(frozen=True)
class Settings:
    """See configs/eval/recall.py."""

    setting: str
    models: dict
    select: tuple[str, ...]
    shared: dict
    storage: str
    train: tuple[tuple[int, int, int], ...]
    width: int
    test: tuple[tuple[int, int], ...]
    averaged: int
    test_width: int
    test_rows: int
    test_batch: int
    power: float
    random_non_queries: bool
    mean_over: str
    grid: Grid
    control_from: float
    published: bool

    def __post_init__(self) -> None:
        common.require_positive(self, "width", "test_width", "test_rows", "test_batch")
        models.check_selection(self.models, self.select)
        if self.mean_over not in ("sequences", "queries"):
            raise ValueError(f"mean_over is {self.mean_over!r}; it must be 'sequences' or 'queries'")
        vocab_size = self.shared["vocab_size"]
        for length, pairs, *_ in (*self.train, *self.test):
            mqar.check(length, pairs, vocab_size)
        if max(length for length, *_ in self.train) > self.width:
            raise ValueError(f"width is {self.width}; it must hold the longest training sequence")
        if max(length for length, _ in self.test) > self.test_width:
            raise ValueError(f"test_width is {self.test_width}; it must hold the longest test sequence")
        if not 1 <= self.averaged <= len(self.test):
            raise ValueError(f"averaged is {self.averaged}; it counts the first of {len(self.test)} tests")
        if self.test_rows % self.test_batch:
            raise ValueError(f"test_rows is {self.test_rows}; it must be a multiple of test_batch")

    @property
    def options(self) -> dict:
        """Options of the generator."""
        return {
            "vocab_size": self.shared["vocab_size"],
            "power": self.power,
            "random_non_queries": self.random_non_queries,
        }


def query_logits(functions: ModelFunctions, params, packed: mqar.Packed) -> Array:
    """Logits [q, v] at the queries of a packed batch."""
    model = functions.model(params)
    hidden = model.model(packed.tokens, packed.segment_ids).hidden
    return model.logits(hidden[packed.rows, packed.places][None])[0]


def query_loss(functions: ModelFunctions, params, packed: mqar.Packed) -> Array:
    """Cross-entropy of the answers, weighted by ``packed.weights``."""
    logits = query_logits(functions, params, packed)
    return (packed.weights * optax.softmax_cross_entropy_with_integer_labels(logits, packed.answers)).sum()


def test_batches(key: Array, settings: Settings, length: int, pairs: int) -> mqar.Packed:
    """The test of one (length, pairs) as batches of equal shape: leaves [batches, ...].

    Queries are filled up with the answer -1, which no prediction equals.
    """
    per_row = settings.test_width // length
    most = settings.test_batch * max(settings.test_width // n * p for n, p in settings.test)
    task = (mqar.Task(length, pairs, settings.test_batch * per_row),)

    def one(number):
        found = mqar.batch(
            jax.random.fold_in(key, number), task, width=settings.test_width, **settings.options
        )
        missing = (0, most - found.answers.size)
        return found._replace(
            rows=jnp.pad(found.rows, missing),
            places=jnp.pad(found.places, missing),
            answers=jnp.pad(found.answers, missing, constant_values=-1),
            weights=jnp.pad(found.weights, missing),
        )

    return jax.lax.map(one, jnp.arange(settings.test_rows // settings.test_batch))


def score(predict, batches: mqar.Packed) -> tuple[np.ndarray, int]:
    """Right answers by model (leading axes of what ``predict`` returns) and number of queries.

    Args:
      predict: batch -> predicted tokens [..., q].
      batches: see ``test_batches``.
    """
    right = 0
    for number in range(batches.tokens.shape[0]):
        batch = jax.tree.map(lambda x, i=number: x[i], batches)
        right = right + (np.asarray(predict(batch)) == np.asarray(batch.answers)).sum(-1)
    return np.asarray(right), int((batches.answers >= 0).sum())


def validation_batch(key: Array, settings: Settings) -> mqar.Packed:
    """Fresh sequences of the training mix, their queries weighted for the mean of ``mean_over``.

    Over sequences, a setting counts by its share of the sequences, as where every batch holds one setting.
    Over queries, the fullest sequences rule, and models that learn sparse ones first stay at chance longer.
    """
    tasks = tuple(mqar.Task(*task) for task in settings.train)
    packed = mqar.batch(key, tasks, width=settings.width, **settings.options)
    if settings.mean_over == "queries":
        packed = packed._replace(weights=jnp.full_like(packed.weights, 1 / packed.weights.size))
    return packed


def run_model(name: str, settings: Settings, reporter: Reporter, tests: dict, key: Array) -> None:
    """Trains one model over the grid and measures it."""
    config = models.build_config(settings.models[name], settings.shared, settings.storage)
    functions = models.build(config)
    grid = settings.grid
    started = time.monotonic()
    trained = train(
        grid,
        functions.init,
        lambda params, packed: query_loss(functions, params, packed),
        lambda step_key: validation_batch(step_key, settings),
        done=lambda steps: reporter.steps.done(f"{name}: trained {steps} more steps", steps),
    )
    seconds = time.monotonic() - started

    def right(params, packed):
        return (packed.weights * (query_logits(functions, params, packed).argmax(-1) == packed.answers)).sum()

    held_out = once(lambda k: validation_batch(k, settings))(jax.random.fold_in(key, 1))
    scores = once(jax.vmap(jax.vmap(right, (0, None)), (0, None)))(trained.params, held_out)
    scores = trained.score(scores)
    best = choose_rate(scores)
    params = select_rate(trained.params, best)
    one = jax.vmap(lambda p, packed: query_logits(functions, p, packed).argmax(-1), (0, None))
    predict = functools.partial(jax.jit(one), params)

    where = {"model": name, "preset": settings.models[name]["preset"]}
    averages = []
    for (length, pairs), batches in tests.items():
        counts, n = score(predict, batches)
        cell = {**where, "length": length, "pairs": pairs}
        reporter.add(mean("accuracy", counts / n, **cell))
        for seed, count in zip(grid.seeds, counts, strict=True):
            reporter.add(proportion("accuracy_seed", count, n, seed=seed, **cell))
        averages.append(counts / n)
        reporter.steps.done(f"{name}: tested {length} tokens, {pairs} pairs")
    reporter.add(mean("accuracy_mean", np.mean(averages[: settings.averaged], axis=0), **where))
    floats = models.state_floats(config, settings.test_width)
    reporter.add(
        exact("state_bytes", 4 * floats, **where),
        exact("rate", grid.rates[best], **where),
        exact("train_seconds", seconds, detail="all seeds and rates, compilation included", **where),
    )
    for step, losses in zip(trained.steps, trained.losses[:, best].T, strict=True):
        if np.isfinite(losses).all():
            reporter.add(mean("train_loss", losses, step=int(step), **where))
    for rate, per_seed in zip(grid.rates, scores.T, strict=True):
        reporter.add(validation(per_seed, rate=rate, **where))
    if trained.skipped[:, best].any():
        reporter.note(
            f"{name}: {trained.skipped[:, best].sum()} steps whose gradient was not finite were skipped"
        )
    if settings.models[name]["preset"] == "attention":
        check_control(name, settings, reporter)


def validation(scores: np.ndarray, **where) -> Value:
    """Validation accuracy over seeds; "diverged" where a seed's training ended with a loss not finite."""
    lost = int((~np.isfinite(scores)).sum())
    if lost:
        return absent("validation_accuracy", "diverged", detail=f"{lost} of {len(scores)} seeds", **where)
    return mean("validation_accuracy", scores, **where)


def _host() -> jax.Device:
    """The CPU, or the default device of a process that was given no other platform."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def check_control(name: str, settings: Settings, reporter: Reporter) -> None:
    """Fails the run's control if attention stays below ``control_from`` at a trained length."""
    for value in reporter.values:
        if value.metric != "accuracy" or value.where["model"] != name:
            continue
        if value.where["length"] <= settings.width and value.value < settings.control_from:
            reporter.fail_control(
                f"{name} scored {value.value:.3f} at {value.where['length']} tokens, {value.where['pairs']} "
                f"pairs; it must reach {settings.control_from}: the harness or the training budget is wrong, "
                "do not read the other rows"
            )


def evaluate(settings: Settings, reporter: Reporter) -> None:
    """Trains and tests the selected models."""
    test_key = jax.random.key(2**31 - 1)
    tests = {}
    # On the host, where a program as small as this one is compiled in no time.
    with jax.default_device(_host()):
        for number, (length, pairs) in enumerate(settings.test):
            make = once(functools.partial(test_batches, settings=settings, length=length, pairs=pairs))
            tests[length, pairs] = jax.tree.map(np.asarray, make(jax.random.fold_in(test_key, number)))
    reporter.steps.expect(len(settings.select) * (settings.grid.steps + len(settings.test)))
    for name in settings.select:
        try:
            run_model(name, settings, reporter, tests, jax.random.fold_in(test_key, 10**6))
        except Exception as error:
            reporter.add(absent("accuracy_mean", as_status(error), detail=str(error)[:500], model=name))
            if settings.models[name]["preset"] == "attention":
                reporter.fail_control(f"{name} could not be trained: {str(error)[:200]}")
        reporter.save()
    if not models.has_control(settings.models, settings.select):
        reporter.note(models.MISSING_CONTROL)
    if settings.published:
        for model, points in MQAR.items():
            for size, accuracy in points:
                reporter.add(
                    published(
                        "accuracy_mean", accuracy, citation=MQAR_CITATION, model=model, state_bytes=size
                    )
                )
    reporter.note(
        "accuracy: mean over seeds, interval by bootstrap over seeds; learning rate chosen per model by "
        f"validation accuracy over the same {len(settings.grid.rates)} rates; "
        "state: float32 bytes of all layers"
    )


figures, table = recall_view.figures, recall_view.table


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line; returns the exit code."""
    return common.run(
        "recall", Settings, evaluate, figures=figures, table=table, seeds=lambda s: s.grid.seeds, argv=argv
    )


if __name__ == "__main__":
    sys.exit(main())
