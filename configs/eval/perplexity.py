"""Loss by position over whole documents: streamed, in separate windows, in sliding windows.

Command:  python -m eval.perplexity --config=configs/eval/perplexity.py --out=runs/NAME/perplexity \\
              --config.checkpoint=runs/NAME --config.data=DATA_DIRECTORY
Hardware: one GPU (full); 2 CPU cores (quick, under a minute: an untrained model on the standard library's
          sources, whose perplexity must come out near its vocabulary, 258).
"""

from configs.eval import RANDOM_MODEL, choose

_VARIANTS = {
    "full": dict(
        checkpoint="",  # run directory or a checkpoint in it; "random" for random_model
        random_model=RANDOM_MODEL,
        data="python",  # "python", or a directory made by train.prepare
        split="heldout",
        subsets=(),  # empty: all
        documents=32,  # of each subset
        scan=200_000,  # documents looked at, at most
        min_tokens=16_384,
        max_tokens=131_072,  # of a document; the rest is left out
        windows=(4096, 16_384, 65_536),
        stride=1024,  # of sliding windows; 0 leaves them out
        sliding_windows=(4096, 16_384),
        buckets=(0, 1024, 4096, 16_384, 65_536, 131_072),  # borders of positions
        rows=4,
        piece=1024,
        seed=0,  # of the bootstrap
    ),
    "quick": dict(
        checkpoint="random",
        documents=2,
        min_tokens=600,
        max_tokens=1024,
        windows=(256,),
        sliding_windows=(256,),
        stride=128,
        buckets=(0, 256, 512, 1024),
        rows=4,
        piece=256,
    ),
}  # fmt: skip


def get_config(variant: str = "full"):
    """Settings of ``eval.perplexity``."""
    return choose(_VARIANTS, variant)
