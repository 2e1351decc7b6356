"""Memories between tokens in fewer bits: bfloat16, int8, int4, rounded without bias.

A stored number is rounded to one of its two neighbours on the grid with probabilities that make the mean
exact (stochastic rounding), so a sum that is stored after every token does not drift and small increments
are not swallowed; they add noise instead. Integer grids have one power-of-two step a row, a row being the
real or imaginary parts of the ``d`` value channels of one phasor component. A power of two has two merits
over ``max / limit``: a step that stays costs no rounding where nothing was written, and one that halves is
exact. A step grows when the row needs it and shrinks only when it is four times too large, so it does not
flap.

Noise is a function of the row's position alone: a row gets the same bits in whatever batch it is in.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Complex, Float, Int, Shaped
from holo_jax.functional import MemoryState
from holo_jax.generate.forms import is_mixer_state, is_split
from holo_jax.mixers import MemoryMixerState, SsmState
from holo_jax.model import ModelState

STATE_DTYPES = ("float32", "bfloat16", "int8", "int4")
_LIMITS = {"int8": 127, "int4": 7}
_SMALLEST_EXPONENT = -100
_NOT_FINITE = 127  # exponent of a row that holds infinities or NaN


class StoredMemory(NamedTuple):
    """A memory in fewer bits.

    Attributes:
      codes: bfloat16 or int8 ``[..., d]``, or uint8 ``[..., d / 2]`` with two 4-bit numbers a byte (the
        first in the low half). Complex memories have real and imaginary rows: ``[..., 2, d]``.
      exponents: int8 ``[...]``, the grid step of a row is ``2 ** exponent``; None for bfloat16.
    """

    codes: Shaped[Array, "..."]
    exponents: Int[Array, "..."] | None


def stored_dtype(state: ModelState) -> str:
    """The ``state_dtype`` of a model state."""
    stored = jax.tree.leaves(state.layers, is_leaf=lambda node: isinstance(node, StoredMemory))
    found = [node.codes.dtype for node in stored if isinstance(node, StoredMemory)]
    if not found:
        return "float32"
    return "int4" if found[0] == jnp.uint8 else str(found[0])


def compress_state(state: ModelState, dtype: str, *, previous: ModelState | None = None) -> ModelState:
    """The state with its memories stored as ``dtype``.

    The compensation of the running sum is dropped with any dtype but float32. Convolution tails, gate sums
    and attention caches are not memories and stay as they are.

    Args:
      state: a float32 state, stacked or split into periods.
      dtype: float32 (returns ``state`` itself), bfloat16, int8 or int4.
      previous: the stored state before the last tokens, whose grids are kept where they fit.

    Raises:
      ValueError: for another dtype, a state that is stored already, or int4 with an odd head_dim.
    """
    if dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype is {dtype!r}; it must be one of {', '.join(STATE_DTYPES)}")
    if stored_dtype(state) != "float32":
        raise ValueError(f"the state is stored as {stored_dtype(state)} already; expand_state comes first")
    return state if dtype == "float32" else _compress(state, previous, dtype)


def expand_state(state: ModelState) -> ModelState:
    """The float32 state that a stored one stands for; a float32 state is returned as it is."""
    return state if stored_dtype(state) == "float32" else _expand(state)


@partial(jax.jit, static_argnames="dtype")
def _compress(state: ModelState, previous: ModelState | None, dtype: str) -> ModelState:
    layers, before = state.layers, None if previous is None else previous.layers
    if is_split(layers):
        periods = [
            tuple(
                _compress_mixer(mixer, state.position, n * len(period) + k, before and before[n][k], dtype)
                for k, mixer in enumerate(period)
            )
            for n, period in enumerate(layers)
        ]
        return state._replace(layers=tuple(periods))

    def stacked(k: int, mixer: Any) -> Any:
        count = jax.tree.leaves(mixer)[0].shape[0]
        seeds = jnp.arange(count) * len(layers) + k
        compress = lambda mixer, seed, old: _compress_mixer(mixer, state.position, seed, old, dtype)  # noqa: E731
        return jax.vmap(compress)(mixer, seeds, before and before[k])

    return state._replace(layers=tuple(stacked(k, mixer) for k, mixer in enumerate(layers)))


@jax.jit
def _expand(state: ModelState) -> ModelState:
    def memory(stored: MemoryState | None) -> MemoryState | None:
        if stored is None:
            return None
        numbers = restore(_as_stored(stored.memory), is_complex=True)
        return stored._replace(memory=numbers, residue=jnp.zeros_like(numbers))

    def expand(mixer: Any) -> Any:
        if isinstance(mixer, SsmState):
            return mixer._replace(memory=restore(_as_stored(mixer.memory)))
        if isinstance(mixer, MemoryMixerState):
            return mixer._replace(content=memory(mixer.content), position=memory(mixer.position))
        return mixer

    return state._replace(layers=jax.tree.map(expand, state.layers, is_leaf=is_mixer_state))


def store(
    memory: Complex[Array, "..."] | Float[Array, "..."],
    dtype: str,
    key: Array,
    exponents: Int[Array, "..."] | None = None,
) -> StoredMemory:
    """Rounds one memory, without bias, to ``dtype`` (bfloat16, int8 or int4).

    Args:
      memory: ``[..., d]``, complex64 or float32.
      dtype: of the stored numbers.
      key: of the rounding.
      exponents: of the same rows when last stored, kept where they fit.

    Raises:
      ValueError: for int4 with odd d.
    """
    complex_memory = jnp.issubdtype(memory.dtype, jnp.complexfloating)
    numbers = jnp.stack([memory.real, memory.imag], axis=-2) if complex_memory else memory
    numbers = numbers.astype(jnp.float32)
    if dtype == "bfloat16":
        return StoredMemory(_round_bfloat16(numbers, key), None)
    d = numbers.shape[-1]
    if dtype == "int4" and d % 2:
        raise ValueError(f"head_dim is {d}; storing a state as int4 needs an even one")
    exponent = _row_exponents(numbers, _LIMITS[dtype], exponents)
    finite = exponent != _NOT_FINITE
    units = jnp.where(finite[..., None], jnp.ldexp(numbers, -exponent[..., None].astype(jnp.int32)), 0.0)
    below = jnp.floor(units)
    draw = jax.random.uniform(key, units.shape, jnp.float32)
    codes = (below + (draw < units - below).astype(jnp.float32)).astype(jnp.int8)
    if dtype == "int4":
        nibbles = jax.lax.bitcast_convert_type(codes, jnp.uint8) & 0xF
        codes = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return StoredMemory(codes, exponent)


def restore(stored: StoredMemory, *, is_complex: bool = False) -> Array:
    """The numbers of ``store``; with ``is_complex``, rows ``[..., 2, d]`` become complex64 ``[..., d]``."""
    codes, exponents = stored
    if exponents is None:
        numbers = codes.astype(jnp.float32)
    else:
        if codes.dtype == jnp.uint8:
            pair = jnp.stack([codes & 0xF, codes >> 4], axis=-1)
            signed = (pair.astype(jnp.int8) ^ 8) - 8
            codes = signed.reshape(*codes.shape[:-1], 2 * codes.shape[-1])
        step = exponents[..., None].astype(jnp.int32)
        numbers = jnp.ldexp(codes.astype(jnp.float32), step)
        numbers = jnp.where(step == _NOT_FINITE, jnp.nan, numbers)
    return jax.lax.complex(numbers[..., 0, :], numbers[..., 1, :]) if is_complex else numbers


def _row_exponents(numbers: Array, limit: int, before: Array | None) -> Array:
    """Smallest k with ``max |row| <= limit 2^k``; the one before if it is at most one larger."""
    largest = jnp.max(jnp.abs(numbers), axis=-1)
    mantissa, exponent = jnp.frexp(largest / limit)
    exponent = exponent - (mantissa == 0.5)
    exponent = exponent + (largest > jnp.ldexp(jnp.float32(limit), exponent))
    exponent = jnp.maximum(exponent, _SMALLEST_EXPONENT)
    if before is not None:
        kept = before.astype(exponent.dtype)
        exponent = jnp.where((kept == exponent + 1) & (kept != _NOT_FINITE), kept, exponent)
    return jnp.where(jnp.isfinite(largest), exponent, _NOT_FINITE).astype(jnp.int8)


def _round_bfloat16(numbers: Array, key: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(numbers, jnp.uint32)
    dither = jax.random.bits(key, numbers.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + dither) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(numbers), rounded, numbers).astype(jnp.bfloat16)


def _compress_mixer(mixer: Any, position: Array, seed: Array | int, before: Any, dtype: str) -> Any:
    """One layer's state with its memories stored; ``seed`` tells layers apart."""

    def stored(memory: Array, old: Any, number: int) -> StoredMemory:
        key = jax.random.fold_in(jax.random.key(number, impl="threefry2x32"), seed)
        keys = jax.vmap(lambda p: jax.random.fold_in(key, p))(position)
        exponents = None if old is None else _as_stored(old).exponents
        return jax.vmap(lambda m, k, e: store(m, dtype, k, e))(memory, keys, exponents)

    if isinstance(mixer, SsmState):
        codes: Any = stored(mixer.memory, before and before.memory, 0)
        return mixer._replace(memory=codes)
    if isinstance(mixer, MemoryMixerState):
        parts = {}
        for number, name in enumerate(("content", "position")):
            memory, old = getattr(mixer, name), getattr(before, name, None)
            if memory is not None:
                codes = stored(memory.memory, None if old is None else old.memory, number)
                parts[name] = memory._replace(memory=codes, residue=None)
        return mixer._replace(**parts)
    return mixer


def _as_stored(memory: Any) -> StoredMemory:
    if not isinstance(memory, StoredMemory):
        raise TypeError(f"a memory of type {type(memory).__name__} is not stored")
    return memory
