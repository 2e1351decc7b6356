"""The erase rule on Hopper for training: rows that begin from nothing, heads of 64 features and channels.

jax-linear-attention inverts chunks; the rest is by kernels of our own, without decay and by write and erase
gates, not their quotient: retrievals and states between chunks (``forward_walk``), gradients of those states
(``reverse_walk``), and all that lies inside chunks on the way back (``erase_gradients``). Few long rows are
cut in pieces that are read at once, as in the package; what a piece does to the state before it is found by
one program (``piece_maps``), where the package's kernel takes two of a multiprocessor each, and one kernel
composes pieces (``piece_states``). Packed rows are walked by the package's kernels.

Source: https://github.com/jla-org/jax-linear-attention (Apache-2.0), version 0.1.0,
``ops/mosaic_gpu/scalar_gate.py``.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from holo_jax.array_types import Array
from holo_jax.kernels import capability
from holo_jax.kernels.call import SCALED_NAME, Call
from holo_jax.kernels.hopper import erase_gradients, forward_walk, piece_maps, piece_states, reverse_walk
from holo_jax.kernels.hopper import stages as hopper_stages
from holo_jax.kernels.hopper.chunk_tiles import WIDTH


def unsupported(call: Call, *, final: bool) -> str | None:
    """Why these kernels cannot stand in for the package's own form, or None. For calls with ``erase``."""
    d, m = call.values.shape[-1], call.write_phases.shape[-1]
    if call.initial_state is not None or final:
        return "the state before or after rows is asked for"
    if (2 * m, d) != (WIDTH, WIDTH):
        return f"m is {m} and d is {d}; 2 m and d must be {WIDTH}"
    return None


@jax.custom_vjp
def read(
    queries: Array, keys: Array, values: Array, gates: Array, strength: Array, segment_ids: Array | None
) -> Array:
    """Outputs ``[b, t, h, d]``.

    Args:
      queries, keys: features ``[b, t, h, 2 m]`` in the dtype of the values.
      values: ``[b, t, h, d]``, bfloat16 or float16.
      gates, strength: write and erase gates, float32 ``[b, t, h]``, positive.
      segment_ids: ``[b, t]``; None where every row is one segment.
    """
    return _forward(queries, keys, values, gates, strength, segment_ids)[0]


def _forward(
    queries: Array, keys: Array, values: Array, gates: Array, strength: Array, segment_ids: Array | None
) -> tuple[Array, Any]:
    if segment_ids is not None:
        # All that going back needs of the values: so a block keeps it in place of them.
        values = checkpoint_name(hopper_stages.scaled(values, gates / strength), SCALED_NAME)
    x = hopper_stages.inputs((queries, keys, values, strength), segment_ids)
    inverse = hopper_stages.inverses(x)
    maps = starts = None
    if segment_ids is None:
        walked = _walked(x, inverse, gates)
        if x.pieces > 1:
            maps = piece_maps.transitions(*walked, pieces=x.pieces)
            starts = _in_rows(piece_states.before(maps))
        outputs = forward_walk.retrievals(*walked, x.queries, starts, pieces=x.pieces)
    else:
        if x.pieces > 1:
            maps = hopper_stages.maps(x, inverse)
            starts = _in_rows(piece_states.before(maps))
        outputs = hopper_stages.outputs(x, inverse, starts)
    saved = (queries, keys, values, gates, strength, segment_ids, inverse, maps, starts)
    return outputs[:, : values.shape[1]], saved


def _backward(saved: Any, cotangent: Array) -> tuple[Array | None, ...]:
    queries, keys, values, gates, strength, segment_ids, inverse, maps, starts = saved
    x = hopper_stages.inputs((queries, keys, values, strength), segment_ids)
    cotangent = hopper_stages.padded(cotangent, x)
    ends = None
    if segment_ids is None:
        states = forward_walk.states(*_walked(x, inverse, gates), starts, pieces=x.pieces)
        back = (x.queries, x.keys, cotangent, inverse, x.strength)
        if x.pieces > 1:
            ends = _in_rows(piece_states.after(maps, reverse_walk.terms(*back, pieces=x.pieces)))
        of_states = reverse_walk.between(*back, ends, pieces=x.pieces)
    else:
        states = hopper_stages.states(x, inverse, starts)
        if x.pieces > 1:
            ends = _in_rows(piece_states.after(maps, hopper_stages.reverse_terms(x, cotangent, inverse)))
        of_states, _ = hopper_stages.reverse(x, cotangent, inverse, ends)
    found = erase_gradients.gradients(
        x.queries,
        x.keys,
        x.values,
        hopper_stages.heads_first(gates, x),
        x.strength,
        scaled=segment_ids is not None,
        cotangent=cotangent,
        inverse=inverse,
        states=states,
        of_states=of_states,
        runs=None if x.segments is None else erase_gradients.Runs(*x.segments),
        programs=max(capability.multiprocessors(), 1),
    )
    time = values.shape[1]
    wide = (g[:, :time] for g in (found.queries, found.keys, found.values))
    return *wide, *(jnp.swapaxes(g, 1, 2)[:, :time] for g in (found.gates, found.erase)), None


read.defvjp(_forward, _backward)


def _walked(
    x: hopper_stages.Inputs, inverse: Array, gates: Array
) -> tuple[Array, Array, Array, Array, Array]:
    return x.keys, x.values, inverse, hopper_stages.heads_first(gates, x), x.strength


def _in_rows(by_piece: Array) -> Array:
    return by_piece.reshape(-1, *by_piece.shape[2:])
