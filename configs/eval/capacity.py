"""What a raw phasor memory holds: no training but that of the last section's decoder.

Command:  python -m eval.capacity --config=configs/eval/capacity.py --out=runs/capacity
Hardware: 2 CPU cores. Duration: about 10 minutes (full), 1 to 2 minutes (quick).
Expect:   Monte Carlo on the theory curve SNR = sqrt(2D/N); 32 facts in 16,384 tokens at D = 2048: chance
          without a write gate, 100% with a soft one.
"""

from configs.eval import choose

_VARIANTS = {
    "full": dict(
        sections=("dimension", "vocabulary", "binding", "gating", "dtype", "rules", "decoder"),
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
    ),
}


def get_config(variant: str = "full"):
    """Settings of ``eval.capacity``."""
    return choose(_VARIANTS, variant)
