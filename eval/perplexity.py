"""Perplexity over whole documents: loss by position, under named protocols, by subset.

Documents of the chosen split are read by three protocols that predict the same targets (eval/protocols.py):
streamed from the beginning to any length, in separate windows, in sliding windows. Values, by (protocol,
window, subset, bucket): "nats" per token (sum over tokens, intervals by bootstrap over documents),
"perplexity" = exp(nats), and over all positions "bits_per_byte", which compares across tokenizers. A bucket
holds the targets at positions [from, to) of their documents.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence

import numpy as np

from eval import common, perplexity_view
from eval.common import Reporter, UsageError
from eval.failures import as_status
from eval.intervals import bootstrap
from eval.opened import limit, open_documents, open_model, require_checkpoint, take_by_subset
from eval.protocols import readings
from eval.results import Value, absent, exact
from eval.token_losses import LossReader, read_all
from train.corpus.dataset import Document


@dataclasses.dataclass(frozen=True)
class Settings:
    """See configs/eval/perplexity.py."""

    checkpoint: str
    random_model: dict
    data: str
    split: str
    subsets: tuple[str, ...]
    documents: int
    scan: int
    min_tokens: int
    max_tokens: int
    windows: tuple[int, ...]
    stride: int
    sliding_windows: tuple[int, ...]
    buckets: tuple[int, ...]
    rows: int
    piece: int
    seed: int

    def __post_init__(self) -> None:
        require_checkpoint(self.checkpoint)
        if list(self.buckets) != sorted(set(self.buckets)) or len(self.buckets) < 2 or self.buckets[0] != 0:
            raise ValueError(f"buckets is {self.buckets}; it needs increasing borders from 0")
        if not 2 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}; it must be 2 to max_tokens ({self.max_tokens})"
            )
        for window in (*self.windows, *self.sliding_windows):
            if window < 1:
                raise ValueError(f"windows has {window}; windows have at least 1 token")
        for window in self.sliding_windows if self.stride else ():
            if self.stride > window:
                raise ValueError(f"stride is {self.stride}; it must not exceed the sliding window {window}")
        if self.documents < 1:
            raise ValueError(f"documents is {self.documents}; it must be at least 1")

    @property
    def protocols(self) -> list[dict]:
        """Protocols with their sizes."""
        found = [dict(protocol="document", window=0, stride=0)]
        found += [dict(protocol="non_overlapping", window=w, stride=0) for w in self.windows]
        if self.stride:
            found += [dict(protocol="sliding", window=w, stride=self.stride) for w in self.sliding_windows]
        return found


def losses_of(reader: LossReader, documents: Sequence[np.ndarray], sizes: dict, done=lambda n: None) -> list:
    """Nats of every target of every document under one protocol: float32 [len - 1] each."""
    jobs = [
        (index, reading)
        for index, tokens in enumerate(documents)
        for reading in readings(length=len(tokens), **sizes)
    ]
    texts = [documents[index][reading.start : reading.end] for index, reading in jobs]
    whole = [np.full(len(tokens) - 1, np.nan, np.float32) for tokens in documents]
    for (index, (start, end, counted)), scores in zip(jobs, read_all(reader, texts, done), strict=True):
        whole[index][counted - 1 : end - 1] = scores.nats[counted - start - 1 :]
    for losses in whole:
        if not np.isfinite(losses).all():
            raise FloatingPointError("a loss is not finite: the model's parameters or logits are broken")
    return whole


def predicted_bytes(tokenizer, document: Document, tokens: np.ndarray) -> int:
    """Bytes of text of all tokens but the first (which nothing predicts)."""
    first = len(tokenizer.decode_bytes([int(tokens[0])]))
    if len(tokens) == len(document.tokens):
        return document.text_bytes - first
    return len(tokenizer.decode_bytes(tokens.tolist())) - first


def _ratio(samples: np.ndarray, axis: int) -> np.ndarray:
    return samples[:, 0].sum() / samples[:, 1].sum()


def summarise(losses: Sequence[np.ndarray], sizes: Sequence[int], settings: Settings, **where) -> list[Value]:
    """Values of one group of documents under one protocol.

    Args:
      losses: nats of the targets of each document.
      sizes: bytes that those targets stand for, a document each.
    """
    values = []
    spans = [("all", 0, None), *((f"{a}-{b}", a, b) for a, b in itertools.pairwise(settings.buckets))]
    for name, low, high in spans:
        # Target number i of a document stands at position i + 1.
        parts = [x[max(0, low - 1) : None if high is None else high - 1] for x in losses]
        parts = [x for x in parts if x.size]
        if not parts:
            continue
        samples = np.array([(x.sum(dtype=np.float64), x.size) for x in parts])
        nats = bootstrap(samples, statistic=_ratio, seed=settings.seed)
        cell = {**where, "bucket": name, "from": low}
        detail = f"{int(samples[:, 1].sum())} tokens"
        values.append(Value("nats", cell, *map(float, nats), len(parts), "bootstrap", detail=detail))
        if nats[2] < 700:
            perplexity = [math.exp(x) for x in nats]
            values.append(Value("perplexity", cell, *perplexity, len(parts), "bootstrap", detail=detail))
    bits = np.array([(x.sum(dtype=np.float64) / math.log(2), n) for x, n in zip(losses, sizes, strict=True)])
    low_mid_high = bootstrap(bits, statistic=_ratio, seed=settings.seed)
    cell = {**where, "bucket": "all", "from": 0}
    detail = f"{sum(sizes)} bytes"
    return [
        *values,
        Value("bits_per_byte", cell, *map(float, low_mid_high), len(bits), "bootstrap", detail=detail),
    ]


def evaluate(settings: Settings, reporter: Reporter) -> None:
    """Reads the documents by every protocol."""
    opened = open_model(settings.checkpoint, settings.random_model)
    stream, tokenizer, fingerprint = open_documents(
        settings.data, settings.split, min_tokens=settings.min_tokens
    )
    if tokenizer.vocab_size != opened.tokenizer.vocab_size:
        raise UsageError(
            f"{settings.data} was tokenized with {tokenizer.vocab_size} ids, the model's tokenizer has "
            f"{opened.tokenizer.vocab_size}; prepare the data with the model's tokenizer"
        )
    documents = take_by_subset(limit(stream, settings.scan), settings.documents, subsets=settings.subsets)
    if not documents:
        raise UsageError(
            f"{settings.data} has no document of {settings.min_tokens} tokens in {settings.split!r}"
        )
    tokens = [document.tokens[: settings.max_tokens] for document in documents]
    sizes = [predicted_bytes(tokenizer, d, t) for d, t in zip(documents, tokens, strict=True)]
    subsets = sorted({document.subset for document in documents})
    groups = {"all": list(range(len(documents)))}
    if len(subsets) > 1:
        groups |= {name: [i for i, d in enumerate(documents) if d.subset == name] for name in subsets}
    reader = LossReader(opened.model, rows=settings.rows, piece=settings.piece)
    for protocol in settings.protocols:
        count = sum(len(list(readings(length=len(t), **protocol))) for t in tokens)
        reporter.steps.expect(count)
    for protocol in settings.protocols:
        label = protocol["protocol"] + (f" {protocol['window']}" if protocol["window"] else "")
        where = {"model": opened.name, **protocol}
        try:
            losses = losses_of(reader, tokens, protocol, lambda n, label=label: reporter.steps.done(label, n))
        except Exception as error:
            detail = str(error)[:500]
            reporter.add(absent("nats", as_status(error), detail=detail, **where, subset="all", bucket="all"))
            continue
        for name, members in groups.items():
            chosen = [losses[i] for i in members]
            bytes_of = [sizes[i] for i in members]
            reporter.add(*summarise(chosen, bytes_of, settings, **where, subset=name))
    reporter.add(exact("documents", len(documents), model=opened.name))
    reporter.note(
        f"{len(documents)} documents of {settings.data} ({settings.split}), fingerprint {fingerprint[:16]}; "
        f"at least {settings.min_tokens} tokens, at most {settings.max_tokens} of each read; losses in nats "
        "per token, intervals by bootstrap over documents"
    )


figures, table = perplexity_view.figures, perplexity_view.table


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line; returns the exit code."""
    return common.run("perplexity", Settings, evaluate, figures=figures, table=table, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
