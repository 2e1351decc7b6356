"""A byte-level BPE vocabulary from a sample of the corpus itself."""

from collections.abc import Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from train.corpus.errors import TokenizerError
from train.corpus.readers import Fields, Text, read_documents
from train.corpus.sources import SourceFile
from train.corpus.tokenizers import JsonTokenizer

_MARKS = ("<s>", "</s>")
SMALLEST = 256 + len(_MARKS)


def sample_texts(sources: Sequence[SourceFile], fields: Fields, sample_bytes: int) -> Iterator[str]:
    """Texts from the beginning of every training file, an equal share of ``sample_bytes`` from each.

    The sample depends on the files only. It is a fair one where documents are shuffled over and within
    the files, as SlimPajama's are.
    """
    files = [source for source in sources if source.split == "train"] or list(sources)
    share = -(-sample_bytes // len(files))
    for file in files:
        taken = 0
        for result in read_documents(file, fields):
            if taken >= share:
                break
            if isinstance(result, Text):
                taken += result.text_bytes
                yield result.text


def train_tokenizer(vocab_size: int, texts: Iterator[str]) -> JsonTokenizer:
    """Trains a byte-level BPE with marks ``<s>`` (0) and ``</s>`` (1); every text can be encoded.

    Raises:
      TokenizerError: if the size is too small, or the sample is too small for the size.
    """
    if vocab_size < SMALLEST:
        raise TokenizerError(f"train:{vocab_size}: the vocabulary must have at least {SMALLEST} entries")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise TokenizerError(
            f"train:{vocab_size}: the sample gives only {found} entries; ask for fewer, "
            "or raise --tokenizer-sample-mb"
        )
    return JsonTokenizer(tokenizer.to_str().encode(), f"train:{vocab_size}", *_MARKS)
