"""Inference on one device: memory of reading, latency and rate of decoding, states in fewer bits.

Command:  python -m eval.inference --config=configs/eval/inference.py --out=runs/inference
          one part: --config.parts="('decoding',)"; a trained model: --config.run=runs/quickstart
Hardware: one NVIDIA H100 or H200; :cpu and :quick run anywhere.
Duration: under 8 minutes (full), about 5 minutes on 2 CPU cores (:cpu), 2 minutes (:quick).
Expect:   the same peak memory at 4k, 64k and 1M tokens; the same latency after 1k and 1M; attention slower
          and larger with every token. Trained models and text are not needed for any of that.
"""

from configs.eval import choose

_SMALL = dict(
    layers=2,
    width=64,
    vocab=512,
    activations="float32",  # CPUs have no fast bfloat16 product
    large=(),
    piece=1024,
    batches=(1, 4),
    contexts=(256, 1024, 4096),
    steps=32,
    samples=5,
    copy_bytes=2**26,
    matrix=512,
    workers=2,
)
_VARIANTS = {
    "full": dict(
        parts=("reading", "latency", "decoding", "storage", "logits", "drift"),
        layers=12,
        width=1024,
        vocab=32000,
        activations="bfloat16",  # dtype of activations and products
        piece=4096,  # tokens read at one time
        lengths=(4096, 65_536, 1_048_576),  # reading: peak memory of each, in a process of its own
        latency_contexts=(1024, 1_048_576),  # tokens read before decoding
        decoders=("holo", "holo:int8", "ssm", "attention"),  # model[:state_dtype]
        batches=(1, 16, 256),
        contexts=(4096, 32_768, 131_072),  # of attention; the others do not depend on it
        steps=64,  # tokens in one call to the device
        single_steps=True,  # also one token a call, at batch 1: what the host costs
        # layers and width of a model whose weights fill the device's time, batch 1; () for none
        large=(24, 4096),
        samples=5,
        copy_bytes=2**32,
        matrix=8192,
        workers=16,
        storage_bytes=16_384,  # bytes of one stored superposition
        storage_pairs=(64, 128, 256, 512, 1024),
        storage_alternatives=4096,
        storage_trials=2,
        logit_tokens=512,
        run="",  # logits: a run directory; empty for a small model as it is before training
        drift_steps=(1000, 10_000, 131_072, 1_000_000),
        seed=0,
    ),
    "cpu": dict(_SMALL, batches=(1, 16), contexts=(1024, 4096, 16_384)),
    "quick": dict(
        _SMALL,
        lengths=(2048, 262_144),  # a cache of the longer would be half as much as all the rest
        latency_contexts=(1024, 8192),
        decoders=("holo", "holo:int4", "attention"),
        contexts=(64, 256),
        steps=8,
        samples=3,
        piece=256,
        storage_bytes=1024,
        storage_pairs=(16, 64),
        storage_alternatives=256,
        logit_tokens=96,
        drift_steps=(1000, 10_000),
    ),
}


def get_config(variant: str = "full"):
    """Settings of ``eval.inference``."""
    return choose(_VARIANTS, variant)
