"""Text from tokens as they come: a character that spans tokens is held back until it is whole."""

import codecs
from collections.abc import Sequence

from holo_jax.tokenizers import Tokenizer

_CONTEXT = 16
_REPLACEMENT = "\ufffd".encode()


class TextStream:
    """Turns pieces of one token sequence into pieces of its text; joined, they are the whole text.

    Bytes that never become valid UTF-8 are shown as U+FFFD, as soon as that is certain.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """Begins after ``context``, whose text is not repeated (spaces between words depend on it)."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids = list(context[-_CONTEXT:])
        self._done = tokenizer.decode_bytes(self._ids)
        self._decoder.decode(self._done)

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain after these ids."""
        text = self._advance(list(ids), final=False)
        if len(self._ids) > 4 * _CONTEXT:
            self._ids = self._ids[-_CONTEXT:]
            whole = self._tokenizer.decode_bytes(self._ids)
            self._done = whole[: len(whole) - len(self._held)]
        return text

    def close(self) -> str:
        """The rest; a character that was cut off is U+FFFD."""
        return self._advance([], final=True)

    def _advance(self, ids: list[int], *, final: bool) -> str:
        self._ids += ids
        data = self._tokenizer.decode_bytes(self._ids)
        ready = data
        if not final:
            # Vocabularies without bytes of their own show an unfinished character like this.
            while ready.endswith(_REPLACEMENT):
                ready = ready[: -len(_REPLACEMENT)]
        self._held = data[len(ready) :]
        # A vocabulary that joins words may change the end of what came before: that cannot be taken back.
        pairs = enumerate(zip(self._done, ready, strict=False))
        same = next((i for i, (old, now) in pairs if old != now), min(len(self._done), len(ready)))
        new, self._done = ready[same:], ready
        return self._decoder.decode(new, final)
