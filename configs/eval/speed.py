"""Speed on one accelerator: memory op, mixer, train step, inference, against the device's own ceilings.

Command:  python -m eval.speed --config=configs/eval/speed.py --out=runs/speed
          one part: --config.parts="('train',)"; a few programs: --config.train="('holo@2048 remat=dots',)"
Hardware: one NVIDIA H100 or H200 (kernels of the extra ``kernels`` on Hopper); :quick runs on a CPU.
Expect:   docs/log.md holds the predictions and what came of them.
"""

from configs.eval import choose

_VARIANTS = {
    "full": dict(
        parts=("memory_op", "mixer", "train"),
        layers=12,
        width=1024,
        vocab=32000,
        tokens=32_768,  # a train step, where the length does not exceed it
        outer_shape=(8, 4096, 16, 32, 64),  # batch, length, heads, phasors, channels
        hadamard_shape=(8, 4096, 32, 64),  # batch, length, heads, channels
        portable_chunks=(64, 256),
        mixers=("holo_sum@2048", "holo@2048", "seed@2048", "attention@2048", "attention@16384", "ssm@2048"),
        train=(
            "holo_sum@2048 remat=dots unroll=1",
            "holo_sum@2048 remat=dots unroll=12",
            "holo_sum@2048 remat=none unroll=12",
            "holo@2048 remat=dots unroll=12",
            "attention@2048 remat=dots unroll=12",
            "seed@2048 remat=dots unroll=12",
            "holo_sum@16384 remat=dots unroll=12",
            "holo@16384 remat=dots unroll=12",
            "attention@16384 remat=dots unroll=12",
        ),
        profile=(
            "holo_sum@2048 remat=dots unroll=12",
            "holo@2048 remat=dots unroll=12",
        ),  # of train: list kernels
        copy_bytes=2**32,
        matrix=8192,
        samples=10,
        least_seconds=0.03,
        train_samples=6,
        workers=8,  # programs compiled at a time
        seed=0,
    ),
    "quick": dict(
        parts=("memory_op", "mixer", "train"),
        layers=2,
        width=64,
        vocab=256,
        tokens=128,
        outer_shape=(1, 128, 1, 32, 64),
        hadamard_shape=(1, 128, 1, 64),
        portable_chunks=(64,),
        mixers=("holo@64", "attention@64"),
        train=("holo@64 remat=dots", "holo_sum@128 remat=full chunk=64", "attention@64"),
        profile=(),
        copy_bytes=2**22,
        matrix=256,
        samples=2,
        least_seconds=0.001,
        train_samples=2,
        workers=2,
    ),
}


def get_config(variant: str = "full"):
    """Settings of ``eval.speed``."""
    return choose(_VARIANTS, variant)
