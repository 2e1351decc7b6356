"""Validation of what callers give: token ids, prompts, seeds, room in attention caches."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from holo_jax.config import HoloConfig
from holo_jax.generate.forms import is_mixer_state
from holo_jax.mixers import AttentionState
from holo_jax.model import ModelState

Row = np.ndarray


class CacheFullError(ValueError):
    """An attention cache has no room for what is to be read or generated."""


def as_count(name: str, value: Any, least: int) -> int:
    """``value`` as an int.

    Raises:
      TypeError: if it is not an integer.
      ValueError: if it is below ``least``.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be an integer") from None
    if count < least:
        raise ValueError(f"{name} is {count}; it must be at least {least}")
    return count


def as_rows(prompts: Any, vocab_size: int) -> list[Row]:
    """Prompts as one array of ids a row; arrays (memory maps too) are kept, not copied.

    Args:
      prompts: ``[b, t]`` integers, or a sequence of sequences of different lengths.
      vocab_size: number of ids.

    Raises:
      ValueError: for no rows, an empty row, or an id outside [0, vocab_size).
      TypeError: for anything but integers.
    """
    if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
        raise TypeError(f"prompts is {type(prompts).__name__}; it must hold one sequence of token ids a row")
    if len(prompts) == 0:
        raise ValueError("prompts is empty; it must hold at least one row")
    return [_as_row(index, prompt, vocab_size) for index, prompt in enumerate(prompts)]


def _as_row(index: int, prompt: Any, vocab_size: int) -> Row:
    if isinstance(prompt, str) or not hasattr(prompt, "__len__"):
        raise TypeError(
            f"prompt {index} is {type(prompt).__name__}; it must be a sequence of token ids"
            " (encode text with a tokenizer first)"
        )
    if len(prompt) == 0:
        raise ValueError(f"prompt {index} is empty; it must have at least one token")
    row = np.asarray(prompt)
    if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
        raise TypeError(
            f"prompt {index} has dtype {row.dtype} and shape {row.shape};"
            " it must be a flat sequence of integers"
        )
    check_ids(f"prompt {index}", row, vocab_size)
    return row


def check_ids(name: str, ids: np.ndarray, vocab_size: int) -> None:
    """Raises ``ValueError`` unless all ids are in [0, vocab_size)."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} holds the token id {wrong}; ids must be in [0, {vocab_size})")


def as_seeds(seeds: int | Sequence[int], batch: int) -> np.ndarray:
    """One uint32 seed a row; a single one is used by every row as if it were alone.

    Raises:
      ValueError: for another number of seeds than rows, or a seed outside [0, 2^32).
      TypeError: for seeds that are not integers.
    """
    given = [seeds] * batch if np.ndim(seeds) == 0 else list(seeds)  # type: ignore[arg-type]
    if len(given) != batch:
        raise ValueError(
            f"seeds has {len(given)} entries; it must be one integer, or one for each of {batch} rows"
        )
    values = [as_count("seeds", seed, 0) for seed in given]
    if max(values) >= 2**32:
        raise ValueError(f"seeds holds {max(values)}; a seed must be below 2^32")
    return np.asarray(values, np.uint32)


def cache_use(state: ModelState) -> tuple[int, np.ndarray] | None:
    """Slots of the attention caches and how many each row has used; None without attention layers."""
    for node in jax.tree.leaves(state.layers, is_leaf=is_mixer_state):
        if isinstance(node, AttentionState):
            return node.times.shape[-1], np.asarray(node.index).reshape(-1, node.index.shape[-1])[0]
    return None


def check_room(state: ModelState, config: HoloConfig, needed: np.ndarray) -> None:
    """Raises ``CacheFullError`` if a row's attention cache has no room for ``needed`` more tokens."""
    if config.attention_window or (use := cache_use(state)) is None:
        return
    slots, used = use
    total = used + np.asarray(needed)
    worst = int(total.argmax())
    if total[worst] > slots:
        raise CacheFullError(
            f"the attention cache is full: it has {slots} slots, row {worst} has used {int(used[worst])} and"
            f" needs {int(total[worst] - used[worst])} more; make the state with"
            f" cache_length >= {int(total[worst])}"
        )


def check_batch(state: ModelState, rows: int) -> None:
    """Raises ``ValueError`` unless the state has this many rows."""
    if state.position.shape[0] != rows:
        raise ValueError(f"the state has {state.position.shape[0]} rows; {rows} prompts were given")
