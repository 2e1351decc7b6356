"""Synthetic needle in a haystack: trained at up to 256 tokens, asked at up to 65,536.

Command:  python -m eval.needle --config=configs/eval/needle.py --out=runs/needle
          (some models only: --config.select="('attention','holo_4k')"; join runs: python -m eval.merge)
Hardware: one GPU (full); 2 CPU cores (quick, about 1 minute).
Expect:   attention 1.0 at the trained lengths, or the harness is wrong (exit code 1).

The needle of any checkpoint and tokenizer (RULER's tasks) is eval.ruler.
"""

from configs.eval import choose, training_grid

_OUTER = dict(hd_dim=128, phasors=16)

_VARIANTS = {
    "full": dict(
        models={
            "attention": dict(preset="attention", hd_dim=128),
            "holo_4k": dict(preset="holo", **_OUTER),
            "holo_sum_4k": dict(preset="holo", erase=False, **_OUTER),
            "ssm_4k": dict(preset="ssm", **_OUTER),
            "dual_4k": dict(preset="dual", hd_dim=1024),
            "seed_4k": dict(preset="seed", hd_dim=2048),
        },
        select=("attention", "holo_4k", "holo_sum_4k", "ssm_4k", "dual_4k", "seed_4k"),
        shared=dict(
            vocab_size=512,
            hidden_size=128,
            num_hidden_layers=2,
            head_dim=64,
            memory_backend="ensemble",
            tie_embeddings=True,
        ),
        storage="bfloat16",
        kinds=128,  # keys, and values
        filler_from=258,  # first id of the filler: 258 keeps keys and values out of it, 2 lets them in
        # (length, sequences a step), packed into rows of `width`; depths uniform
        train=((64, 64), (128, 8), (256, 8)),
        width=256,
        lengths=(256, 1024, 4096, 16_384, 65_536),
        depths=(0.0, 0.25, 0.5, 0.75, 1.0),
        rows=80,  # sequences a cell and seed; with three seeds n = 240
        piece=256,
        forward_rows=8,  # rows at a time of models read in one pass (attention)
        grid=training_grid(steps=2000, rates=(1e-3, 3e-3), log_every=500),
        control_from=0.99,
    ),
    "quick": dict(
        models={
            "attention": dict(preset="attention", hd_dim=64),
            "holo_2k": dict(preset="holo", hd_dim=64, phasors=16),
        },
        select=("attention", "holo_2k"),
        shared=dict(
            vocab_size=64, hidden_size=64, num_hidden_layers=2, head_dim=32, memory_backend="portable"
        ),
        storage="float32",
        kinds=8,
        filler_from=18,
        train=((16, 32), (32, 16)),
        width=32,
        lengths=(32, 512),
        depths=(0.0, 0.5, 1.0),
        rows=200,
        piece=32,
        forward_rows=20,
        grid=training_grid(steps=200, rates=(1e-2,), log_every=100, seeds=(0,)),
        control_from=0.97,
    ),
}


def get_config(variant: str = "full"):
    """Settings of ``eval.needle``."""
    return choose(_VARIANTS, variant)
