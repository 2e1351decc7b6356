"""The data sets of a run, opened from its configuration, and their identity."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from train.corpus.dataset import Dataset, Document, Mixture, Record, segments_to_record
from train.corpus.prepared import PreparedDataset
from train.corpus.tokenizers import Tokenizer, describe_tokenizer
from train.data import python_source
from train.errors import ConfigError
from train.run_config import DataConfig, RunConfig


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
      train: what is trained on.
      heldout: what is evaluated on, at the evaluation's context length.
      tokenizer: None if the data has none (random tokens).
      heldout_split: name of the held-out split.
    """

    train: Dataset | Mixture
    heldout: Dataset | Mixture
    tokenizer: Tokenizer | None
    heldout_split: str = "heldout"

    @property
    def identity(self) -> dict[str, Any]:
        """What the data is, in plain values by name; a run is resumed with the same only."""
        found = {"train": _describe(self.train), "heldout": _describe(self.heldout)}
        if self.tokenizer is not None:
            fields = describe_tokenizer(self.tokenizer)
            # Not the library: the files decide what a tokenizer does, and an update must not end a run.
            found["tokenizer"] = {name: fields[name] for name in ("kind", "vocab_size", "sha256")}
        return found

    def heldout_documents(self) -> Iterator[Document]:
        """Every held-out document, whole."""
        parts = self.heldout.datasets if isinstance(self.heldout, Mixture) else (self.heldout,)
        return itertools.chain.from_iterable(part.documents(self.heldout_split) for part in parts)


def _describe(data: Dataset | Mixture) -> dict[str, Any]:
    if isinstance(data, Mixture):
        parts = {str(number): _describe(part) for number, part in enumerate(data.datasets)}
        return {"weights": [float(weight) for weight in data.weights], "parts": parts}
    found = {"records": len(data), "context_length": data.context_length, "vocab_size": data.vocab_size}
    if isinstance(data, PreparedDataset):
        found |= data.description
    return found | {"fingerprint": data.fingerprint}


def open_inputs(config: RunConfig) -> Inputs:
    """Opens the data of ``config``.

    Raises:
      DataError: if it is missing or damaged.
      ConfigError: if vocabulary or sizes do not fit the model and the evaluation.
    """
    length = config.context_length
    eval_length = config.eval.context_length or length
    if config.data.source == "python":
        train = python_source(length, "train")
        inputs = Inputs(train, python_source(eval_length, "heldout"), train.tokenizer)
    elif config.data.source == "prepared":
        inputs = _prepared(config.data, length, eval_length)
    else:
        vocab = config.model.vocab_size
        inputs = Inputs(RandomTokens(vocab, length, 0), RandomTokens(vocab, eval_length, 1), None)
    if inputs.train.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}; "
            f"it must be at least the data's {inputs.train.vocab_size}"
        )
    if inputs.train.context_length != length:
        raise ConfigError(
            f"context_length is {length}; the data was prepared with {inputs.train.context_length}"
        )
    if config.eval.sample_tokens and inputs.tokenizer is None:
        raise ConfigError(f"eval.sample_tokens is {config.eval.sample_tokens}; this data has no tokenizer")
    if config.eval.heldout_summary and not _keeps_text(inputs):
        raise ConfigError("eval.heldout_summary is True; this data does not keep the bytes of its documents")
    return inputs


def _prepared(data: DataConfig, length: int, eval_length: int) -> Inputs:
    train = [PreparedDataset(path, "train", context_length=length) for path in data.paths]
    heldout = [PreparedDataset(path, data.heldout_split, context_length=eval_length) for path in data.paths]
    tokenizer = train[0].tokenizer
    if len(train) == 1:
        return Inputs(train[0], heldout[0], tokenizer, data.heldout_split)
    weights = data.weights or (1.0,) * len(train)
    return Inputs(Mixture(train, weights), Mixture(heldout, weights), tokenizer, data.heldout_split)


def _keeps_text(inputs: Inputs) -> bool:
    first = next(inputs.heldout_documents(), None)
    return first is not None and first.raw is not None


class RandomTokens:
    """Uniform random tokens: a data set of any shape for trying out hardware. Nothing can be learned."""

    def __init__(self, vocab_size: int, context_length: int, seed: int, records: int = 1 << 16) -> None:
        self.vocab_size, self.context_length = vocab_size, context_length
        self._seed, self._records = seed, records
        self.fingerprint = hashlib.sha256(
            f"random/1/{vocab_size}/{context_length}/{seed}/{records}".encode()
        ).hexdigest()

    def __len__(self) -> int:
        return self._records

    def __getitem__(self, index: int) -> Record:
        generator = np.random.default_rng([self._seed, index])
        tokens = generator.integers(self.vocab_size, size=self.context_length, dtype=np.int32)
        return segments_to_record(tokens, np.zeros(1, np.int64), self.context_length)

    def documents(self, split: str | None = None, *, min_tokens: int = 1) -> Iterator[Document]:
        """There are none."""
        return iter(())
