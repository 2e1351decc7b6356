"""Decoding with writes held back: a memory that is only read for a group of tokens, and written after it.

A step of the recurrence reads a memory and writes it back, residue of the compensated sum included: four
times the memory's own bytes a token. Here the writes of a group of ``C`` tokens stay apart, as keys and what
they bind, and a read adds what they hold,

    k^T M_t = k^T M_0 + sum_{i <= t} <k, k_i> w_i,

so a token reads the memory once and nothing of it is written. After the group its ``C`` outer products join
the memory in one compensated addition, which reads and writes memory and residue: ``4 / C`` memories a token.
The sum is a tree of two levels, so its rounding error is that of a sum with ``C`` times fewer terms,
compensated.

Complex numbers are planes here: with ``phi(a) = [cos a, sin a] / sqrt(m)`` a memory is the real matrix
``[Re M; Im M]`` of ``2 m`` rows, and reading it is a product with ``phi``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Float, Int, UInt32
from holo_jax.config import HoloConfig
from holo_jax.functional import MemoryState
from holo_jax.functional.memory.products import features, from_planes, planes
from holo_jax.functional.memory.state import compensated_add
from holo_jax.generate.forms import is_mixer_state
from holo_jax.mixers import MemoryMixerState

GROUP = 16
_EPS = 1e-6


class Held(NamedTuple):
    """A memory as planes, between groups.

    Attributes:
      memory: float32 ``[b, h, 2 m, d]``.
      residue: same shape; what the compensated sum has left behind, at most half a unit of ``memory``.
      writes: ``[b, h]``, sum of g^2.
      tail: the last raw phases ``[b, k, h * m]``.
    """

    memory: Float[Array, "b h k d"]
    residue: Float[Array, "b h k d"]
    writes: Float[Array, "b h"]
    tail: Float[Array, "b k f"]


class Pending(NamedTuple):
    """Tokens of a group that have not joined the memory; all zero where there is none yet.

    Attributes:
      phases: raw phases, the tail before the group first ``[b, k + C, h * m]``.
      keys: ``phi`` of the write phases ``[b, h, C, 2 m]``.
      written: what they bind, ``g v - e Re(k^H M)`` ``[b, h, C, d]``.
      squares: ``g^2`` ``[b, h, C]``.
    """

    phases: Float[Array, "b p f"]
    keys: Float[Array, "b h c k"]
    written: Float[Array, "b h c d"]
    squares: Float[Array, "b h c"]


class Token(NamedTuple):
    """What a memory layer makes of a token before its memory is asked.

    Attributes:
      phases: raw phases, scaled ``[b, h * m]``.
      values: ``[b, h, d]``.
      gate: write gates ``[b, h]``, 0 for rows that stand still.
      erase: erase gates ``[b, h]``, or None.
    """

    phases: Float[Array, "b f"]
    values: Float[Array, "b h d"]
    gate: Float[Array, "b h"]
    erase: Float[Array, "b h"] | None


def supported(config: HoloConfig) -> bool:
    """Whether the memory layers of a model can hold writes back."""
    return (
        config.mixer == "holo"
        and config.binding == "outer"
        and config.addressing == "content"
        and config.short_conv >= 2
        and not config.value_conv
        and config.precision.memory == config.precision.phases == "float32"
    )


def hold(state: MemoryMixerState) -> Held:
    """The state of a layer as planes, its sum normalised so that ``memory`` alone is the rounded sum."""
    assert state.content is not None and state.tail is not None
    memory, residue = planes(state.content.memory), planes(state.content.residue)
    memory, residue = compensated_add(memory, residue, jnp.zeros_like(memory))
    return Held(memory, residue, state.content.writes, state.tail)


def release(held: Held) -> MemoryMixerState:
    """Inverse of ``hold``."""
    content = MemoryState(from_planes(held.memory), from_planes(held.residue), held.writes)
    return MemoryMixerState(tail=held.tail, content=content, position=None)


def begin(held: Held, size: int) -> Pending:
    """No writes, room for ``size``."""
    b, h, k, d = held.memory.shape
    room = jnp.zeros((b, size, held.tail.shape[-1]), held.tail.dtype)
    return Pending(
        phases=jnp.concatenate([held.tail, room], axis=1),
        keys=jnp.zeros((b, h, size, k), jnp.float32),
        written=jnp.zeros((b, h, size, d), jnp.float32),
        squares=jnp.zeros((b, h, size), jnp.float32),
    )


def again(held: Held, used: Pending) -> Pending:
    """The room of the group before, for forms that read no more of it than their own group's writes."""
    phases = jax.lax.dynamic_update_slice_in_dim(used.phases, held.tail, 0, axis=1)
    return used._replace(phases=phases)


