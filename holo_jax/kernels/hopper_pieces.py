"""The erase rule over few long rows on Hopper, where rows are cut in pieces that are read at once.

What jax-linear-attention does for such rows, with kernels of our own between its: one program finds all that
a piece does to the state before it (``piece_maps``), where its kernel takes two of a multiprocessor each, and
one kernel composes pieces (``piece_states``), where it leaves a product for every piece to the compiler.

Source: https://github.com/jla-org/jax-linear-attention (Apache-2.0), version 0.1.0,
``ops/mosaic_gpu/scalar_gate.py``.
"""

from typing import Any

import jax

from holo_jax.array_types import Array
from holo_jax.kernels import hopper_stages, piece_maps, piece_states
from holo_jax.kernels.call import Call


def unsupported(call: Call, *, final: bool) -> str | None:
    """Why these kernels cannot stand in for the package's own pieces, or None. For calls with ``erase``."""
    d, m = call.values.shape[-1], call.write_phases.shape[-1]
    if call.segment_ids is not None:
        return "rows are packed: pieces are walked from the last beginning of a segment only"
    if call.initial_state is not None or final:
        return "the state before or after rows is asked for"
    if (2 * m, d) != (piece_maps.WIDTH, piece_maps.WIDTH):
        return f"m is {m} and d is {d}; 2 m and d must be {piece_maps.WIDTH}"
    if hopper_stages.pieces(call.values) == 1:
        return "rows are not cut in pieces"
    return None


@jax.custom_vjp
def read(queries: Array, keys: Array, values: Array, strength: Array) -> Array:
    """Outputs ``[b, t, h, d]`` of rows that begin from nothing.

    Args:
      queries, keys: features ``[b, t, h, 2 m]`` in the dtype of the values.
      values: ``[b, t, h, d]``, bfloat16 or float16.
      strength: float32 ``[b, t, h]``.
    """
    return _forward(queries, keys, values, strength)[0]


def _forward(*operands: Array) -> tuple[Array, Any]:
    x = hopper_stages.inputs(operands, None)
    inverse = hopper_stages.inverses(x)
    maps = piece_maps.transitions(x.keys, x.values, inverse, x.strength, pieces=x.pieces)
    starts = _in_rows(piece_states.before(maps))
    outputs = hopper_stages.outputs(x, inverse, starts)
    return outputs[:, : operands[0].shape[1]], (operands, inverse, maps, starts)


def _backward(saved: Any, cotangent: Array) -> tuple[Array, ...]:
    operands, inverse, maps, starts = saved
    x = hopper_stages.inputs(operands, None)
    cotangent = hopper_stages.padded(cotangent, x)
    terms = piece_maps.reverse_terms(x.queries, x.keys, cotangent, inverse, x.strength, pieces=x.pieces)
    ends = _in_rows(piece_states.after(maps, terms))
    return hopper_stages.gradients(x, operands, cotangent, inverse, starts, ends)


read.defvjp(_forward, _backward)


def _in_rows(by_piece: Array) -> Array:
    return by_piece.reshape(-1, *by_piece.shape[2:])
