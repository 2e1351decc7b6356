"""How different are the codes of neighbouring positions: RoPE against random phasors; phase error.

Command:  python -m eval.orthogonality --config=configs/eval/orthogonality.py --out=runs/orthogonality
Hardware: 2 CPU cores. Duration: 25 s (full), 8 s (quick).
Expect:   RoPE 1.03 / 1.20 / 1.72 at windows 1 / 5 / 64 with 64 components; random phasors about 14 there.
"""

from configs.eval import choose

_VARIANTS = {
    "full": dict(
        components=(16, 32, 64, 128, 256, 512, 1024),  # phasors of a code
        windows=(1, 2, 5, 16, 64, 256, 1024),  # nearest positions compared
        draws=200,  # random codes per size
        rope_base=10000.0,
        std=10.0,  # radians per position of the normal distribution
        shown=64,  # size whose table and curves are shown
        positions=(1, 10, 100, 1000, 10_000, 100_000, 1_000_000),
        frequencies=65_536,  # for the phase error
        seed=0,
    ),
    "quick": dict(components=(16, 64, 256), windows=(1, 5, 64), draws=50, frequencies=1024),
}


def get_config(variant: str = "full"):
    """Settings of ``eval.orthogonality``."""
    return choose(_VARIANTS, variant)
