"""One row of text read and continued, with its timing: what ``eval.generate`` shows."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from holo_jax.generate import Reading, Sampling, decoding_form, generate, init_state, prefill, state_bytes
from holo_jax.pretrained import Pretrained
from holo_jax.state_io import SavedState
from holo_jax.text_stream import TextStream


class Spoken(NamedTuple):
    """What was generated.

    Attributes:
      text: of the new tokens.
      tokens: how many.
      stopped: whether the tokenizer's end mark ended it.
      seconds: of generating alone; nothing was compiled in them.
    """

    text: str
    tokens: int
    stopped: bool
    seconds: float


class Conversation:
    """A model's state, and the text that goes in and out of it.

    Attributes:
      state: after everything read and said, and the logits of what comes next (None before the first).
      read_tokens, read_seconds: of the last ``read``; nothing was compiled in those seconds.
    """

    def __init__(
        self,
        loaded: Pretrained,
        *,
        sampling: Sampling,
        seed: int,
        block_size: int,
        piece_size: int,
    ) -> None:
        self.loaded, self.sampling, self.seed = loaded, sampling, seed
        self.tokenizer = loaded.tokenizer
        self.model = decoding_form(loaded.model)
        self.block_size, self.piece_size = block_size, piece_size
        self.read_tokens, self.read_seconds = 0, 0.0
        self._reading: SavedState | None = None
        self._seen = np.zeros((1, loaded.config.vocab_size), bool)
        self._context: list[int] = []
        self._compiled: set[tuple] = set()

    def begin(self, *, cache_length: int, state_dtype: str) -> None:
        """Starts from nothing."""
        state = init_state(self.loaded.config, 1, cache_length=cache_length, state_dtype=state_dtype)
        self._reading = SavedState(state, None)

    def resume(self, saved: SavedState) -> None:
        """Starts from a saved state.

        Raises:
          ValueError: if it has more rows than one.
        """
        rows = saved.state.position.shape[0]
        if rows != 1:
            raise ValueError(f"the saved state has {rows} rows; a conversation has one")
        self._reading = saved

    @property
    def saved(self) -> SavedState:
        """State and logits."""
        if self._reading is None:
            raise ValueError("the conversation has not begun")
        return self._reading

    @property
    def state_bytes(self) -> int:
        """Bytes of the state."""
        return state_bytes(self.saved.state)

    @property
    def position(self) -> int:
        """Tokens read and said so far."""
        return int(self.saved.state.position[0])

    def encode(self, text: str) -> list[int]:
        """Ids of a text; the begin mark comes first at the very beginning."""
        begun = self._reading is not None and self.position > 0
        mark = None if begun else self.tokenizer.bos_id
        return ([] if mark is None else [mark]) + list(self.tokenizer.encode(text))

    def read(self, ids: Sequence[int]) -> None:
        """Reads tokens into the state."""
        self._warm_up_reading(len(ids))
        start = time.perf_counter()
        reading = jax.block_until_ready(
            prefill(self.model, [ids], self.saved.state, piece_size=self.piece_size)
        )
        self.read_tokens, self.read_seconds = len(ids), time.perf_counter() - start
        self._note(reading, ids)

    def speak(self, max_new_tokens: int, on_text: Callable[[str], None]) -> Spoken:
        """Generates up to ``max_new_tokens``; ``on_text`` hears the text as it comes."""
        self._warm_up_speaking(max_new_tokens)
        stream, parts = TextStream(self.tokenizer, self._context), []

        def say(text: str) -> None:
            if text:
                parts.append(text)
                on_text(text)

        start = time.perf_counter()
        result = self._generate(max_new_tokens, lambda new: say(stream.push(new[0])))
        jax.block_until_ready(result.logits)
        seconds = time.perf_counter() - start
        say(stream.close())
        self._note(Reading(result.logits, result.state), result.tokens[0])
        return Spoken("".join(parts), len(result.tokens[0]), result.stopped[0], seconds)

    def _generate(self, count: int, callback: Callable[[list[list[int]]], None] | None):
        state, logits = self.saved
        if logits is None:
            raise ValueError("nothing was read that could be continued")
        end = self.tokenizer.eos_id
        return generate(
            self.model,
            max_new_tokens=count,
            state=state,
            logits=logits,
            sampling=self.sampling,
            seeds=self.seed,
            seen=self._seen if self.sampling.penalises else None,
            stop_tokens=() if end is None else (end,),
            allowed_tokens=min(self.tokenizer.vocab_size, self.loaded.config.vocab_size),
            callback=callback,
            block_size=self.block_size,
        )

    def _note(self, reading: Reading, ids: Sequence[int]) -> None:
        self._reading = SavedState(reading.state, reading.logits)
        self._seen[0, list(ids)] = True
        self._context = [*self._context, *ids][-64:]

    def _warm_up_reading(self, length: int) -> None:
        """Compiles what reading so many tokens runs, on a prompt of at most two pieces."""
        rest, whole = length % self.piece_size, min(length // self.piece_size, 1)
        if ("read", rest, whole) not in self._compiled:
            dummy = [0] * (rest + whole * self.piece_size)
            jax.block_until_ready(prefill(self.model, [dummy], self.saved.state, piece_size=self.piece_size))
            self._compiled.add(("read", rest, whole))

    def _warm_up_speaking(self, max_new_tokens: int) -> None:
        steps = min(self.block_size, max_new_tokens)
        if ("speak", steps) not in self._compiled:
            jax.block_until_ready(self._generate(steps, None).logits)
            self._compiled.add(("speak", steps))
