"""Nats of every token of texts of any length, read by streaming state or in one pass."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from holo_jax import HoloForCausalLM
from holo_jax.array_types import Array, Int
from holo_jax.model import ModelState, init_state

_LOGIT_TOKENS = 256  # tokens a row whose logits exist at one time
_PASS_MULTIPLE = 1024  # one-pass lengths are rounded up to this, so that few shapes are compiled


class Scores(NamedTuple):
    """Of each predicted token of a text: its loss in nats, and whether it was the likeliest token."""

    nats: np.ndarray
    likeliest: np.ndarray


class LossReader:
    """Reads rows of tokens and scores each token given all before it in the row.

    Memories of constant size read in pieces and carry their state, so device memory does not depend on the
    length. Models with attention read whole rows in one pass (their cache would grow with the length, and a
    pass can use the flash kernel).

    Args:
      model: the model; it is not changed.
      rows: rows read at one time.
      piece: tokens a row and piece.
    """

    def __init__(self, model: HoloForCausalLM, *, rows: int, piece: int) -> None:
        if rows < 1 or piece < 1 or piece % min(piece, _LOGIT_TOKENS):
            raise ValueError(
                f"rows is {rows} and piece {piece}; piece must be a multiple of {_LOGIT_TOKENS} or less"
            )
        self.rows, self.piece = rows, piece
        self.config = model.config
        self.one_pass = "attention" in model.config.layer_kinds
        self._graphdef, self._params = nnx.split(model, nnx.Param)

    def scores(self, texts: Sequence[np.ndarray]) -> list[Scores]:
        """Scores of ``texts[i][1:]``, [len - 1], for at most ``rows`` texts of 2 tokens or more.

        Raises:
          ValueError: for too many texts or one that is too short.
        """
        if not 1 <= len(texts) <= self.rows:
            raise ValueError(f"{len(texts)} texts were given; between 1 and {self.rows} are read at one time")
        for text in texts:
            if len(text) < 2:
                raise ValueError(
                    f"a text has {len(text)} tokens; the first is not predicted, so 2 are needed"
                )
        longest = max(len(text) for text in texts) - 1
        size = -(-longest // _PASS_MULTIPLE) * _PASS_MULTIPLE if self.one_pass else self.piece
        padded = -(-longest // size) * size
        tokens = np.zeros((self.rows, padded + 1), np.int32)
        for row, text in zip(tokens, texts, strict=False):
            row[: len(text)] = text
        state = None if self.one_pass else init_state(self.config, self.rows)
        found = []
        for first in range(0, padded, size):
            inputs, targets = tokens[:, first : first + size], tokens[:, first + 1 : first + 1 + size]
            scores, state = _read(self._graphdef, self._params, inputs, targets, state)
            found.append(jax.tree.map(np.asarray, scores))
        whole = Scores(*(np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True)))
        return [
            Scores(whole.nats[row, : len(text) - 1], whole.likeliest[row, : len(text) - 1])
            for row, text in enumerate(texts)
        ]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _read(
    graphdef, params, inputs: Int[Array, "b t"], targets: Int[Array, "b t"], state: ModelState | None
) -> tuple[Scores, ModelState | None]:
    model = nnx.merge(graphdef, params)
    hidden, state = model.model(inputs, None, state)
    rows, size, width = hidden.shape
    chunk = min(size, _LOGIT_TOKENS)

    def score(args):
        part, wanted = args
        logits = model.logits(part).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        return Scores(jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.argmax(logits, axis=-1) == wanted)

    parts = hidden.reshape(rows, size // chunk, chunk, width).swapaxes(0, 1)
    wanted = targets.reshape(rows, size // chunk, chunk).swapaxes(0, 1)
    scores = jax.lax.map(score, (parts, wanted))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, size), scores), state


def read_all(reader: LossReader, texts: Sequence[np.ndarray], done=lambda count: None) -> list[Scores]:
    """Scores of any number of texts, longest together, in the order given; ``done(n)`` after n more."""
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    found: dict[int, Scores] = {}
    for first in range(0, len(order), reader.rows):
        batch = order[first : first + reader.rows]
        found.update(zip(batch, reader.scores([texts[i] for i in batch]), strict=True))
        done(len(batch))
    return [found[index] for index in range(len(texts))]
