"""``lm_eval``'s view of a model: log-likelihoods, rolling log-likelihoods, generation until a string.

Nothing is ever cut off: a request that does not fit raises ``TruncationError``. Memories of constant size
have no limit; models with attention have the one that they are given.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM

from eval.opened import Opened
from eval.token_losses import LossReader, read_all
from holo_jax.generate import Sampling, decoding_form, generate

_GENERATION_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed"}


class TruncationError(ValueError):
    """A request is longer than the model may read; it is refused, not shortened."""


class HoloLM(TemplateLM):
    """A ``HoloForCausalLM`` and its tokenizer for lm-evaluation-harness.

    Args:
      opened: model and tokenizer.
      max_length: most tokens of a request, generated ones included; 0 for no limit.
      rows, piece: how much is read at one time (``LossReader``).

    Raises:
      ValueError: for a tokenizer without begin or end mark (there would be nothing to predict the first
        token from).
    """

    def __init__(self, opened: Opened, *, max_length: int = 0, rows: int = 8, piece: int = 256) -> None:
        super().__init__()
        if opened.tokenizer.bos_id is None and opened.tokenizer.eos_id is None:
            raise ValueError(
                "the tokenizer has neither a begin nor an end mark to predict a first token from"
            )
        self.opened, self.max_length = opened, max_length
        self._reader = LossReader(opened.model, rows=rows, piece=piece)
        self._rows, self._piece = rows, piece

    @property
    def eot_token_id(self) -> int:
        """The end mark, or the begin mark where there is none."""
        tokenizer = self.opened.tokenizer
        return tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: the begin mark, or the end mark where there is none."""
        tokenizer = self.opened.tokenizer
        return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """For the harness's request cache."""
        return self.opened.tokenizer.kind

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with the begin mark before it (if there is one) unless told otherwise."""
        tokenizer = self.opened.tokenizer
        ids = [int(i) for i in tokenizer.encode(string)]
        start = [] if tokenizer.bos_id is None or add_special_tokens is False else [tokenizer.bos_id]
        return start + ids

    def _check_length(self, tokens: int, what: str) -> None:
        if self.max_length and tokens > self.max_length:
            raise TruncationError(
                f"a request of {what} has {tokens} tokens; the model may read {self.max_length}. Raise "
                "max_length if the model allows, or choose a task with shorter texts: nothing is cut off"
            )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            if not continuation:
                raise ValueError("a request of loglikelihood has an empty continuation; it has no likelihood")
            self._check_length(len(context) + len(continuation), "loglikelihood")
            texts.append(np.array(context + continuation, np.int32))
        found = []
        for (_, _, continuation), scores in zip(requests, read_all(self._reader, texts), strict=True):
            count = len(continuation)
            found.append(
                (-float(scores.nats[-count:].sum(dtype=np.float64)), bool(scores.likeliest[-count:].all()))
            )
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each read once from its beginning, whatever its length."""
        texts = []
        for request in requests:
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            self._check_length(len(ids), "loglikelihood_rolling")
            texts.append(np.array(ids, np.int32))
        return [-float(scores.nats.sum(dtype=np.float64)) for scores in read_all(self._reader, texts)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the request's ``until`` strings, which is left out.

        Raises:
          ValueError: for an option that is not known.
          TruncationError: if prompt and continuation do not fit.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            unknown = set(request.args[1]) - _GENERATION_OPTIONS
            if unknown:
                raise ValueError(f"generate_until has the options {sorted(unknown)}; they are not supported")
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(index)
        found: dict[int, str] = {}
        for members in groups.values():
            for first in range(0, len(members), self._rows):
                batch = members[first : first + self._rows]
                found.update(zip(batch, self._continue([requests[i].args for i in batch]), strict=True))
        return [found[index] for index in range(len(requests))]

    def _continue(self, batch: Sequence[tuple[str, dict]]) -> list[str]:
        options = batch[0][1]
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        count = int(options.get("max_gen_toks", 256))
        sampled = bool(options.get("do_sample", False)) and float(options.get("temperature", 1.0)) > 0
        sampling = Sampling(
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(options.get("top_p", 1.0)) if sampled else 1.0,
            top_k=int(options.get("top_k", 0)) if sampled else 0,
        )
        prompts = [self.tok_encode(context) or [self.prefix_token_id] for context, _ in batch]
        for prompt in prompts:
            self._check_length(len(prompt) + count, "generate_until")
        tokenizer = self.opened.tokenizer
        result = generate(
            decoding_form(self.opened.model),
            prompts,
            max_new_tokens=count,
            sampling=sampling,
            stop_tokens=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
            seeds=int(options.get("seed", 0)),
            allowed_tokens=tokenizer.vocab_size,
            piece_size=self._piece,
        )
        return [cut(tokenizer.decode(ids), until) for ids in result.tokens]


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings."""
    ends = [text.find(mark) for mark in until if mark]
    return text[: min((end for end in ends if end >= 0), default=len(text))]
