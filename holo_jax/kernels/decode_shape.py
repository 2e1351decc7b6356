"""What decoding kernels are asked for: sizes, how weights are dealt to programs, where they can run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.kernels.capability import compute_capability, target_device

# Rows of a weight that a program takes at a time, and columns.
ROWS, DEPTH = 8, 256
MAX_ROWS = 4
# Tiles of one part that fit a program's registers, four registers a thread each, beside what else it holds.
MAX_TILES = 28


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
      early: ask for the weights of the next part before this one is worked out, not right after.
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
    early: bool = True
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


class _Part(NamedTuple):
    """A product: which weights, rows of a result and of a weight, how many programs' tiles."""

    name: str
    outputs: int
    depth: int
    halves: int = 1

    def tiles(self, programs: int) -> int:
        return pl.cdiv(pl.cdiv(self.outputs, ROWS), programs)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.depth, DEPTH)


def parts(shape: Shape) -> dict[str, _Part]:
    """The four products of a layer."""
    return {
        "maps": _Part("maps", shape.offsets["all"], shape.width),
        "out": _Part("out", shape.width, shape.values),
        "up": _Part("up", shape.hidden, shape.width, 2),
        "down": _Part("down", shape.width, shape.hidden),
    }


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


def unsupported(shape: Shape, storage: Any) -> str | None:
    """Why the kernel over all layers cannot run here, or None."""
    reason = unsupported_heads(shape)
    if reason is not None:
        return reason
    if jnp.dtype(storage) != jnp.bfloat16:
        return f"storage is {jnp.dtype(storage)}; it must be bfloat16"
    if shape.rows > MAX_ROWS:
        return f"the batch has {shape.rows} rows; it must have at most {MAX_ROWS}"
    held = {
        name: part.tiles(shape.programs) * part.halves * part.chunks for name, part in parts(shape).items()
    }
    most = max(held, key=lambda name: held[name])
    if held[most] > MAX_TILES:
        return f"a program takes {held[most]} tiles of the weights {most}; it can hold {MAX_TILES}"
    return None


def multiprocessors() -> int:
    """Of the device that a computation traced now will run on; 0 where it does not say."""
    return int(getattr(target_device(), "core_count", 0) or 0)
