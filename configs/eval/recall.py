"""Multi-query associative recall: every preset and baseline, trained alike.

Command:  python -m eval.recall --config=configs/eval/recall.py --out=runs/recall
          (some models only: --config.select="('attention','holo_4k')"; join runs: python -m eval.merge)
          python -m eval.recall --config=configs/eval/recall.py:zoology --out=runs/recall_zoology
          python -m eval.recall --config=configs/eval/recall.py:denoiser --out=runs/recall_denoiser
Hardware: one GPU (full, zoology, denoiser: with and without the MLP); 2 CPU cores (quick, about 1 minute).
Expect:   attention 1.0 at the trained lengths, or the harness is wrong (exit code 1); beyond them it falls.

The full variant is the later published setting (trained on 64 to 256 tokens with 4 to 64 pairs, tested to
1,024 tokens with 256 pairs, state size against accuracy), "zoology" the earlier one (512 tokens, 64 pairs).
Published trainings see 180,000 sequences 32 times; here every step draws new ones.
"""

from configs.eval import choose, training_grid

_SIZES = {"4k": (128, 16), "16k": (256, 32), "64k": (512, 64)}  # state floats a layer: (hd_dim, phasors)


def _models() -> dict:
    models = {"attention": dict(preset="attention", hd_dim=128, key_conv=4)}
    for size, (hd_dim, phasors) in _SIZES.items():
        outer = dict(hd_dim=hd_dim, phasors=phasors)
        models[f"holo_{size}"] = dict(preset="holo", **outer)
        models[f"holo_sum_{size}"] = dict(preset="holo", erase=False, **outer)
        models[f"holo_nogate_{size}"] = dict(preset="holo", output_gate=False, **outer)
        models[f"holo_nomlp_{size}"] = dict(preset="holo", mlp="none", **outer)
        models[f"ssm_{size}"] = dict(preset="ssm", **outer)
    models["ssm_nomlp_4k"] = dict(preset="ssm", mlp="none", hd_dim=128, phasors=16)
    models["attention_nomlp"] = dict(preset="attention", mlp="none", hd_dim=128, key_conv=4)
    for size, hd_dim in {"4k": 1024, "16k": 4096}.items():
        # Wide activations: their blocks are computed again in the backward pass.
        models[f"dual_{size}"] = dict(preset="dual", hd_dim=hd_dim, remat="full")
        models[f"seed_{size}"] = dict(preset="seed", hd_dim=2 * hd_dim, remat="full")
    return models


_VARIANTS = {
    "full": dict(
        setting="trained at 64 to 256, tested to 1,024",
        models=_models(),
        select=tuple(name for name in _models() if name != "seed_16k"),
        shared=dict(
            vocab_size=8192,
            hidden_size=128,
            num_hidden_layers=2,
            head_dim=64,
            memory_backend="ensemble",
            tie_embeddings=True,  # as in the published models; attention does not learn in time without
        ),
        storage="bfloat16",
        # (length, pairs, sequences a step), packed into rows of `width`: 32 rows, 8,192 tokens
        train=((64, 4, 32), (128, 8, 8), (256, 16, 7), (256, 32, 7), (256, 64, 6)),
        width=256,
        # the first seven are the published average
        test=(
            (64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256),
            (256, 16), (512, 64), (1024, 64), (1024, 128),
        ),
        averaged=7,
        test_width=1024,
        test_rows=64,  # of each test; 1,024 sequences of 64 tokens, 64 of 1,024
        test_batch=16,
        power=0.01,
        random_non_queries=True,
        mean_over="sequences",  # of the loss, or "queries"
        grid=training_grid(steps=2000, rates=(1e-3, 3e-3, 1e-2), log_every=500),
        control_from=0.99,
        published=True,
    ),
    "zoology": dict(
        setting="trained and tested at 512 tokens with 64 pairs",
        train=((512, 64, 32),),
        width=512,
        test=((64, 4), (128, 8), (256, 16), (512, 64)),
        averaged=4,
        test_width=512,
        published=False,
        select=(
            "attention", "holo_4k", "holo_sum_4k", "ssm_4k", "holo_16k", "ssm_16k", "holo_64k", "ssm_64k",
            "dual_4k", "seed_4k",
        ),
    ),
    "quick": dict(
        setting="quick",
        models={
            "attention": dict(preset="attention", hd_dim=64, key_conv=4),
            "holo_2k": dict(preset="holo", hd_dim=64, phasors=16),
        },
        select=("attention", "holo_2k"),
        shared=dict(
            vocab_size=64, hidden_size=64, num_hidden_layers=2, head_dim=32, memory_backend="portable"
        ),
        storage="float32",
        train=((16, 2, 16), (32, 4, 16)),
        width=32,
        test=((16, 2), (32, 4), (64, 8)),
        averaged=2,
        test_width=64,
        test_rows=64,
        test_batch=32,
        grid=training_grid(steps=200, rates=(1e-2,), log_every=100, seeds=(0,)),
        published=False,
    ),
    "denoiser": dict(
        setting="is the MLP needed? 64 tokens, 8 pairs",
        models={
            f"{preset}{suffix}": dict(preset=preset, mlp=mlp, **sizes)
            for preset, sizes in {
                "holo": dict(hd_dim=64, phasors=16),
                "dual": dict(hd_dim=256),
                "seed": dict(hd_dim=512),
                "attention": dict(hd_dim=64, key_conv=4),
                "ssm": dict(hd_dim=64, phasors=16),
            }.items()
            for suffix, mlp in {"": "swiglu", "_linear": "linear", "_nomlp": "none"}.items()
        },
        select=tuple(
            preset + suffix
            for preset in ("holo", "dual", "seed", "attention", "ssm")
            for suffix in ("", "_linear", "_nomlp")
        ),
        shared=dict(
            vocab_size=512,
            hidden_size=64,
            num_hidden_layers=2,
            head_dim=32,
            memory_backend="portable",
            phase_scale=2.0,
            tie_embeddings=True,
        ),
        storage="float32",
        train=((64, 8, 64),),
        width=64,
        test=((64, 8),),
        averaged=1,
        test_width=64,
        test_rows=64,
        test_batch=64,
        grid=training_grid(steps=600, rates=(3e-3, 1e-2), log_every=100),
        control_from=0.95,
        published=False,
    ),
}  # fmt: skip


def get_config(variant: str = "full"):
    """Settings of ``eval.recall``."""
    return choose(_VARIANTS, variant)
