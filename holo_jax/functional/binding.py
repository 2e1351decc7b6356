"""Binding a value to a phasor key, reading it back, and the scale of what is read.

Both bindings have keys of unit norm, so ``bind`` is an isometry and ``unbind(a, bind(a, v)) == v``:

* ``hadamard`` (holographic reduced representation in the frequency domain): ``e^{i a} * v`` element by
  element, with as many phasors as value channels;
* ``outer`` (tensor product): ``k v^T`` with ``k = e^{i a} / sqrt(m)``.

Source: Plate, "Holographic Reduced Representations" (IEEE TNN 6(3), 1995); Smolensky, "Tensor product
variable binding" (Artificial Intelligence 46, 1990).
"""

import math

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Complex, Float, Int
from holo_jax.functional.checks import BINDINGS, check_choice, check_float, check_shape, real_dtype, wider
from holo_jax.functional.segments import run_index, segmented_sum
from holo_jax.functional.trigonometry import sincos
from holo_jax.precision import assert_dtype, assert_wide, complex_dtype

SCALES = ("sqrt_time", "sqrt_writes", "none")


def _check_width(m: int, d: int) -> None:
    if m != d:
        raise ValueError(f"m is {m} and d is {d}; binding 'hadamard' needs as many phasors as value channels")


def bind(
    phases: Float[Array, "... m"], values: Float[Array, "... d"], *, binding: str
) -> Complex[Array, "..."]:
    """Binds real values to the phasor key of the given phases.

    Args:
      phases: radians ``[..., m]``, float32 or float64.
      values: real values ``[..., d]`` of any float dtype; widened to the memory dtype, which is exact.
        Leading dimensions equal those of ``phases`` or are 1.
      binding: ``"hadamard"`` (m == d) gives ``[..., d]``; ``"outer"`` gives ``[..., m, d]``.

    Returns:
      complex64 (complex128 if an argument is float64) of the same norm as ``values``.

    Raises:
      ValueError: for an unknown binding, different ranks, or ``hadamard`` with m != d.
      TypeError: for phases narrower than float32.
    """
    check_choice("binding", binding, BINDINGS)
    if phases.ndim != values.ndim:
        raise ValueError(f"values has rank {values.ndim}; it must have the rank of phases, {phases.ndim}")
    dtype = real_dtype(phases, values)
    angle, value = phases.astype(dtype), values.astype(dtype)
    sin, cos = sincos(angle)
    if binding == "hadamard":
        _check_width(phases.shape[-1], values.shape[-1])
        bound = jax.lax.complex(cos * value, sin * value)
    else:
        norm = math.sqrt(phases.shape[-1])
        value = value[..., None, :]
        bound = jax.lax.complex((cos / norm)[..., None] * value, (sin / norm)[..., None] * value)
    assert_dtype(bound, complex_dtype(dtype), "bound memory")
    return bound


def unbind(
    phases: Float[Array, "... m"], memory: Complex[Array, "..."], *, binding: str
) -> Float[Array, "... d"]:
    """Reads a memory with the phasor key of the given phases.

    ``hadamard``: ``Re(e^{-i b} * M)``; ``outer``: ``Re(k^H M)`` with ``k = e^{i b} / sqrt(m)``.

    Args:
      phases: radians ``[..., m]``.
      memory: ``[..., d]`` (hadamard) or ``[..., m, d]`` (outer); leading dimensions equal those of
        ``phases`` or are 1.
      binding: as in ``bind``.

    Returns:
      real ``[..., d]`` in the dtype of the parts of ``memory``.

    Raises:
      ValueError: for an unknown binding, ranks or widths that do not fit.
      TypeError: for phases narrower than float32, or float64 phases with a complex64 memory.
    """
    check_choice("binding", binding, BINDINGS)
    assert_wide(phases=phases)
    dtype = jnp.dtype(jnp.finfo(memory.dtype).dtype)
    if phases.dtype != dtype and phases.dtype != jnp.float32:
        raise TypeError(
            f"phases has dtype {phases.dtype}; it must not be wider than the memory, {memory.dtype}"
        )
    rank = phases.ndim + (binding == "outer")
    if memory.ndim != rank:
        raise ValueError(f"memory has rank {memory.ndim}; it must be {rank} for binding {binding!r}")
    width = memory.shape[-1] if binding == "hadamard" else memory.shape[-2]
    if phases.shape[-1] != width:
        raise ValueError(f"phases has {phases.shape[-1]} components; it must have {width}, as the memory")
    angle = phases.astype(dtype)
    sin, cos = sincos(angle)
    if binding == "hadamard":
        value = cos * memory.real + sin * memory.imag
    else:
        products = cos[..., None] * memory.real + sin[..., None] * memory.imag
        value = jnp.sum(products, axis=-2) / math.sqrt(width)
    assert_dtype(value, dtype, "value read")
    return value


def retrieval_scale(
    kind: str,
    gates: Float[Array, "b t h"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_writes: Float[Array, "b h"] | None = None,
    initial_steps: Int[Array, " b"] | None = None,
    eps: float = 1e-6,
) -> Float[Array, "b t h"]:
    """The scale n_t by which a read is divided.

    * ``"sqrt_time"``: ``sqrt(s)``, s the number of positions of the segment up to and including t;
    * ``"sqrt_writes"``: ``sqrt(sum of g^2 + eps)`` over the same positions, the standard deviation of the
      crosstalk of what was written (equal to ``sqrt_time`` for gates of 1, up to eps);
    * ``"none"``: 1.

    Args:
      kind: which scale.
      gates: write gates ``[b, t, h]``.
      segment_ids: ``[b, t]``; the sums restart where the id changes.
      initial_writes: ``[b, h]``, sum of g^2 before position 0 in its segment (``MemoryState.writes``).
      initial_steps: ``[b]``, number of positions before position 0 in its segment.
      eps: added under the root of ``sqrt_writes``, so that a silent gate does not divide by zero.

    Returns:
      ``[b, t, h]`` float32 (float64 for float64 gates), positive.

    Raises:
      ValueError: for an unknown kind, a shape that does not fit, or an eps that is not positive.
    """
    check_choice("kind", kind, SCALES)
    if not eps > 0.0:
        raise ValueError(f"eps is {eps!r}; it must be positive")
    if gates.ndim != 3:
        raise ValueError(f"gates has shape {gates.shape}; it must be [batch, time, heads]")
    check_float(gates=gates, initial_writes=initial_writes)
    batch, time, heads = gates.shape
    check_shape("segment_ids", segment_ids, (batch, time))
    check_shape("initial_writes", initial_writes, (batch, heads))
    check_shape("initial_steps", initial_steps, (batch,))
    dtype = wider(gates.dtype)
    if kind == "none":
        return jnp.ones((batch, time, heads), dtype)
    runs = None if segment_ids is None else run_index(segment_ids)
    if kind == "sqrt_time":
        weights = jnp.ones((batch, time, 1), dtype)
        initial = None if initial_steps is None else initial_steps[:, None]
    else:
        weights = jnp.square(gates.astype(dtype))
        initial = initial_writes
    total = segmented_sum(weights, runs)
    if initial is not None:
        carried = jnp.broadcast_to(initial.astype(dtype)[:, None, :], total.shape)
        if runs is not None:
            carried = jnp.where((runs == 0)[..., None], carried, 0.0)
        total = total + carried
    scale = jnp.sqrt(total) if kind == "sqrt_time" else jnp.sqrt(total + eps)
    return jnp.broadcast_to(scale, (batch, time, heads))
