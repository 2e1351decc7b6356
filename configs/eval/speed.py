"""Speed on one accelerator: memory op, mixer, train step, peers, inference, against the device's ceilings.

Command:  python -m eval.speed --config=configs/eval/speed.py --out=runs/speed
          the comparison of steps with PyTorch: --config=configs/eval/speed.py:step (4 minutes on 16 cores);
          with the linear models of fla: --config=configs/eval/speed.py:linear
          one size in products, other shapes of the memory: --config=configs/eval/speed.py:shapes
          every model against length, 2k to 256k tokens a row: --config=configs/eval/speed.py:lengths
          memory op, mixer and inference, without steps: --config=configs/eval/speed.py:alone
          one part: --config.parts="('train',)"; a few programs: --config.train="('holo@2048 remat=dots',)"
Hardware: one NVIDIA H100 or H200 (kernels of the extra ``kernels`` on Hopper); :quick runs on a CPU.
Peers:    PyTorch (and fla) where they are installed in the same environment; else recorded as unavailable.
Expect:   docs/log.md holds the predictions and what came of them.
"""

from configs.eval import choose

# Without recomputation where that needs at most .9 of the memory of PyTorch's Llama; parameters in products
# within 5% of 184M.
_MAIN = (
    "holo_sum@2048 remat=none unroll=12 loss=8192 hd=896 gemm=cublas",
    "holo@2048 remat=dots unroll=12 loss=8192 hd=896",
    "attention@2048 remat=dots unroll=12",
    "seed@2048 remat=none unroll=12",
    "holo_sum@16384 remat=none unroll=12 loss=8192 hd=896 gemm=cublas",
    "holo@16384 remat=dots unroll=12 loss=8192 hd=896",
    "attention@16384 remat=dots unroll=12",
    "seed@16384 remat=none unroll=12",
)
_SHAPES = (
    "holo_sum@2048 remat=none unroll=12 loss=6656",
    "holo_sum@2048 remat=none unroll=12 loss=8192 hd=896",
    "holo_sum@2048 remat=none unroll=12 loss=8192 head=128",
    "holo@2048 remat=dots unroll=12 loss=4096 hd=896",
    "seed@2048 remat=none unroll=12",
)
# One form at all lengths; rows longer than a step's tokens are one row.
_LONG = (
    "holo@16384 remat=full",
    "holo@65536 remat=full",
    "holo@262144 remat=full",
    "holo_sum@16384 remat=full",
    "holo_sum@65536 remat=full",
    "holo_sum@262144 remat=full",
)
# The same with as many tokens a step at every length: what a step costs whatever its tokens is 9% of 32,768.
_EQUAL = (
    "holo@16384 tokens=262144 remat=full",
    "holo@65536 tokens=262144 remat=full",
    "holo@262144 remat=full",
    "holo_sum@16384 tokens=262144 remat=full",
    "holo_sum@65536 tokens=262144 remat=full",
    "holo_sum@262144 remat=full",
)
# The least memory at every length: full recomputation; rows longer than that, in pieces of 8,192 tokens.
_LEAST = (
    "holo@2048 remat=full loss=4096",
    "holo@16384 remat=full chunk=8192 loss=4096",
    "holo@65536 remat=full chunk=8192 loss=4096",
    "holo@262144 remat=full chunk=8192 loss=4096",
)
# Every other model at the same lengths; those with a state in pieces where a row is longest.
_OTHERS = (
    "seed@65536 remat=full",
    "dual@65536 remat=full",
    "ssm@65536 remat=full",
    "attention@65536 remat=full",
    "seed@262144 remat=full chunk=8192 loss=4096",
    "dual@262144 remat=full chunk=8192 loss=4096",
    "ssm@262144 remat=full chunk=8192 loss=4096",
    "attention@262144 remat=full",
)
_FULL = dict(
    parts=("peers", "memory_op", "mixer", "train", "inference"),
    layers=12,
    width=1024,
    vocab=32000,
    tokens=32_768,  # a train step, where the length does not exceed it
    outer_shape=(8, 4096, 16, 32, 64),  # batch, length, heads, phasors, channels
    hadamard_shape=(8, 4096, 32, 64),  # batch, length, heads, channels
    portable_chunks=(64, 256),
    bindings=("outer", "hadamard"),  # of the memory op and its gate
    tilings=(),  # more shapes of the triton kernels, as "8x8x64x4": the fields of its Tiling
    mixers=("holo_sum@2048", "holo@2048", "seed@2048", "attention@2048", "attention@16384", "ssm@2048"),
    train=(
        *_MAIN,
        "holo_sum@2048 remat=dots unroll=1",
        "holo_sum@2048 remat=dots unroll=12 loss=4096",
        "ssm@2048 remat=dots unroll=12",
        "ssm@16384 remat=dots unroll=12",
        "dual@2048 remat=dots unroll=12",
    ),
    # Compiled and timed after those that peers are compared with, on half as many samples.
    train_long=(
        *_LONG,
        *_LEAST,
        "attention@65536 remat=full",
    ),
    profile=_MAIN[:2],  # of train: list kernels
    peers=(
        "llama@2048",
        "llama@16384",
        "llama@32768",
        "llama_cudnn@16384",
        "seed@2048",
        "seed@16384",
        "seed_eager@2048",
        "gla@2048",
        "gla@16384",
        "gated_deltanet@2048",
        "gated_deltanet@16384",
    ),
    decoders=("holo", "attention"),
    batches=(1, 16),
    contexts=(2048, 16_384, 65_536, 131_072),  # of attention; the others do not depend on it
    lengths=(2048, 65_536, 262_144),  # read from the host, each in a process of its own
    piece=4096,  # tokens read at one time
    steps=64,  # tokens decoded in one call to the device
    copy_bytes=2**32,
    matrix=8192,
    samples=10,
    least_seconds=0.03,
    train_samples=6,
    train_seconds=0.5,  # of a sample: several steps are queued, as in training
    workers=8,  # programs compiled at a time
    seed=0,
)
_VARIANTS = {
    "full": _FULL,
    # What the targets compare; peers and steps of one length are timed in turns.
    "step": dict(
        parts=("peers", "train", "memory_op"),
        train=(
            *_MAIN,
            "holo@2048 remat=dots unroll=12 loss=8192 hd=896 gemm=cublas",
            "holo_sum@2048 remat=none unroll=12 loss=8192 head=128",
        ),
        train_long=(*_EQUAL, _LEAST[0], _LEAST[-1]),
        portable_chunks=(),
        profile=(),
        peers=("llama@2048", "seed@2048", "llama@16384", "seed@16384"),
        copy_bytes=2**30,
        workers=12,
    ),
    # Shapes of the memory within 5% of one size in products, and chunks of the loss.
    "shapes": dict(
        parts=("peers", "train"),
        train=_SHAPES,
        train_long=(),
        profile=_SHAPES,
        peers=("llama@2048", "seed@2048"),
        train_samples=4,
        copy_bytes=2**30,
        workers=12,
    ),
    # The linear peers of fla, with ours beside them.
    "linear": dict(
        parts=("peers", "train"),
        train=(*_MAIN[:2], *_MAIN[4:6], "ssm@2048 remat=dots", "ssm@16384 remat=dots"),
        train_long=(),
        profile=(),
        peers=("gla@2048", "gated_deltanet@2048", "gla@16384", "gated_deltanet@16384"),
        copy_bytes=2**30,
        workers=12,
    ),
    # Every model and the PyTorch peers by length.
    "lengths": dict(
        parts=("peers", "train"),
        train=(
            *_MAIN,
            "dual@2048 remat=dots loss=4096",
            "ssm@2048 remat=dots loss=4096",
            "dual@16384 remat=dots loss=4096",
            "ssm@16384 remat=dots loss=4096",
        ),
        train_long=(*_LONG[1:3], *_LONG[4:], *_LEAST, *_OTHERS),
        profile=(),
        # The longest first: they need the device before our programs have taken of it.
        peers=tuple(
            f"{name}@{length}" for length in (262_144, 65_536, 2048, 16_384) for name in ("llama", "seed")
        ),
        train_samples=4,  # attention takes many seconds a step at the longest
        copy_bytes=2**30,
        workers=12,
    ),
    "alone": dict(parts=("memory_op", "mixer", "inference"), peers=(), copy_bytes=2**30, workers=12),
    "quick": dict(
        parts=("memory_op", "mixer", "train"),
        layers=2,
        width=64,
        vocab=256,
        tokens=128,
        outer_shape=(1, 128, 2, 32, 64),  # two heads: "gdn2" takes phasor features by 128
        hadamard_shape=(1, 128, 1, 64),
        portable_chunks=(64,),
        mixers=("holo@64", "attention@64"),
        train=("holo@64 remat=dots", "attention@64"),
        train_long=("holo_sum@128 remat=full chunk=64",),
        profile=(),
        peers=(),
        decoders=("holo",),
        batches=(1,),
        contexts=(64,),
        lengths=(128,),
        piece=64,
        steps=4,
        copy_bytes=2**22,
        matrix=256,
        samples=2,
        least_seconds=0.001,
        train_samples=2,
        train_seconds=0.001,
        workers=2,
    ),
}


def get_config(variant: str = "full"):
    """Settings of ``eval.speed``."""
    return choose(_VARIANTS, variant)
