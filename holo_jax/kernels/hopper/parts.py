"""The erase rule on Hopper over a sequence divided along a mesh axis: each part by kernels, once.

The kernels of jax-linear-attention divide few long rows into pieces, find each piece's affine map of the
state before it, and compose those. A part of a divided sequence is such a row whose pieces do not begin from
nothing, so the maps that one device composes are here composed over all of them
(``holo_jax.functional.memory.chain``), and no pass over time is added to what one device does.

States are held as the kernels hold them, transposed: ``[b, pieces, h, d, k]`` float32.

Source: https://github.com/jla-org/jax-linear-attention (Apache-2.0), version 0.1.0,
``ops/mosaic_gpu/scalar_gate.py``.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from holo_jax.array_types import Array
from holo_jax.functional.memory.chain import Part, chain
from holo_jax.kernels.call import READ_NAME, Call
from holo_jax.kernels.hopper.backend import delta_operands, features
from holo_jax.kernels.hopper.stages import gradients, inputs, inverses, outputs, padded

_product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def accumulate(call: Call, axis: str, continues: Array, initial: Array) -> tuple[Array, Array, Array]:
    """Outputs of a part, the real state before it and that after the last part, for a call with ``erase``.

    Args:
      call: this part, as ``hopper.unsupported`` accepts it; its initial state is not read.
      axis: name of the mesh axis, inside ``jax.shard_map``.
      continues: whether each row goes on with the state of the part before, ``[b]``.
      initial: real state ``[b, h, 2 m, d]`` before the first part.
    """
    keys, queries = features(call)
    operands = (queries, keys, *delta_operands(call))
    found, before, after = chain(_PART, axis, operands, call.segment_ids, continues, initial)
    # Named while narrow, so that a rematerialised block keeps it instead of running the kernel twice.
    return checkpoint_name(found, READ_NAME).astype(jnp.float32), before, after


class _Saved(NamedTuple):
    operands: tuple[Array, ...]
    segment_ids: Array | None
    inverse: Array
    maps: Array
    starts: Array


def _map(operands: tuple[Array, ...], segment_ids: Array | None) -> tuple[Array, Array, tuple[Array, Array]]:
    """(A, B) of the part; found are the chunks' inverses and the pieces' maps ``[A^T; B^T]``."""
    from jla.ops.mosaic_gpu import scalar_gate_docs

    x = inputs(operands, segment_ids)
    inverse = inverses(x)
    maps = scalar_gate_docs.map_fwd_wy(
        x.keys, x.values, inverse, *x.vectors, **x.places, need_last=True, need_first=True
    )
    maps = _by_piece(maps, x.pieces)
    return *joined(maps), (inverse, maps)


def joined(maps: Array) -> tuple[Array, Array]:
    """(A, B) of pieces one after the other, each given as ``[A^T; B^T]``: ``[b, pieces, h, k + d, k]``."""
    k = maps.shape[-1]
    whole = maps[:, 0]
    for piece in range(1, maps.shape[1]):
        before = _product("bhdj,bhjk->bhdk", whole, maps[:, piece, :, :k])
        whole = before.at[..., k:, :].add(maps[:, piece, :, k:])
    whole = jnp.swapaxes(whole, -1, -2)
    return whole[..., :k], whole[..., k:]


def _read(
    operands: tuple[Array, ...], segment_ids: Array | None, found: tuple[Array, Array], state: Array
) -> tuple[Array, _Saved]:
    x = inputs(operands, segment_ids)
    inverse, maps = found
    starts = [jnp.swapaxes(state, -1, -2)]
    k = maps.shape[-1]
    for piece in range(x.pieces - 1):
        before = _product("bhdj,bhjk->bhdk", starts[-1], maps[:, piece, :, :k])
        starts.append(before + maps[:, piece, :, k:])
    stacked = _in_rows(starts)
    read = outputs(x, inverse, stacked)
    saved = _Saved(operands, segment_ids, inverse, maps, stacked)
    return read[:, : operands[0].shape[1]], saved


def _gradient(saved: _Saved, cotangent: Array) -> tuple[Array, Array]:
    """Gradient by the state before the part; found are those of each piece by its own start."""
    from jla.ops.mosaic_gpu import gated_delta_rule_bwd

    x = inputs(saved.operands, saved.segment_ids)
    _, _, local = gated_delta_rule_bwd.state_bwd_wy(
        x.queries,
        x.keys,
        padded(cotangent, x),
        saved.inverse,
        *x.vectors,
        None,
        scale=1.0,
        want_dh0=True,
        store_grads=False,
        **x.places,
    )
    local = _by_piece(local, x.pieces)
    gradient = local[:, -1]
    for piece in reversed(range(x.pieces - 1)):
        gradient = _before(gradient, saved.maps[:, piece]) + local[:, piece]
    return jnp.swapaxes(gradient, -1, -2), local


def _finish(saved: _Saved, local: Array, cotangent: Array, of_state: Array) -> tuple[Array, ...]:
    x = inputs(saved.operands, saved.segment_ids)
    cotangent = padded(cotangent, x)
    ends = [jnp.swapaxes(of_state, -1, -2)]
    for piece in reversed(range(1, x.pieces)):
        ends.append(_before(ends[-1], saved.maps[:, piece]) + local[:, piece])
    return gradients(x, saved.operands, cotangent, saved.inverse, saved.starts, _in_rows(ends[::-1]))


def _before(gradient: Array, maps: Array) -> Array:
    """``A^T`` of a piece times a gradient of the state after it."""
    return _product("bhdk,bhjk->bhdj", gradient, maps[:, :, : maps.shape[-1]])


def _by_piece(x: Array, pieces: int) -> Array:
    return x.reshape(-1, pieces, *x.shape[1:])


def _in_rows(of_pieces: list[Array]) -> Array:
    stacked = jnp.stack(of_pieces, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


_PART = Part(_map, _read, _gradient, _finish)
