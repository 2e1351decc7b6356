"""``accumulate``: one signature over the definition, its parallel reference and the fast form."""

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Float, Int
from holo_jax.functional.checks import BINDINGS, check_choice, check_float, check_shape, real_dtype
from holo_jax.functional.memory.decode import decode_step
from holo_jax.functional.memory.hadamard import chunked_hadamard
from holo_jax.functional.memory.outer import chunked_outer
from holo_jax.functional.memory.reference import associative_erase, associative_sum, recurrent
from holo_jax.functional.memory.state import MemoryState, check_erase, check_state, init_memory
from holo_jax.functional.segments import borders, make_runs, run_index
from holo_jax.functional.varying import vary_together
from holo_jax.precision import assert_dtype, assert_wide, complex_dtype

METHODS = ("chunked", "associative_scan", "recurrent")
CHUNK_SIZES = {"hadamard": 32, "outer": 64}


def accumulate(
    write_phases: Float[Array, "#b t h m"],
    read_phases: Float[Array, "#b t h m"],
    values: Float[Array, "b t h d"],
    gates: Float[Array, "b t h"] | None = None,
    erase: Float[Array, "b t h"] | None = None,
    *,
    binding: str,
    method: str = "chunked",
    segment_ids: Int[Array, "b t"] | None = None,
    initial_state: MemoryState | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "b t h d"], MemoryState]:
    """Writes a sequence into a phasor memory and reads it back at every position.

        M_t = M_{t-1} + bind(e^{i a_t}, g_t v_t - e_t unbind(e^{-i a_t}, M_{t-1}))
        y_t = unbind(e^{-i b_t}, M_t)

    There is no decay: without erase, M_t is a plain sum. The erase term first removes the share ``e_t`` of
    what the key reads now; it never grows a norm, and leaves orthogonal keys untouched.

    Methods, equal in values and gradients up to rounding:

    * ``"recurrent"``, the definition: ``step`` by ``lax.scan``, with a compensated sum (a single position is
      read before it is written, one pass less over the memory);
    * ``"associative_scan"``, the parallel reference: holds a state per position;
    * ``"chunked"`` (default): exact inside chunks, one state between them; linear memory in time.

    Precision. Sums run in float32 (float64 if phases or values are float64) whatever the dtype of the
    values. ``"chunked"`` multiplies matrices with bfloat16 operands if the values are bfloat16, in the memory
    dtype otherwise; the other methods widen the values. For float32 the relative rounding error of a plain
    sum stays below 1e-5 at any length, coherent inputs included, also when a sequence is accumulated in many
    pieces: the state's residue carries what each addition lost. (``"associative_scan"`` returns no residue
    for the erase rule.)

    Causality and packed rows are exact: outputs and gradients of a position do not depend, not even by
    rounding, on later positions or on other segments, as long as all inputs are finite.

    Args:
      write_phases, read_phases: radians ``[b, t, h, m]``; a leading 1 is shared by all rows.
      values: real values ``[b, t, h, d]``, bfloat16, float16, float32 or float64.
      gates: write gates ``[b, t, h]``; 1 if None.
      erase: erase gates ``[b, t, h]`` in [0, 1], or None for the plain sum. Needs binding ``"outer"``.
      binding: ``"hadamard"`` (m == d) or ``"outer"``.
      method: see above.
      segment_ids: ``[b, t]``; a new segment begins, with an empty memory, where the id differs from that of
        the position before. The initial state belongs to the segment of position 0.
      initial_state: memory before position 0; empty if None.
      chunk_size: positions per chunk, a measured default if None; read by ``"chunked"`` only.

    Returns:
      Outputs ``[b, t, h, d]`` in the memory dtype, not divided by a retrieval scale, and the state after
      the last position (of its segment). Both are differentiable in reverse mode with respect to phases,
      values, gates, erase and the initial state; the residue counts as part of the memory it corrects.

    Raises:
      ValueError: for an unknown binding or method, erase with ``hadamard``, m != d with ``hadamard``, a chunk
        size below 1, no positions, or a shape that does not fit.
      TypeError: for phases narrower than float32, or a state whose dtype is not the memory's.
    """
    check_choice("binding", binding, BINDINGS)
    check_choice("method", method, METHODS)
    check_erase(binding, erase)
    assert_wide(write_phases=write_phases, read_phases=read_phases)
    check_float(values=values, gates=gates, erase=erase)
    if values.ndim != 4 or values.shape[1] < 1:
        raise ValueError(f"values has shape {values.shape}; it must be [batch, time >= 1, heads, channels]")
    batch, time, heads, d = values.shape
    m = write_phases.shape[-1]
    if binding == "hadamard" and m != d:
        raise ValueError(f"m is {m} and d is {d}; binding 'hadamard' needs as many phasors as value channels")
    for name, phases in (("write_phases", write_phases), ("read_phases", read_phases)):
        check_shape(name, phases, (batch, time, heads, m), (1, time, heads, m))
    check_shape("gates", gates, (batch, time, heads))
    check_shape("erase", erase, (batch, time, heads))
    check_shape("segment_ids", segment_ids, (batch, time))
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids has dtype {segment_ids.dtype}; it must be an integer dtype")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size!r}; it must be at least 1, or None for the default")
    dtype = real_dtype(write_phases, values)
    dtype = real_dtype(read_phases, jnp.zeros((), dtype))
    if initial_state is None:
        initial_state = init_memory(batch, heads, m, d, binding=binding, dtype=dtype)
    check_state(initial_state, batch, heads, m, d, binding, dtype)

    write, read = write_phases.astype(dtype), read_phases.astype(dtype)
    gate = jnp.ones((batch, time, heads), dtype) if gates is None else gates.astype(dtype)
    removal = None if erase is None else erase.astype(dtype)
    write, read, values, gate, removal, segment_ids, initial_state = vary_together(
        (write, read, values, gate, removal, segment_ids, initial_state)
    )
    if method == "chunked":
        runs = None if segment_ids is None else make_runs(segment_ids)
        chunk = chunk_size or CHUNK_SIZES[binding]
        if binding == "hadamard":
            result = chunked_hadamard(write, read, values, gate, runs, initial_state, chunk)
        else:
            operands = values.dtype if values.dtype == jnp.bfloat16 else dtype
            result = chunked_outer(write, read, values, gate, removal, runs, initial_state, chunk, operands)
        outputs, state = result[0], MemoryState(*result[1:], _writes(gate, segment_ids, initial_state))
    else:
        border = jnp.zeros((batch, time), bool) if segment_ids is None else borders(segment_ids)
        wide = values.astype(dtype)
        if method == "recurrent" and time == 1:
            # Position 0 never begins a segment: the state is that segment's.
            token = jax.tree.map(lambda x: x[:, 0], (write, read, wide, gate, removal))
            output, state = decode_step(initial_state, *token)
            outputs = output[:, None]
        elif method == "recurrent":
            outputs, state = recurrent(write, read, wide, gate, removal, border, initial_state)
        else:
            if removal is None:
                result = associative_sum(write, read, wide, gate, border, initial_state)
            else:
                result = associative_erase(write, read, wide, gate, removal, border, initial_state)
            outputs, state = result[0], MemoryState(*result[1:], _writes(gate, segment_ids, initial_state))
    assert_dtype(outputs, dtype, "outputs")
    assert_dtype(state.memory, complex_dtype(dtype), "memory")
    assert_dtype(state.residue, complex_dtype(dtype), "residue")
    return outputs, state


def _writes(gates: Array, segment_ids: Array | None, initial: MemoryState) -> Array:
    """Sum of g^2 over the last segment of the row."""
    squares = jnp.square(gates)
    if segment_ids is None:
        return initial.writes + jnp.sum(squares, axis=1)
    runs = run_index(segment_ids)
    last = runs[:, -1:]
    total = jnp.sum(jnp.where((runs == last)[..., None], squares, 0.0), axis=1)
    return total + jnp.where(last == 0, initial.writes, 0.0)
