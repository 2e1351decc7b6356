"""RULER-style needles and variable tracking from any checkpoint and its tokenizer.

Prompts of each length (tokens, with room for the answer) are read by streaming state and answered greedily;
the score of an answer is the share of expected strings it contains (eval/ruler_tasks.py). Values, by (model,
task, length, depth): "score", mean over samples (Wilson's interval where every answer is right or wrong, else
bootstrap). Tasks with several needles have no depth. A cell that does not fit in memory is "oom", not 0.
"""

import dataclasses
import sys

import numpy as np

from eval import common, ruler_view
from eval.common import Reporter
from eval.failures import as_status
from eval.opened import Opened, open_model, require_checkpoint
from eval.published import RULER, RULER_CITATION
from eval.results import absent, mean, proportion, published
from eval.ruler_tasks import SINGLES, TASKS, fit, prose, score
from holo_jax.generate import Sampling, decoding_form, generate


@dataclasses.dataclass(frozen=True)
class Settings:
    """See configs/eval/ruler.py."""

    checkpoint: str
    random_model: dict
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    haystack: str
    answer_tokens: int
    rows: int
    piece: int
    seed: int
    published: bool

    def __post_init__(self) -> None:
        require_checkpoint(self.checkpoint)
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"tasks has {task!r}; known are {', '.join(TASKS)}")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depths has {depth}; depths lie in [0, 1]")
        for name in ("samples", "answer_tokens", "rows", "piece"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for length in self.lengths:
            if length <= self.answer_tokens:
                raise ValueError(f"lengths has {length}; it must exceed answer_tokens ({self.answer_tokens})")


def answer(opened: Opened, prompts: list[list[int]], settings: Settings) -> list[str]:
    """Greedy answers to prompts of token ids."""
    tokenizer = opened.tokenizer
    result = generate(
        opened.model,
        prompts,
        max_new_tokens=settings.answer_tokens,
        sampling=Sampling(temperature=0.0),
        stop_tokens=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
        allowed_tokens=tokenizer.vocab_size,
        piece_size=settings.piece,
        block_size=settings.answer_tokens,
    )
    return [tokenizer.decode(row) for row in result.tokens]


def cells(settings: Settings) -> list[tuple[str, int, float | None, int]]:
    """(task, length, depth, samples) of every cell."""
    found = []
    for task in settings.tasks:
        for length in settings.lengths:
            if task in SINGLES:
                found += [(task, length, depth, settings.samples) for depth in settings.depths]
            else:
                found.append((task, length, None, settings.samples * len(settings.depths)))
    return found


def run_cell(
    opened: Opened, settings: Settings, task: str, length: int, depth: float | None, count: int, done
):
    """Scores [count] and prompt lengths [count] of one cell."""
    tokenizer = opened.tokenizer
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    scores: list[float] = []
    lengths: list[int] = []
    room = length - settings.answer_tokens - len(start)
    guess = 0
    for first in range(0, count, settings.rows):
        asked = []
        for number in range(first, min(first + settings.rows, count)):
            options = dict(depth=depth, seed=settings.seed + number, haystack=settings.haystack, guess=guess)
            asked.append(fit(task, room, tokenizer.encode, **options))
            # Sentences differ in length: a little less than what just fitted fits nearly always.
            guess = guess or int(0.985 * asked[-1][2])
        answers = answer(opened, [start + ids for _, ids, _ in asked], settings)
        scores += [score(text, sample.answers) for text, (sample, _, _) in zip(answers, asked, strict=True)]
        lengths += [len(start) + len(ids) for _, ids, _ in asked]
        done(len(asked))
    return np.array(scores), np.array(lengths)


def evaluate(settings: Settings, reporter: Reporter) -> None:
    """Asks every cell."""
    opened = open_model(settings.checkpoint, settings.random_model)
    opened = dataclasses.replace(opened, model=decoding_form(opened.model))
    planned = cells(settings)
    reporter.steps.expect(sum(count for *_, count in planned))
    for task, length, depth, count in planned:
        where = {"model": opened.name, "task": task, "length": length, "depth": depth}

        def done(number: int, where=where) -> None:
            reporter.steps.done(f"{where['task']}, {where['length']} tokens", number)

        try:
            scores, lengths = run_cell(opened, settings, task, length, depth, count, done)
        except Exception as error:
            reporter.add(absent("score", as_status(error), detail=str(error)[:500], **where))
            continue
        detail = f"prompts of {lengths.min()} to {lengths.max()} tokens"
        if set(np.unique(scores)) <= {0.0, 1.0}:
            reporter.add(proportion("score", scores.sum(), scores.size, detail=detail, **where))
        else:
            reporter.add(mean("score", scores, seed=settings.seed, detail=detail, **where))
    if settings.published:
        for model, tasks in RULER.items():
            for task, by_length in tasks.items():
                for length, percent in by_length:
                    cell = {"model": model, "task": task, "length": length, "depth": None}
                    reporter.add(published("score", percent / 100, citation=RULER_CITATION, **cell))
    _, digest = prose(settings.haystack)
    reporter.note(
        f"greedy answers of at most {settings.answer_tokens} tokens; lengths include them; haystack text "
        f"{settings.haystack or 'built in'}, SHA-256 {digest[:16]}"
    )


figures, table = ruler_view.figures, ruler_view.table


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line; returns the exit code."""
    return common.run("ruler", Settings, evaluate, figures=figures, table=table, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
