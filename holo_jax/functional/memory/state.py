"""The memory state, its compensated sum, one step of the recurrence, and reading a fixed memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from holo_jax.array_types import Array, Float
from holo_jax.functional.binding import bind, unbind
from holo_jax.functional.checks import BINDINGS, check_choice, check_float, check_shape, real_dtype
from holo_jax.functional.memory.products import contract, features, planes
from holo_jax.precision import assert_dtype, complex_dtype


class MemoryState(NamedTuple):
    """What a head remembers; its size does not depend on how much was written.

    Attributes:
      memory: complex64 ``[b, h, m, d]`` (outer) or ``[b, h, d]`` (hadamard).
      residue: same shape; the rounding error that the sum has left behind. The true value is
        ``memory + residue``.
      writes: float32 ``[b, h]``, sum of g^2 over the current segment. It is a plain sum: for gates of 1
        it stops growing at 2^24 tokens.
    """

    memory: Array
    residue: Array
    writes: Array

    @property
    def binding(self) -> str:
        """``"outer"`` or ``"hadamard"``, by the rank of the memory."""
        return "outer" if self.memory.ndim == 4 else "hadamard"


def init_memory(
    batch: int, heads: int, m: int, d: int, *, binding: str, dtype: DTypeLike = jnp.float32
) -> MemoryState:
    """An empty memory.

    Args:
      batch, heads, m, d: sizes; ``hadamard`` needs m == d.
      binding: ``"hadamard"`` or ``"outer"``.
      dtype: of the real and imaginary parts, float32 or float64.

    Raises:
      ValueError: for an unknown binding, a size below 1, or ``hadamard`` with m != d.
      TypeError: for a dtype without complex counterpart.
    """
    check_choice("binding", binding, BINDINGS)
    for name, size in (("batch", batch), ("heads", heads), ("m", m), ("d", d)):
        if size < 1:
            raise ValueError(f"{name} is {size!r}; it must be at least 1")
    if binding == "hadamard" and m != d:
        raise ValueError(f"m is {m} and d is {d}; binding 'hadamard' needs as many phasors as value channels")
    shape = (batch, heads, m, d) if binding == "outer" else (batch, heads, d)
    zeros = jnp.zeros(shape, complex_dtype(dtype))
    return MemoryState(zeros, zeros, jnp.zeros((batch, heads), dtype))


@jax.custom_jvp
def compensated_add(total: Array, residue: Array, addend: Array) -> tuple[Array, Array]:
    """Adds to an unevaluated pair ``total + residue``; returns the renormalised pair.

    Knuth's two-sum gives the exact rounding error of ``total + addend``; it joins the residue, and a fast
    two-sum moves what has become representable back into the total. The residue stays below half a unit in
    the last place of the total, so the error of a long sum does not grow with its length. Complex arrays
    are summed by component.

    The pair is a sum and is differentiated as one: the whole tangent goes to the total.
    """
    rough = total + addend
    moved = rough - total
    error = (total - (rough - moved)) + (addend - moved)
    rest = residue + error
    new = rough + rest
    return new, rest - (new - rough)


@compensated_add.defjvp
def _compensated_add_jvp(primals, tangents):
    new, residue = compensated_add(*primals)
    d_total, d_residue, d_addend = tangents
    return (new, residue), (d_total + d_residue + d_addend, jnp.zeros_like(residue))


def check_state(
    state: MemoryState, batch: int, heads: int, m: int, d: int, binding: str, dtype: DTypeLike
) -> None:
    """Raises ``ValueError``/``TypeError`` unless ``state`` fits these sizes and this real dtype."""
    shape = (batch, heads, m, d) if binding == "outer" else (batch, heads, d)
    for name, array, wanted, kind in (
        ("initial_state.memory", state.memory, shape, complex_dtype(dtype)),
        ("initial_state.residue", state.residue, shape, complex_dtype(dtype)),
        ("initial_state.writes", state.writes, (batch, heads), dtype),
    ):
        check_shape(name, array, wanted)
        assert_dtype(array, kind, name)


def step(
    state: MemoryState,
    write_phase: Float[Array, "#b h m"],
    read_phase: Float[Array, "#b h m"],
    value: Float[Array, "b h d"],
    gate: Float[Array, "b h"] | None = None,
    erase: Float[Array, "b h"] | None = None,
) -> tuple[Float[Array, "b h d"], MemoryState]:
    """One token of the recurrence; ``accumulate`` over one position gives the same.

        M <- M + bind(e^{i a}, g v)                            plain
        M <- M + bind(e^{i a}, g v - e unbind(e^{-i a}, M))    with erase (outer only)
        y  = unbind(e^{-i b}, M)

    The sum is compensated (``compensated_add``), so decoding any number of tokens step by step does not
    drift. The binding is that of the state.

    Args:
      state: memory before the token.
      write_phase, read_phase: radians ``[b or 1, h, m]``.
      value: ``[b, h, d]``.
      gate: write gate ``[b, h]``, 1 if None.
      erase: erase gate ``[b, h]``, or None for the plain sum.

    Returns:
      The value read ``[b, h, d]`` (not divided by a retrieval scale) and the new state.

    Raises:
      ValueError: for shapes that do not fit, or erase with a hadamard memory.
      TypeError: for phases narrower than float32 or a state of another dtype.
    """
    dtype = real_dtype(write_phase, value)
    binding = state.binding
    batch, heads, d = value.shape
    m = write_phase.shape[-1]
    check_shape("write_phase", write_phase, (batch, heads, m), (1, heads, m))
    check_shape("read_phase", read_phase, (batch, heads, m), (1, heads, m))
    check_shape("gate", gate, (batch, heads))
    check_shape("erase", erase, (batch, heads))
    check_float(gate=gate, erase=erase)
    check_erase(binding, erase)
    check_state(state, batch, heads, m, d, binding, dtype)

    written = value.astype(dtype)
    writes = jnp.ones((batch, heads), dtype)
    if gate is not None:
        written = gate.astype(dtype)[..., None] * written
        writes = jnp.square(gate.astype(dtype))
    if erase is not None:
        held = unbind(write_phase, state.memory + state.residue, binding=binding)
        written = written - erase.astype(dtype)[..., None] * held
    memory, residue = compensated_add(
        state.memory, state.residue, bind(write_phase, written, binding=binding)
    )
    output = unbind(read_phase, memory + residue, binding=binding)
    return output, MemoryState(memory, residue, state.writes + writes)


def check_erase(binding: str, erase: Array | None) -> None:
    """Raises ``ValueError`` for an erase gate with a binding that has none."""
    if erase is not None and binding != "outer":
        raise ValueError(
            f"erase is given with binding {binding!r}; it must be None unless binding is 'outer'"
        )


def retrieve(
    state: MemoryState, read_phases: Float[Array, "#b t h m"], *, binding: str
) -> Float[Array, "b t h d"]:
    """Reads a fixed memory at any number of phases.

    Args:
      state: the memory; it is not changed.
      read_phases: radians ``[b or 1, t, h, m]``.
      binding: that of the state.

    Returns:
      ``[b, t, h, d]``, not divided by a retrieval scale.

    Raises:
      ValueError: for an unknown binding or one that is not the state's, or shapes that do not fit.
      TypeError: for phases narrower than float32 or wider than the memory.
    """
    check_choice("binding", binding, BINDINGS)
    if binding != state.binding:
        raise ValueError(f"binding is {binding!r}; it must be {state.binding!r}, as the state's memory")
    value = state.memory + state.residue
    batch, heads = value.shape[:2]
    time = read_phases.shape[1]
    width = value.shape[2]
    check_shape("read_phases", read_phases, (batch, time, heads, width), (1, time, heads, width))
    if binding == "hadamard":
        return unbind(read_phases, value[:, None], binding=binding)
    dtype = real_dtype(read_phases, value.real)
    assert_dtype(value, complex_dtype(dtype), "state.memory")
    keys = jnp.broadcast_to(features(read_phases.astype(dtype)), (batch, time, heads, 2 * width))
    return contract("bthm,bhmd->bthd", dtype, keys, planes(value))
