"""Shares, weights and mail of the kernel over all layers, and which models it takes.

A program's rows of a weight lie side by side in the order in which tensor cores want them: eight rows at a
time, 32 columns of them at a time, eight columns a lane. So shared memory holds no padding, and a warp loads
512 bytes without a conflict.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from holo_jax.array_types import Array, Float, Int
from holo_jax.kernels.decode import plan as decode_plan
from holo_jax.kernels.decode.plan import CHUNK, PRODUCTS
from holo_jax.kernels.decode.shape import Shape

# Warps that multiply: each has an equal part of the columns that a product sums over.
WARPS = 8
# Rows of a weight, and columns of it, that a warp takes at a time.
TILE, STEP = 8, 32
# Layers whose vectors exist at a time.
SLOTS = 4
# Bytes that are copied at a time.
PIECE = 1 << 14
MOST_ROWS = 16
_THREADS = 32 * WARPS
# What barriers and the compiler take of shared memory.
_SCRATCH_BYTES = 3072


class Vector(NamedTuple):
    """A vector of all rows in the mail.

    Attributes:
      at: its first word in a slot.
      words: of 32 bits.
      lines: columns of a row that lie side by side; 0 for float32 head by head.
    """

    at: int
    words: int
    lines: int


def share(shape: Shape, name: str) -> int:
    """Results of a product that a program makes, an even number; of ``up`` as many of the gate."""
    return 2 * -(-decode_plan.outputs(shape, name) // (2 * shape.programs))


def weight_rows(shape: Shape, name: str) -> int:
    """Rows of a weight that a program has."""
    return share(shape, name) * (2 if name == "up" else 1)


def tiles(shape: Shape, name: str) -> list[int]:
    """Rows of each tile of a program's share."""
    rows = weight_rows(shape, name)
    return [min(TILE, rows - n) for n in range(0, rows, TILE)]


def padded(shape: Shape) -> int:
    """Rows that vectors in the mail have room for."""
    return 8 if shape.rows <= 8 else MOST_ROWS