def read_and_write(
    held: Held,
    pending: Pending,
    index: Int[Array, ""],
    token: Token,
    read_taps: Float[Array, "k f"],
    write_taps: Float[Array, "k f"],
) -> tuple[Float[Array, "b h d"], Pending]:
    """One token: what it reads, as ``functional.step`` does, and the group with its write.

    Args:
      held: the memory before the group.
      pending: the group so far.
      index: tokens in the group.
      token: see ``Token``.
      read_taps, write_taps: of the convolutions over raw phases; zeros before a segment are in the tail.
    """
    b, h, k, _ = held.memory.shape
    taps = read_taps.shape[0]
    phases = jax.lax.dynamic_update_slice_in_dim(
        pending.phases, token.phases[:, None], index + taps - 1, axis=1
    )
    window = jax.lax.dynamic_slice_in_dim(phases, index, taps, axis=1)
    write, read = (
        features(jnp.sum(own[None] * window, axis=1).reshape(b, h, k // 2)) for own in (write_taps, read_taps)
    )
    before = [
        of_memory + jnp.sum(jnp.sum(pending.keys * key[:, :, None], -1)[..., None] * pending.written, -2)
        for key, of_memory in zip((write, read), _products((write, read), held.memory), strict=True)
    ]
    written = token.gate[..., None] * token.values
    if token.erase is not None:
        written = written - token.erase[..., None] * before[0]
    overlap = jnp.sum(write * read, axis=-1, keepdims=True)
    put = jax.lax.dynamic_update_slice_in_dim
    after = Pending(
        phases=phases,
        keys=put(pending.keys, write[:, :, None], index, axis=2),
        written=put(pending.written, written[:, :, None], index, axis=2),
        squares=put(pending.squares, jnp.square(token.gate)[..., None], index, axis=2),
    )
    return before[1] + overlap * written, after


def _products(keys: tuple[Array, Array], memory: Array) -> list[Array]:
    """Two keys with one memory, which is read once: one reduction with two results."""
    terms = [key[..., None] * memory for key in keys]
    zero = jnp.zeros((), memory.dtype)
    return jax.lax.reduce(terms, [zero, zero], lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (2,))


def scaled(
    config: HoloConfig, read: Array, held: Held, pending: Pending, position: UInt32[Array, "b"]
) -> Float[Array, "b h d"]:
    """What was read, over the retrieval scale; ``pending`` holds the token's own write."""
    if config.read_scale == "sqrt_time":
        return read / jnp.sqrt(position.astype(jnp.float32) + 1)[:, None, None]
    if config.read_scale == "sqrt_writes":
        return read / jnp.sqrt(held.writes + jnp.sum(pending.squares, axis=-1) + _EPS)[..., None]
    return read


def join(held: Held, pending: Pending, count: Int[Array, "b"], add: Any = None) -> Held:
    """The memory with the writes of a group.

    Args:
      held, pending: before the group, and the group.
      count: tokens that were there, of each row.
      add: makes memory and residue from ``held`` and ``pending``; by default here.
    """
    if add is None:
        added = jnp.einsum(
            "bhck,bhcd->bhkd", pending.keys, pending.written, precision=jax.lax.Precision.HIGHEST
        )
        memory, residue = compensated_add(held.memory, held.residue, added)
    else:
        memory, residue = add(held, pending)
    size = held.tail.shape[1]
    at = count[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    tail = jnp.take_along_axis(pending.phases, at[..., None], axis=1)
    return Held(memory, residue, held.writes + jnp.sum(pending.squares, axis=-1), tail)


def hold_layers(config: HoloConfig, layers: Any) -> Any:
    """Layers, split or stacked, with the memories that ``supported`` covers as ``Held``."""
    return _hold_layers(layers) if supported(config) else layers


def release_layers(layers: Any) -> Any:
    """Inverse of ``hold_layers``."""
    return _release_layers(layers) if holds(layers) else layers


def holds(layers: Any) -> bool:
    """Whether there are layers in the form of ``hold``."""
    return any(isinstance(x, Held) for x in jax.tree.leaves(layers, is_leaf=lambda x: isinstance(x, Held)))


@jax.jit
def _hold_layers(layers: Any) -> Any:
    return jax.tree.map(
        lambda x: hold(x) if isinstance(x, MemoryMixerState) else x, layers, is_leaf=_is_layer
    )


@jax.jit
def _release_layers(layers: Any) -> Any:
    return jax.tree.map(lambda x: release(x) if isinstance(x, Held) else x, layers, is_leaf=_is_layer)


def _is_layer(node: Any) -> bool:
    return isinstance(node, Held) or is_mixer_state(node)
