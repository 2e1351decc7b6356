"""What decoding kernels are asked for: sizes, and where they can run."""

from typing import NamedTuple

import jax

from holo_jax.kernels.capability import compute_capability


class Shape(NamedTuple):
    """Everything static about a call.

    Attributes:
      rows, layers, width, heads, m, d, hidden, taps, size: batch, depth, residual width, heads, phasors and
        channels of a head, hidden width of the denoiser, taps of the phase convolutions, room for pending
        writes.
      write, erase, gate, head_norm: which of them the mixers have.
      scale: retrieval scale.
      phase_scale, eps: of the configuration.
      programs: how many work together.
      interpret: run in Pallas' interpreter, one program only.
    """

    rows: int
    layers: int
    width: int
    heads: int
    m: int
    d: int
    hidden: int
    taps: int
    size: int
    write: bool
    erase: bool
    gate: bool
    head_norm: bool
    scale: str
    phase_scale: float
    eps: float
    programs: int
    interpret: bool = False

    @property
    def values(self) -> int:
        """Value channels of all heads."""
        return self.heads * self.d

    @property
    def offsets(self) -> dict[str, int]:
        """First row of each map in the joined one, and their number as ``all``."""
        sizes = {
            "values": self.values,
            "phases": self.heads * self.m,
            "write": self.heads * self.write,
            "erase": self.heads * self.erase,
            "gate": self.values * self.gate,
        }
        found, total = {}, 0
        for name, size in sizes.items():
            found[name] = total
            total += size
        return {**found, "all": total}


def unsupported_heads(shape: Shape) -> str | None:
    """Why the memory kernel cannot run here, or None."""
    capability = compute_capability()
    if capability is None or capability < (8, 0):
        return "its kernels need an NVIDIA GPU of compute capability 8.0 or higher"
    for name in ("m", "d", "size"):
        value = getattr(shape, name)
        if value & (value - 1):
            return f"{name} is {value}; it must be a power of two"
    if not jax.sharding.get_abstract_mesh().empty:
        return "the computation is on a mesh; it must be on one device"
    return None