def vectors(shape: Shape) -> dict[str, Vector]:
    """What a slot of the mail holds: two bfloat16 a word, or the maps in float32.

    ``y`` is ``[rows, heads, per_head]``, the others ``[columns / lines, padded rows, lines]``.
    """
    sizes = {"y": 0, "z": 32, "x1": 8, "u": 8, "x": 8}
    columns = {"z": shape.values, "x1": shape.width, "u": shape.hidden, "x": shape.width}
    found, at = {}, 0
    for name, lines in sizes.items():
        words = shape.rows * decode_plan.outputs(shape, "maps")
        if lines:
            words = columns[name] * padded(shape) // 2
        found[name] = Vector(at, words, lines)
        at += -(-words // 64) * 64
    return found


def slot_words(shape: Shape) -> int:
    """Words of a slot."""
    last = vectors(shape)["x"]
    return last.at + -(-last.words // 64) * 64


def mail(shape: Shape) -> Int[Array, "s w"]:
    """Before the first launch: nothing has come."""
    return jnp.full((SLOTS, slot_words(shape)), -1, jnp.int32)


def room(shape: Shape, name: str) -> tuple[int, int]:
    """A program's share of a weight, in lines of ``CHUNK`` numbers."""
    return weight_rows(shape, name) * decode_plan.depth(shape, name) // CHUNK, CHUNK


def copies(shape: Shape, name: str) -> list[tuple[int, int]]:
    """A program's share in pieces that are copied at a time: first line, lines."""
    lines, most = room(shape, name)[0], PIECE // (2 * CHUNK)
    return [(n, min(most, lines - n)) for n in range(0, lines, most)]


def dealt(shape: Shape, name: str, weight: Float[Array, "l o i"]) -> Float[Array, "l p n c"]:
    """Weights of all layers as programs want them, zeros past the last row."""
    layers, _, depth = weight.shape
    halves, own, outputs = 2 if name == "up" else 1, share(shape, name), decode_plan.outputs(shape, name)
    parts = weight.reshape(layers, halves, outputs, depth)
    parts = jnp.pad(parts, ((0, 0), (0, 0), (0, shape.programs * own - outputs), (0, 0)))
    parts = parts.reshape(layers, halves, shape.programs, own, depth // STEP, STEP)
    parts = parts.transpose(0, 2, 1, 3, 4, 5).reshape(layers, shape.programs, halves * own, -1, STEP)
    whole = halves * own // TILE * TILE
    first = parts[:, :, :whole].reshape(layers, shape.programs, -1, TILE, depth // STEP, STEP)
    found = [x.swapaxes(-2, -3).reshape(layers, shape.programs, -1) for x in (first, parts[:, :, whole:])]
    return jnp.concatenate(found, axis=-1).reshape(layers, shape.programs, *room(shape, name))


def gathered(shape: Shape, name: str, lines: Float[Array, "n c"]) -> Float[Array, "r i"]:
    """Rows of a program's share, from what ``dealt`` made of them."""
    depth, rows = decode_plan.depth(shape, name), weight_rows(shape, name)
    whole = rows // TILE * TILE
    flat = lines.reshape(-1)
    first = flat[: whole * depth].reshape(-1, depth // STEP, TILE, STEP).swapaxes(1, 2)
    last = flat[whole * depth :].reshape(depth // STEP, rows - whole, STEP).swapaxes(0, 1)
    return jnp.concatenate([first.reshape(whole, depth), last.reshape(rows - whole, depth)])


def sums(name: str) -> str:
    """Where parts of a product meet: not where those of the product before are, which may still be read."""
    return "sums" if name in ("maps", "up") else "added_sums"


def sums_bytes(shape: Shape, place: str) -> int:
    """Shared memory of a place for sums of the warps' parts, and of squares."""
    most = max(len(tiles(shape, name)) for name in PRODUCTS if sums(name) == place)
    return 4 * WARPS * padded(shape) * (most * TILE + 1)


def workers(shape: Shape) -> int:
    """Heads of rows that are worked out at a time."""
    return shape.programs * decode_plan.groups(shape)


def heads_of_program(shape: Shape) -> int:
    """Heads of rows that a program works out, at most; their states are in its shared memory."""
    return -(-shape.rows * shape.heads // shape.programs)


def states(shape: Shape) -> dict[str, tuple[int, int, int]]:
    """Shared memory for states of a program's heads, float32, which lie where weights of ``up`` begin."""
    count = heads_of_program(shape)
    sizes = {"memory": (2 * shape.m, shape.d), "keys": (shape.size, 2 * shape.m)}
    return {name: (count, *size) for name, size in {**sizes, "written": (shape.size, shape.d)}.items()}


def states_bytes(shape: Shape) -> int:
    """Of ``states``, in whole kilobytes each."""
    return sum(-(-4 * math.prod(size) // 1024) * 1024 for size in states(shape).values())


def late(shape: Shape) -> int:
    """Copies of ``up`` that states are in the place of until heads have read them."""
    return sum(2 * CHUNK * first < states_bytes(shape) for first, _ in copies(shape, "up"))


def finishing(shape: Shape, name: str) -> int:
    """Threads that finish a program's results, two columns each; eights of columns may be begun by others."""
    own = share(shape, name)
    eights = -(-own // 8) if name == "maps" or own % 8 == 0 else -(-(own + 6) // 8)
    return eights * padded(shape) * 4


def shared_bytes(shape: Shape) -> int:
    """What a program keeps in shared memory, in whole kilobytes each, and what the compiler adds."""
    sizes = [2 * math.prod(room(shape, name)) for name in PRODUCTS]
    up = PRODUCTS.index("up")
    sizes[up] = max(sizes[up], states_bytes(shape))
    sizes += [sums_bytes(shape, place) for place in ("sums", "added_sums")]
    sizes += [4 * decode_plan.stage(shape) * decode_plan.GROUPS, 1024]
    return sum(-(-size // 1024) * 1024 for size in sizes) + _SCRATCH_BYTES


def unsupported(shape: Shape, storage: Any) -> str | None:
    """Why the kernel over all layers cannot run here, or None."""
    reason = decode_plan.unsupported_layers(shape, storage)
    if reason is not None:
        return reason
    if shape.rows > MOST_ROWS:
        return f"the batch has {shape.rows} rows; it must have at most {MOST_ROWS}"
    if shape.rows * shape.heads > workers(shape):
        return (
            f"the batch has {shape.rows * shape.heads} heads; the kernel works out {workers(shape)} at a time"
        )
    for name in PRODUCTS:
        if finishing(shape, name) > _THREADS:
            most = 8 * (_THREADS // (4 * padded(shape)))
            return f"a program makes {share(shape, name)} results of {name}; it must be about {most} or fewer"
    return decode_plan.too_large(shared_bytes(shape))
