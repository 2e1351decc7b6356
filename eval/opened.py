"""What an evaluation reads: a model with its tokenizer, and documents."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from flax import nnx

from eval.common import UsageError
from holo_jax import HoloConfig, HoloForCausalLM
from holo_jax.precision import Precision
from holo_jax.pretrained import load_pretrained
from holo_jax.tokenizers import Tokenizer, load_tokenizer
from train.corpus.dataset import Document
from train.corpus.prepared import PreparedDataset
from train.data import python_source

RANDOM = "random"


def require_checkpoint(checkpoint: str) -> None:
    """Checks that a checkpoint was named.

    Raises:
      ValueError: saying what to give.
    """
    if not checkpoint:
        raise ValueError(f"checkpoint is empty; give a run directory, or {RANDOM!r} for an untrained model")


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model to evaluate.

    Attributes:
      model: ``HoloForCausalLM``.
      tokenizer: text to ids and back; its vocabulary fits the model's.
      name: how results call it.
    """

    model: HoloForCausalLM
    tokenizer: Tokenizer
    name: str

    @property
    def config(self) -> HoloConfig:
        """The model's configuration."""
        return self.model.config


def open_model(checkpoint: str, random_model: dict) -> Opened:
    """A trained model, or one as it is before training.

    Args:
      checkpoint: a run directory or a checkpoint in it: what ``holo_jax.load_pretrained`` takes. "random"
        builds ``random_model`` with a byte tokenizer instead: a check whose answers are known.
      random_model: ``preset``, ``seed`` and fields of ``HoloConfig``.

    Raises:
      UsageError: if there is no tokenizer or it has more ids than the model.
    """
    if checkpoint == RANDOM:
        fields = {k: v for k, v in random_model.items() if k not in ("preset", "seed", "storage")}
        precision = Precision(storage=random_model.get("storage", "float32"))
        config = HoloConfig.preset(random_model["preset"], precision=precision, **fields)
        model = HoloForCausalLM(config, rngs=nnx.Rngs(random_model["seed"]))
        opened = Opened(model, load_tokenizer("bytes"), f"{random_model['preset']}, untrained")
    else:
        loaded = load_pretrained(checkpoint)
        if loaded.tokenizer is None:
            raise UsageError(f"{checkpoint} has no tokenizer; evaluations on text need one")
        opened = Opened(loaded.model, loaded.tokenizer, f"{_run_name(Path(checkpoint))}, step {loaded.step}")
    if opened.tokenizer.vocab_size > opened.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {opened.tokenizer.vocab_size} ids; the model only {opened.config.vocab_size}"
        )
    return opened


def _run_name(path: Path) -> str:
    """A run's name, also from the path of one of its checkpoints."""
    resolved = path.resolve()
    return resolved.parent.parent.name if resolved.parent.name == "checkpoints" else resolved.name


def open_documents(data: str, split: str, *, min_tokens: int) -> tuple[Iterator[Document], Tokenizer, str]:
    """Whole documents of a corpus.

    Args:
      data: "python" (the standard library's sources as bytes) or a directory made by ``train.prepare``.
      split: "heldout", "train" or another of the corpus's own.
      min_tokens: shorter documents are left out.

    Returns:
      documents, the tokenizer they were made with, and the corpus's fingerprint.
    """
    if data == "python":
        dataset = python_source(256, split)
    else:
        dataset = PreparedDataset(data, split)
    return dataset.documents(split, min_tokens=min_tokens), dataset.tokenizer, dataset.fingerprint


def take_by_subset(
    documents: Iterator[Document], most: int, *, subsets: tuple[str, ...] = ()
) -> list[Document]:
    """The first ``most`` documents of every subset, in corpus order.

    Args:
      documents: see ``open_documents``.
      most: of each subset.
      subsets: keep only these; empty keeps all. With names given, reading stops when all are full.
    """
    taken: dict[str, int] = {}
    kept = []
    for document in documents:
        if subsets and document.subset not in subsets:
            continue
        count = taken.get(document.subset, 0)
        if count < most:
            kept.append(document)
            taken[document.subset] = count + 1
        elif subsets and all(taken.get(name, 0) >= most for name in subsets):
            break
    return kept


def limit(documents: Iterator[Document], scan: int) -> Iterator[Document]:
    """At most ``scan`` documents, so that a huge corpus is not read to its end for a rare subset."""
    return itertools.islice(documents, scan)
