"""Long-context tasks in the manner of RULER: needles by key, and variable tracking.

    single_1     one needle (word: number) in a repeated sentence
    single_2     one needle (word: number) in prose
    single_3     one needle (word: long hexadecimal id) in prose
    multikey     four needles with different keys in prose, one is asked for
    multivalue   four needles with the same key in prose, all values are asked for
    multiquery   four needles with different keys in prose, all are asked for
    variables    a chain of assignments ("VAR A = 12345", "VAR B = VAR A", ...) in the repeated sentence; all
                 variables that hold the value are asked for

The score of an answer is the share of expected strings that it contains, upper or lower case.

Source: Hsieh et al., "RULER: What's the real context size of your long-context language models?",
arXiv:2404.06654 (tasks, wording of needles and questions, scoring).
"""

import dataclasses
import functools
import hashlib
import itertools
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

TASKS = ("single_1", "single_2", "single_3", "multikey", "multivalue", "multiquery", "variables")
SINGLES = ("single_1", "single_2", "single_3")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_COUNT = 4  # needles of the multi tasks, hops of the chain

_ADJECTIVES = """
amber brave calm dusty eager faint gentle hollow icy jolly keen lively mellow narrow odd plain quiet rapid
shiny tender upright vivid warm young zesty bitter clever distant early fierce golden humble
"""
_NOUNS = """
anchor basket candle drawer engine feather garden hammer island jacket kettle ladder marble needle orchard
pencil quarry ribbon saddle timber umbrella violin window yarn bridge copper desert falcon glacier harbor
"""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question: the whole prompt, and the strings that a right answer contains."""

    prompt: str
    answers: tuple[str, ...]


@functools.cache
def prose(path: str = "") -> tuple[tuple[str, ...], str]:
    """Sentences of a text file, or of the built-in text, and the SHA-256 of the text.

    The built-in text is the reference manual that ships with Python (``pydoc_data.topics``): a megabyte of
    English, different between Python versions, hence the hash.

    Raises:
      ValueError: for a text of fewer than 100 sentences.
    """
    if path:
        text = Path(path).read_text()
    else:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    flat = re.sub(r"\s+", " ", text)
    sentences = tuple(s for s in re.split(r"(?<=[.!?]) ", flat) if 20 <= len(s) <= 400)
    if len(sentences) < 100:
        raise ValueError(
            f"the haystack text {path or 'built in'!r} has {len(sentences)} sentences; it needs 100"
        )
    return sentences, hashlib.sha256(text.encode()).hexdigest()


def _word(rng: np.random.Generator) -> str:
    return f"{rng.choice(_ADJECTIVES.split())}-{rng.choice(_NOUNS.split())}"


def _words(rng: np.random.Generator, count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        word = _word(rng)
        if word not in found:
            found.append(word)
    return found


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(1_000_000, 10_000_000))


def _identifier(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def insert(hay: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """The haystack with each needle before sentence number ``round(depth * len(hay))``."""
    places = sorted(range(len(needles)), key=lambda i: depths[i])
    parts: list[str] = []
    before = 0
    for index in places:
        at = round(depths[index] * len(hay))
        parts += [*hay[before:at], needles[index]]
        before = at
    return " ".join([*parts, *hay[before:]])


def make(task: str, units: int, depth: float | None, seed: int, haystack: str = "") -> Sample:
    """One sample.

    Args:
      task: one of ``TASKS``.
      units: size of the haystack in sentences.
      depth: of the needle, in [0, 1], for the single tasks; other needles lie anywhere.
      seed: everything random follows from it; a larger haystack goes on where a smaller one ends.
      haystack: file with the prose, empty for the built-in one.

    Raises:
      ValueError: for an unknown task, or a depth given to a task with several needles.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    if (depth is None) == (task in SINGLES):
        raise ValueError(f"depth is {depth} for task {task!r}; the single tasks have one, the others none")
    rng = np.random.default_rng([seed, TASKS.index(task)])
    if task in ("single_1", "variables"):
        noise = NOISE.split(". ")
        hay = [noise[i % len(noise)].rstrip(".") + "." for i in range(units)]
    else:
        sentences, _ = prose(haystack)
        start = int(rng.integers(len(sentences)))
        hay = [sentences[(start + i) % len(sentences)] for i in range(units)]
    if task == "variables":
        return _variables(rng, hay)
    kind = "uuid" if task == "single_3" else "number"
    draw = _identifier if kind == "uuid" else _number
    count = 1 if task in SINGLES else _COUNT
    keys = _words(rng, 1) * count if task == "multivalue" else _words(rng, count)
    values = [draw(rng) for _ in range(count)]
    depths = [depth] if depth is not None else rng.random(count).tolist()
    needles = [
        f"One of the special magic {kind}s for {k} is: {v}." for k, v in zip(keys, values, strict=True)
    ]
    if task == "multiquery":
        asked, answers = ", ".join(keys[:-1]) + f", and {keys[-1]}", values
    elif task == "multivalue":
        asked, answers = keys[0], values
    else:
        asked, answers = keys[0], values[:1]
    many = len(answers) > 1
    name, verb = (f"{kind}s", "are") if many else (kind, "is")
    prompt = (
        f"{'Some' if many else 'A'} special magic {name} {verb} hidden within the following text. Make sure "
        f"to memorize it. I will quiz you about the {name} afterwards.\n{insert(hay, needles, depths)}\n"
        f"What {verb} {'all ' if many else ''}the special magic {name} for {asked} mentioned in the provided "
        f"text? The special magic {name} for {asked} mentioned in the provided text {verb}"
    )
    return Sample(prompt, tuple(answers))


