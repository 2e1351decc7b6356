"""How a token's products are dealt to the programs of one kernel, and which models it takes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from holo_jax.kernels.capability import compute_capability
from holo_jax.kernels.decode.shape import Shape, unsupported_heads

PRODUCTS = ("maps", "out", "up", "down")
# Columns of a weight that a warp multiplies at a time.
CHUNK = 256
# Warpgroups of a program that compute; three and four were slower.
GROUPS = 2
# Bytes that are copied at a time.
PIECE = 1 << 14
# What layouts of registers are made for: phasors and channels of a head; values of one head's maps at most.
PHASORS, CHANNELS, MAPS = 32, 64, 256
# Shared memory that a program of an H100 can have, and what sums over warps and barriers take of it.
_SHARED_BYTES = 232448
_SCRATCH_BYTES = 3072
# Rows that a warpgroup multiplies at a time.
_LEAST_ROWS = 4
_THREADS = 128
_LEAST_JAX = (0, 11)


class Plan(NamedTuple):
    """Shares of a program.

    Attributes:
      groups: warpgroups that compute; another one asks for weights.
      per_head: rows of the maps of one head.
      maps, out, up, down: rows of each product that a program takes; of ``up`` as many of the gate.
    """

    groups: int
    per_head: int
    maps: int
    out: int
    up: int
    down: int


def groups(shape: Shape) -> int:
    """Warpgroups of a program that compute; another one asks for weights."""
    return 1 if shape.interpret else GROUPS


def per_head(shape: Shape) -> int:
    """Rows of the maps of one head, an even number."""
    found = shape.d * (1 + shape.gate) + shape.m + shape.write + shape.erase
    return found + found % 2


def plan(shape: Shape) -> Plan:
    """Equal shares, in whole rows."""
    outputs = (shape.heads * per_head(shape), shape.width, shape.hidden, shape.width)
    return Plan(groups(shape), per_head(shape), *(-(-number // shape.programs) for number in outputs))


def first(shape: Shape, name: str, program: Any) -> Any:
    """First row of a program's share: the last ones may be shared, which does no harm."""
    own = getattr(plan(shape), name)
    return jnp.minimum(program * own, outputs(shape, name) - own)


def stored(shape: Shape, name: str, program: Any) -> tuple[Any, Any]:
    """The rows that a program stores: of its share those that no program before it has."""
    begin = program * getattr(plan(shape), name)
    return begin, first(shape, name, program) + getattr(plan(shape), name)


def copies(shape: Shape, name: str) -> list[tuple[int, int, int]]:
    """A program's share in pieces that are copied at a time: half, first row, rows."""
    own = getattr(plan(shape), name)
    most = max(PIECE // (2 * depth(shape, name)), 1)
    starts = range(0, own, most)
    return [(half, n, min(most, own - n)) for half in range(2 if name == "up" else 1) for n in starts]


def outputs(shape: Shape, name: str) -> int:
    """Rows of a product's result."""
    return {"maps": shape.heads * plan(shape).per_head, "up": shape.hidden}.get(name, shape.width)


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
        found += own + own[:1] * (plan(shape).per_head - len(own))
    return found


def room(shape: Shape, name: str) -> tuple[int, int, int, int]:
    """Shared memory for a program's rows of a product: halves, rows, chunks, columns."""
    rows = max(getattr(plan(shape), name), 4)
    return 2 if name == "up" else 1, rows, depth(shape, name) // CHUNK, CHUNK


def stage(shape: Shape) -> int:
    """Float32 numbers of shared memory in which a head is worked out."""
    return MAPS + 4 * shape.m + shape.d + 2 * shape.size


def share(shape: Shape) -> int:
    """Results of a product in one program, as many as a warpgroup has threads or a multiple of them."""
    return -(-max(getattr(plan(shape), name) for name in PRODUCTS) // _THREADS) * _THREADS


def shared_bytes(shape: Shape) -> int:
    """What a program keeps in shared memory, in whole kilobytes each, and what the compiler adds."""
    sizes = [2 * math.prod(room(shape, name)) for name in PRODUCTS]
    sizes += [2 * shape.width, 2 * max(shape.values, shape.hidden), 4 * stage(shape), 8 * share(shape)]
    sizes += [8 * shape.m * shape.d, 8 * shape.size * shape.m, 4 * shape.size * shape.d]
    return sum(-(-size // 1024) * 1024 for size in sizes) + _SCRATCH_BYTES


def unsupported_layers(shape: Shape, storage: Any) -> str | None:
    """Why no kernel over all layers can run here, whatever its rows, or None."""
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
    if plan(shape).per_head > MAPS:
        return f"the maps of a head have {plan(shape).per_head} values; it can have {MAPS}"
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


def unsupported(shape: Shape, storage: Any) -> str | None:
    """Why the kernel over all layers cannot take one row here, or None."""
    reason = unsupported_layers(shape, storage)
    if reason is not None:
        return reason
    if shape.rows != 1:
        return f"the batch has {shape.rows} rows; it must have one"
    for name in PRODUCTS:
        if getattr(plan(shape), name) < _LEAST_ROWS:
            least = (_LEAST_ROWS - 1) * shape.programs + 1
            return f"the product {name} has {outputs(shape, name)} rows; it must have at least {least}"
    return too_large(shared_bytes(shape))
