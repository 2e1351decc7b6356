"""Scaling of the train step over the devices that are there, by mesh axis, weak and strong.

Command:  python -m eval.scaling --config=configs/eval/scaling.py --out=runs/scaling
          one case: --config.cases="('seq@1048576 remat=full block=norms',)"
Hardware: two or more GPUs of one machine (kernels of the extra ``kernels`` on Hopper); :quick runs on fake
          CPU devices (XLA_FLAGS=--xla_force_host_platform_device_count=4), where its times mean nothing
Expect:   four H200: data at .94, fsdp at .944 of four single cards, a million tokens along seq at .862
          (docs/scaling.md)
"""

from configs.eval import choose

_VARIANTS = {
    "full": dict(
        layers=12,
        width=1024,
        vocab=32000,
        # AXIS@LENGTH: rows a device (total with strong=1); along seq, tokens of the whole sequence. The most
        # important come first: results are written as they come.
        cases=(
            "data@4096 rows=8 unroll=12",
            "fsdp@4096 rows=8 unroll=12 reshard_after_forward=0",
            "seq@1048576 remat=full block=norms",
            "data@4096 rows=8 overlap=0 between=0",
            "fsdp@4096 rows=8 overlap=0 between=0",
            "seq@65536 strong=1 block=norms between=0",
            "data@4096 rows=16 strong=1 between=0",
            "data@65536 between=0",
            "seq@65536 block=norms between=0",
            "seq@4096 rows=32 block=norms between=0",
            "data@4096 rows=8 model=seed between=0",
        ),
        options=(),  # XLA compiler options of every program, NAME=VALUE
        samples=3,
        least_seconds=0.5,
        together=4,  # cases compiled before they are timed
        workers=20,  # programs compiled at a time
        profile=True,  # the collectives of a step, by the profiler
        links=True,  # an all-reduce of all devices at seven sizes
        at_once=False,  # also one device's share on every device at one time, nothing sent (weak cases)
        seed=0,
    ),
    "quick": dict(
        layers=1,
        width=64,
        vocab=256,
        cases=("fsdp@64 rows=2 between=0", "seq@256 strong=1"),
        samples=2,
        least_seconds=0.001,
        together=1,
        workers=2,
        profile=False,
        links=False,
        at_once=True,
    ),
}


def get_config(variant: str = "full"):
    """Settings of ``eval.scaling``."""
    return choose(_VARIANTS, variant)
