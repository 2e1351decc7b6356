"""Associative recall of vectors through one block of a preset, with its denoiser, a linear one, and none.

Protocol. A memory is given N pairs of vectors, and no tokens: k_1, v_1, ..., k_N, v_N, then the keys again
in random order. A key is a fresh Gaussian vector, a value one of ``words`` fixed Gaussian vectors, all of
unit variance. Keys fill one half of the residual stream and values the other, so that the sum of the block
cannot mix a query with its answer. What the block leaves in the values' half at a query is the recalled
vector: no embedding, no head, no norm after it. Every model is trained alike (``eval.grid``) on the mean
square error at ``train_pairs``; measured on fresh memories, also fuller ones:

    mse       mean square over channels (answering zero scores 1)
    accuracy  share of reads whose nearest word of the book is the right one (chance 1 / words)

The control is attention with its denoiser, which must reach ``control_from`` at ``train_pairs``.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eval import common, models
from eval.common import Reporter
from eval.decoders import error, make_book
from eval.grid import Grid, choose_rate, once, select_rate, train
from eval.results import exact, mean
from holo_jax import HoloConfig
from holo_jax.array_types import Array, Float, Int
from holo_jax.blocks import Block
from holo_jax.mixers import Context
from holo_jax.model import positional_turns
from holo_jax.residual import settled


@dataclasses.dataclass(frozen=True)
class Settings:
    """See configs/eval/capacity.py."""

    models: dict
    select: tuple[str, ...]
    shared: dict
    channels: int
    words: int
    train_pairs: int
    test_pairs: tuple[int, ...]
    batch: int
    test_memories: int
    grid: Grid
    control_from: float

    def __post_init__(self) -> None:
        common.require_positive(self, "channels", "words", "train_pairs", "batch", "test_memories")
        models.check_selection(self.models, self.select)
        if self.train_pairs not in self.test_pairs or min(self.test_pairs) < 1:
            raise ValueError(
                f"test_pairs is {self.test_pairs}; it must be positive and hold train_pairs "
                f"({self.train_pairs})"
            )


def draw(
    key: Array, book: Float[Array, "w c"], *, memories: int, pairs: int
) -> tuple[Float[Array, "b t e"], Int[Array, "b n"]]:
    """Pairs, then queries, as vectors [memories, 3 pairs, 2 channels], and the words asked for."""
    words, channels = book.shape
    key_keys, key_words, key_order = jax.random.split(key, 3)
    keys = jax.random.normal(key_keys, (memories, pairs, channels))
    values = jax.random.randint(key_words, (memories, pairs), 0, words)
    order = jnp.argsort(jax.random.uniform(key_order, (memories, pairs)), axis=1)
    as_key = lambda x: jnp.concatenate([x, jnp.zeros_like(x)], axis=-1)  # noqa: E731
    as_value = lambda x: jnp.concatenate([jnp.zeros_like(x), x], axis=-1)  # noqa: E731
    written = jnp.stack([as_key(keys), as_value(book[values])], axis=2)
    asked = as_key(jnp.take_along_axis(keys, order[..., None], axis=1))
    sequence = jnp.concatenate([written.reshape(memories, 2 * pairs, 2 * channels), asked], axis=1)
    return sequence, jnp.take_along_axis(values, order, axis=1)


def score(
    recalled: Float[Array, "b n c"], words: Int[Array, "b n"], book: Float[Array, "w c"]
) -> tuple[Array, Array]:
    """Mean square error, and share of the reads whose nearest word is the right one."""
    found = recalled.reshape(-1, book.shape[1])
    distances = jnp.sum(jnp.square(book), axis=1)[None] - 2 * found @ book.T
    right = jnp.argmin(distances, axis=1) == words.reshape(-1)
    return error(found, book[words.reshape(-1)]).mean(), right.mean()


class OneBlock:
    """One block of a preset as pure functions of its parameters."""

    def __init__(self, config: HoloConfig) -> None:
        self.config = config
        build = lambda key: Block(config, config.mixer, rngs=nnx.Rngs(params=key))  # noqa: E731
        self._graph, self._abstract = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param)
        self.init = lambda key: nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    def recall(self, params, sequence: Float[Array, "b t e"]) -> Float[Array, "b n c"]:
        """What stands in the values' half at the queries, the last third of the sequence."""
        state = jax.tree.map(lambda leaf: leaf, self._abstract)
        nnx.replace_by_pure_dict(state, params)
        block = nnx.merge(self._graph, state)
        turns = positional_turns(self.config)
        length, width = sequence.shape[1:]
        context = Context(jnp.arange(length, dtype=jnp.uint32)[None])
        own_turns = None if turns is None else turns[0, 0]
        out, pending, _ = block(sequence, None, context, own_turns, None)
        out = settled(out, pending)
        return out[:, 2 * length // 3 :, width // 2 :].astype(jnp.float32)


def run_model(name: str, settings: Settings, reporter: Reporter, key: Array) -> None:
    """Trains one model over the grid and measures it on the same fresh memories as all others."""
    shared = {**settings.shared, "hidden_size": 2 * settings.channels, "num_hidden_layers": 1}
    config = models.build_config(settings.models[name], shared, "float32")
    block, grid = OneBlock(config), settings.grid
    book = make_book(jax.random.fold_in(key, 0), settings.words, settings.channels)

    def loss(params, batch):
        sequence, words = batch
        return error(block.recall(params, sequence), book[words]).mean()

    trained = train(
        grid,
        block.init,
        loss,
        lambda k: draw(k, book, memories=settings.batch, pairs=settings.train_pairs),
        done=lambda steps: reporter.steps.done(f"{name}: trained {steps} more steps", steps),
    )

    def measured(params, k, pairs):
        sequence, words = draw(k, book, memories=settings.test_memories, pairs=pairs)
        return score(block.recall(params, sequence), words, book)

    over_rates = jax.vmap(
        jax.vmap(lambda p, k: measured(p, k, settings.train_pairs)[0], (0, None)), (0, None)
    )
    best = choose_rate(-np.asarray(once(over_rates)(trained.params, jax.random.fold_in(key, 1))))
    params = select_rate(trained.params, best)
    where = {"section": "presets", "model": name}
    for pairs in settings.test_pairs:
        over_seeds = once(jax.vmap(lambda p, k, n=pairs: measured(p, k, n), (0, None)))
        mse, accuracy = over_seeds(params, jax.random.fold_in(key, 1 + pairs))
        reporter.add(
            mean("accuracy", np.asarray(accuracy), pairs=pairs, **where),
            mean("mse", np.asarray(mse), pairs=pairs, **where),
        )
        reporter.steps.done(f"{name}: tested {pairs} pairs")
        if (
            config.mixer == "attention"
            and config.mlp not in ("none", "linear")
            and pairs == settings.train_pairs
            and accuracy.mean() < settings.control_from
        ):
            reporter.fail_control(
                f"{name} recalled {accuracy.mean():.3f} of {pairs} pairs; it must reach "
                f"{settings.control_from}: the harness or the training budget is wrong, do not read the "
                "other rows"
            )
    reporter.add(
        exact("state_bytes", 4 * models.state_floats(config, 2 * settings.train_pairs), **where),
        exact("rate", grid.rates[best], **where),
    )


def evaluate(settings: Settings, reporter: Reporter, key: Array) -> None:
    """Trains and measures the selected models."""
    reporter.steps.expect(len(settings.select) * (settings.grid.steps + len(settings.test_pairs)))
    for name in settings.select:
        run_model(name, settings, reporter, key)
        reporter.save()
    if not models.has_control(settings.models, settings.select):
        reporter.note(models.MISSING_CONTROL)
    reporter.note(
        "section 'presets': one trained block each; mean over seeds with its bootstrap interval; learning "
        f"rate chosen by validation error over the same {len(settings.grid.rates)} rates"
    )
