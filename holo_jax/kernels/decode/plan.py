"""Products of a token in the kernel over all layers, and what that kernel is made for."""

from typing import Any

import jax
import jax.numpy as jnp

from holo_jax.kernels.capability import compute_capability
from holo_jax.kernels.decode.shape import Shape, unsupported_heads

PRODUCTS = ("maps", "out", "up", "down")
# Columns of a weight that a warp multiplies at a time.
CHUNK = 256
# Warpgroups of a program that compute; three and four were slower.
GROUPS = 2
# What layouts of registers are made for: phasors and channels of a head; values of one head's maps at most.
PHASORS, CHANNELS, MAPS = 32, 64, 256
# Shared memory that a program of an H100 can have.
_SHARED_BYTES = 232448
_LEAST_JAX = (0, 11)


def groups(shape: Shape) -> int:
    """Warpgroups of a program that compute; another one asks for weights."""
    return 1 if shape.interpret else GROUPS


def per_head(shape: Shape) -> int:
    """Rows of the maps of one head, an even number."""
    found = shape.d * (1 + shape.gate) + shape.m + shape.write + shape.erase
    return found + found % 2


def outputs(shape: Shape, name: str) -> int:
    """Rows of a product's result."""
    return {"maps": shape.heads * per_head(shape), "up": shape.hidden}.get(name, shape.width)


def depth(shape: Shape, name: str) -> int:
    """Columns that a product sums over."""
    return {"out": shape.values, "down": shape.hidden}.get(name, shape.width)


def rows_by_head(shape: Shape) -> list[int]:
    """Rows of the joined maps, head by head: values, phases, gate, write and erase, and what pads them."""
    first, found = shape.offsets, []
    for head in range(shape.heads):
        sizes = {"values": shape.d, "phases": shape.m, "gate": shape.d * shape.gate}
        sizes |= {"write": int(shape.write), "erase": int(shape.erase)}
        own = [first[name] + head * size + n for name, size in sizes.items() for n in range(size)]
        found += own + own[:1] * (per_head(shape) - len(own))
    return found


def stage(shape: Shape) -> int:
    """Float32 numbers of shared memory in which a head is worked out."""
    return MAPS + 4 * shape.m + shape.d + 2 * shape.size


def unsupported_layers(shape: Shape, storage: Any) -> str | None:
    """Why the kernel over all layers cannot run here, whatever its shares, or None."""
    reason = unsupported_heads(shape)
    if reason is not None:
        return reason
    if compute_capability() != (9, 0):
        return "it needs an NVIDIA Hopper GPU (compute capability 9.0)"
    if jax.__version_info__[:2] < _LEAST_JAX:
        return f"jax is {jax.__version__}; it must be {'.'.join(map(str, _LEAST_JAX))} or newer"
    if jnp.dtype(storage) != jnp.bfloat16:
        return f"storage is {jnp.dtype(storage)}; it must be bfloat16"
    if (shape.m, shape.d) != (PHASORS, CHANNELS):
        return f"a head has {shape.m} phasors and {shape.d} channels; it must have {PHASORS} and {CHANNELS}"
    if per_head(shape) > MAPS:
        return f"the maps of a head have {per_head(shape)} values; it can have {MAPS}"
    for name in PRODUCTS:
        if depth(shape, name) % CHUNK:
            return (
                f"the product {name} sums over {depth(shape, name)} columns; it must be a multiple of {CHUNK}"
            )
    return None


def too_large(needed: int) -> str | None:
    """Why a program cannot hold ``needed`` bytes of shared memory, or None."""
    if needed > _SHARED_BYTES:
        return f"a program's weights of a layer take {needed} bytes; it can hold {_SHARED_BYTES}"
    return None
