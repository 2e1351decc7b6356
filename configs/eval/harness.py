"""lm-evaluation-harness tasks on a checkpoint (needs the [eval] extra).

Command:  python -m eval.harness --config=configs/eval/harness.py --out=runs/NAME/harness \\
              --config.checkpoint=runs/NAME --config.tasks="('lambada_openai','piqa')"
Hardware: one GPU (full); 2 CPU cores (quick, under a minute: offline, on configs/eval/lm_tasks, untrained).
"""

from configs.eval import RANDOM_MODEL, choose

_VARIANTS = {
    "full": dict(
        checkpoint="",  # run directory or a checkpoint in it; "random" for random_model
        random_model=RANDOM_MODEL,
        tasks=("lambada_openai", "wikitext", "piqa", "hellaswag", "arc_easy"),
        include_path="",  # a directory of task files: only those, offline
        num_fewshot=-1,  # examples before a question; -1 for the task's own number
        limit=0,  # documents a task; 0 for all
        max_length=0,  # tokens of a request; 0 for no limit (give models with attention one)
        rows=8,
        piece=256,
        seed=0,
    ),
    "quick": dict(
        checkpoint="random",
        tasks=("capitals_choice", "capitals_rolling", "capitals_generate"),
        include_path="configs/eval/lm_tasks",
        piece=64,
    ),
}  # fmt: skip


def get_config(variant: str = "full"):
    """Settings of ``eval.harness``."""
    return choose(_VARIANTS, variant)
