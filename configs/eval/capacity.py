"""What a raw phasor memory holds: no training but that of the last two sections' decoders and blocks.

Command:  python -m eval.capacity --config=configs/eval/capacity.py --out=runs/capacity
Hardware: 2 CPU cores. Duration: about 10 minutes (full), 1 to 2 minutes (quick).
Expect:   Monte Carlo on the theory curve SNR = sqrt(2D/N); 32 facts in 16,384 tokens at D = 2048: chance
          without a write gate, 100% with a soft one. Section "presets" (--config.sections="('presets',)",
          10 minutes more): attention 1.0 with its denoiser, or the harness is wrong (exit code 1).
"""

from configs.eval import choose, training_grid


def _presets() -> dict:
    # Equal states: 2,048 floats (attention: keys and values of all it reads).
    sizes = {
        "attention": dict(preset="attention", hd_dim=64, key_conv=4),
        "holo": dict(preset="holo", hd_dim=64, phasors=16),
        "holo_sum": dict(preset="holo", erase=False, hd_dim=64, phasors=16),
        "holo_nogate": dict(preset="holo", output_gate=False, hd_dim=64, phasors=16),
        "dual": dict(preset="dual", hd_dim=512),
        "seed": dict(preset="seed", hd_dim=1024),
        "ssm": dict(preset="ssm", hd_dim=64, phasors=16),
    }
    denoisers = {"": {}, "_linear": dict(mlp="linear"), "_nomlp": dict(mlp="none")}  # "": the preset's own
    return {name + suffix: size | mlp for name, size in sizes.items() for suffix, mlp in denoisers.items()}


_VARIANTS = {
    "full": dict(
        sections=("dimension", "vocabulary", "binding", "gating", "dtype", "rules", "decoder", "presets"),
        seed=0,
        queries=1024,  # reads behind each Monte Carlo number, at least
        pairs=(8, 16, 32, 64, 128, 256, 512, 1024),
        dimensions=(256, 512, 1024, 2048, 4096, 8192),  # hadamard D; state 2D numbers
        vocabulary=4096,
        vocabularies=(64, 1024, 4096, 32_000),  # at vocabulary_dimension
        vocabulary_dimension=2048,
        outer_shapes=((16, 64), (32, 64), (64, 64)),  # (m, d); each against the hadamard of equal size
        gating_dimension=2048,
        gating_facts=32,
        gating_lengths=(64, 256, 1024, 4096, 16_384, 65_536),  # tokens, facts included
        soft_gates=(0.95, 0.05),  # fact, anything else
        state_bytes=16_384,
        dtypes=("float32", "bfloat16", "int8", "int4"),
        rule_shape=(16, 64),  # (m, d) of the write rules
        rule_pairs=(8, 16, 32, 64, 128),
        rule_shares=(0.0, 0.12, 0.5, 1.0),  # erase gate: plain, as initialised, half, delta
        rule_vocabulary=1024,
        rule_memories=32,
        decoder_dimensions=(512, 2048, 8192),
        decoder_pairs=(1, 2, 4, 8, 16),
        decoder_channels=64,
        decoder_words=256,
        decoder_samples=32_768,
        decoder_steps=3000,
        decoder_batch=256,
        decoder_rates=(1e-3, 4e-3),
        target_mse=0.005,  # the published claim
        presets=dict(
            models=_presets(),
            select=tuple(_presets()),
            shared=dict(head_dim=32, memory_backend="portable"),
            channels=32,
            words=256,
            train_pairs=8,
            test_pairs=(2, 4, 8, 16, 32),
            batch=64,
            test_memories=256,
            grid=training_grid(steps=800, rates=(3e-3, 1e-2), log_every=200, seeds=(0, 1), weight_decay=0.0),
            control_from=0.99,
        ),
    ),
    "quick": dict(
        queries=128,
        pairs=(16, 64, 256),
        dimensions=(256, 1024),
        vocabulary=1024,
        vocabularies=(64,),
        vocabulary_dimension=1024,
        outer_shapes=((16, 64),),
        gating_dimension=1024,
        gating_lengths=(64, 1024),
        state_bytes=4096,
        dtypes=("float32", "int4"),
        rule_pairs=(16, 32),
        rule_shares=(0.0, 0.5, 1.0),
        rule_memories=8,
        decoder_dimensions=(512,),
        decoder_pairs=(1, 4),
        decoder_samples=4096,
        decoder_steps=300,
        decoder_batch=256,
        decoder_rates=(3e-3,),
        presets=dict(
            models=_presets(),
            select=("attention", "holo", "seed"),
            shared=dict(head_dim=32, memory_backend="portable"),
            channels=32,
            words=64,
            train_pairs=4,
            test_pairs=(4, 8),
            batch=32,
            test_memories=64,
            grid=training_grid(steps=200, rates=(1e-2,), log_every=100, seeds=(0,), weight_decay=0.0),
            control_from=0.95,
        ),
    ),
}


def get_config(variant: str = "full"):
    """Settings of ``eval.capacity``."""
    return choose(_VARIANTS, variant)
