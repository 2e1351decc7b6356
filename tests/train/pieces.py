"""A tiny SentencePiece model, trained on the spot."""

import io

import sentencepiece

from tests.train.corpora import entries


def sentencepiece_model() -> bytes:
    """340 pieces with byte fallback."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([entry["text"] for entry in entries(200)]),
        model_writer=stream,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return stream.getvalue()
