"""Which tokens a model may see before each target: the three protocols of long-text perplexity.

Every protocol predicts the same targets, all tokens of a document but its first, each exactly once:

    document          the document is read once from its beginning; the target at position p has seen p tokens
    non_overlapping   windows of W targets, each read from nothing: between 1 and W tokens seen
    sliding           windows of W tokens that move by S: at least W - S tokens seen (where there are as many)
"""

from collections.abc import Iterator
from typing import NamedTuple

PROTOCOLS = ("document", "non_overlapping", "sliding")


class Reading(NamedTuple):
    """Read ``tokens[start:end]`` from nothing; the losses of targets ``counted`` to ``end - 1`` count."""

    start: int
    end: int
    counted: int


def readings(protocol: str, length: int, *, window: int = 0, stride: int = 0) -> Iterator[Reading]:
    """The readings of a document of ``length`` tokens.

    Args:
      protocol: see above.
      length: tokens of the document, at least 2.
      window: W in tokens, for all but "document".
      stride: S in tokens, 1 to W, for "sliding".

    Raises:
      ValueError: for an unknown protocol or sizes that do not fit it.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}; it must be one of {', '.join(PROTOCOLS)}")
    if length < 2:
        raise ValueError(f"length is {length}; a document needs 2 tokens")
    if protocol == "document":
        yield Reading(0, length, 1)
        return
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    if protocol == "non_overlapping":
        for start in range(0, length - 1, window):
            yield Reading(start, min(start + window + 1, length), start + 1)
        return
    if not 1 <= stride <= window:
        raise ValueError(f"stride is {stride}; it must be between 1 and the window ({window})")
    end = min(window + 1, length)
    yield Reading(0, end, 1)
    while end < length:
        counted, end = end, min(end + stride, length)
        yield Reading(end - 1 - window, end, counted)