def _variables(rng: np.random.Generator, hay: list[str]) -> Sample:
    names: list[str] = []
    while len(names) <= _COUNT:
        name = "".join(chr(65 + i) for i in rng.integers(0, 26, 5))
        if name not in names:
            names.append(name)
    value = str(rng.integers(10_000, 100_000))
    lines = [f"VAR {names[0]} = {value}."]
    lines += [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(names)]
    text = insert(hay, lines, sorted(rng.random(len(lines)).tolist()))
    prompt = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{text}\nQuestion: Find all variables that are assigned the value {value} in the text above. "
        f"Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables "
        f"are assigned the value {value}, they are:"
    )
    return Sample(prompt, tuple(names))


def fit(
    task: str,
    tokens: int,
    encode: Callable[[str], list[int]],
    *,
    depth: float | None,
    seed: int,
    haystack: str = "",
    guess: int = 0,
) -> tuple[Sample, list[int], int]:
    """A sample whose prompt has at most ``tokens`` tokens, and at least 97% of them if sentences allow.

    Args:
      task, depth, seed, haystack: see ``make``.
      encode: text to token ids.
      guess: size of a haystack that fitted before; taken if it fits again, else searched.

    Returns:
      sample, ids of its prompt, size of its haystack in sentences.

    Raises:
      ValueError: if even an empty haystack is too long.
    """

    def build(units: int) -> tuple[Sample, list[int], int]:
        sample = make(task, units, depth, seed, haystack)
        return sample, encode(sample.prompt), units

    if guess and 0.97 * tokens <= len((tried := build(guess))[1]) <= tokens:
        return tried
    best = build(0)
    if len(best[1]) > tokens:
        raise ValueError(f"{task} has {len(best[1])} tokens without any haystack; {tokens} are too few")
    high = 8
    while len((grown := build(high))[1]) <= tokens:
        best, high = grown, 2 * high
    while high - best[2] > max(1, best[2] // 200):
        tried = build((best[2] + high) // 2)
        if len(tried[1]) <= tokens:
            best = tried
        else:
            high = tried[2]
    return best


def score(answer: str, expected: Sequence[str]) -> float:
    """Share of the expected strings that the answer contains, whatever their case."""
    return sum(text.lower() in answer.lower() for text in expected) / len(expected)


def oracle(prompt: str) -> str:
    """A perfect answer by reading the prompt with patterns; what a model that remembers could say."""
    chain = re.search(r"assigned the value (\d+) in the text above", prompt)
    if chain:
        found = [n for n, v in re.findall(r"VAR (\w+) = (\d+)\.", prompt) if v == chain.group(1)]
        for new, old in re.findall(r"VAR (\w+) = VAR (\w+)\.", prompt):
            if old in found:
                found.append(new)
        return " ".join(found)
    asked = re.search(r"for ([^.?]*?) mentioned in the provided text\?", prompt).group(1)
    pairs = re.findall(r"magic \w+ for ([\w-]+) is: ([\w-]+)\.", prompt)
    return " ".join(value for key, value in pairs if key in asked)
