"""Needles by key and variable tracking (RULER's tasks) from any checkpoint and its tokenizer.

Command:  python -m eval.ruler --config=configs/eval/ruler.py --out=runs/NAME/ruler \\
              --config.checkpoint=runs/NAME
Hardware: one GPU (full); 2 CPU cores (quick, under a minute: an untrained model, which answers nothing).
"""

from configs.eval import RANDOM_MODEL, choose

_VARIANTS = {
    "full": dict(
        checkpoint="",  # run directory or a checkpoint in it; "random" for random_model
        random_model=RANDOM_MODEL,
        tasks=("single_1", "single_2", "single_3", "multikey", "multivalue", "multiquery", "variables"),
        lengths=(1024, 2048, 4096, 8192, 16_384),  # tokens, prompt and answer together
        depths=(0.0, 0.25, 0.5, 0.75, 1.0),  # of the single tasks
        samples=40,  # for each depth; tasks with several needles get as many as all depths together
        haystack="",  # text file with prose; empty for the built-in one
        answer_tokens=48,
        rows=20,
        piece=1024,
        seed=0,
        published=True,
    ),
    "quick": dict(
        checkpoint="random",
        tasks=("single_1", "multikey"),
        lengths=(640,),  # bytes, for the byte tokenizer
        depths=(0.5,),
        samples=2,
        answer_tokens=8,
        rows=2,
        piece=256,
        published=False,
    ),
}  # fmt: skip


def get_config(variant: str = "full"):
    """Settings of ``eval.ruler``."""
    return choose(_VARIANTS, variant)
