"""The stages of the erase rule by kernels of jax-linear-attention, for rows that are cut in pieces.

States are held as the kernels hold them, transposed: ``[b pieces, h, d, k]`` float32.

Source: https://github.com/jla-org/jax-linear-attention (Apache-2.0), version 0.1.0,
``ops/mosaic_gpu/scalar_gate.py``.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from holo_jax.array_types import Array

CHUNK = 64


class Inputs(NamedTuple):
    """What every kernel is given: padded to whole chunks of whole pieces, vectors with heads first."""

    queries: Array
    keys: Array
    values: Array
    strength: Array
    decay: Array
    segments: Any
    pieces: int

    @property
    def vectors(self) -> tuple[Array, Array]:
        """Decays and strengths."""
        return self.decay, self.strength

    @property
    def places(self) -> dict[str, Any]:
        """Runs and pieces, by the kernels' names."""
        return dict(seg=self.segments, cp=self.pieces)


def pieces(values: Array) -> int:
    """Pieces that a row is cut into."""
    from jla.ops.mosaic_gpu import scalar_gate

    b, t, h, d = values.shape
    return int(scalar_gate.pieces(b, h, d, t, delta=True))


def inputs(operands: tuple[Array, ...], segment_ids: Array | None) -> Inputs:
    """Of queries, keys, values and strengths ``[b, t, h, ...]``."""
    from jla.ops.mosaic_gpu._common import chunk_log2_decay, head_major, pad_time, segment_vectors

    queries, keys, values, strength = operands
    b, t, h, _ = values.shape
    cut = pieces(values)
    pad = -t % (CHUNK * cut)
    segments = None if segment_ids is None else segment_vectors(segment_ids, pad)
    return Inputs(
        queries=pad_time(queries, pad),
        keys=pad_time(keys, pad),
        values=pad_time(values, pad),
        strength=head_major(strength, pad),
        decay=chunk_log2_decay(None, b, t, h, pad),
        segments=segments,
        pieces=cut,
    )


def padded(cotangent: Array, x: Inputs) -> Array:
    """The gradient of outputs as the kernels are given it."""
    pad = x.queries.shape[1] - cotangent.shape[1]
    return jnp.pad(cotangent.astype(x.queries.dtype), ((0, 0), (0, pad), (0, 0), (0, 0)))


def heads_first(numbers: Array, x: Inputs) -> Array:
    """``[b, t, h]`` as the kernels are given it, float32."""
    from jla.ops.mosaic_gpu._common import head_major

    return head_major(numbers, x.queries.shape[1] - numbers.shape[1])


def scaled(values: Array, factors: Array) -> Array:
    """Values times a float32 factor a head, in their dtype."""
    return (values.astype(jnp.float32) * factors[..., None]).astype(values.dtype)


def inverses(x: Inputs) -> Array:
    """Of every chunk, ``[b, h, t, 64]``."""
    from jla.ops.mosaic_gpu import gated_delta_rule_kernels

    return gated_delta_rule_kernels.kkt_fwd(x.keys, x.strength, seg=x.segments, interpret=None)


def maps(x: Inputs, inverse: Array) -> Array:
    """``[A^T; B^T]`` of every piece of packed rows but a row's last, walked from its last segment on.

    ``[b, pieces - 1, h, k + d, k]`` float32; transitions of a row's first piece are left out (0).
    """
    from jla.ops.mosaic_gpu import scalar_gate_docs

    found = scalar_gate_docs.map_fwd_wy(
        x.keys, x.values, inverse, *x.vectors, **x.places, need_last=False, need_first=False
    )
    return found.reshape(-1, x.pieces, *found.shape[1:])[:, :-1]


def reverse_terms(x: Inputs, cotangent: Array, inverse: Array) -> Array:
    """Gradient of the state before every piece of packed rows but a row's first, from nothing behind it."""
    from jla.ops.mosaic_gpu import scalar_gate_docs

    found = scalar_gate_docs.map_bwd_wy(
        x.queries, x.keys, cotangent, inverse, *x.vectors, **x.places, scale=1.0
    )
    return found.reshape(-1, x.pieces, *found.shape[1:])[:, 1:]


def outputs(x: Inputs, inverse: Array, starts: Array | None) -> Array:
    """``[b, padded t, h, d]`` from the states before pieces; None is nothing."""
    from jla.ops.mosaic_gpu import scalar_gate_fused

    found, _ = scalar_gate_fused.fused_fwd_wy(
        x.queries,
        x.keys,
        x.values,
        inverse,
        *x.vectors,
        starts,
        scale=1.0,
        out_final=False,
        out_dtype=x.queries.dtype,
        **x.places,
    )
    return found


def states(x: Inputs, inverse: Array, starts: Array | None) -> Array:
    """States before chunks, ``[b, h, chunks, d, k]``, from those before pieces."""
    from jla.ops.mosaic_gpu import gated_delta_rule_bwd as backward

    found, _ = backward.state_fwd_wy(x.keys, x.values, inverse, *x.vectors, starts, **x.places)
    return found


def reverse(x: Inputs, cotangent: Array, inverse: Array, ends: Array | None) -> tuple[Array, Array]:
    """(gradients of the states after chunks, and of the values), from those of the states after pieces."""
    from jla.ops.mosaic_gpu import gated_delta_rule_bwd as backward

    of_states, of_values, _ = backward.state_bwd_wy(
        x.queries,
        x.keys,
        cotangent,
        inverse,
        *x.vectors,
        ends,
        scale=1.0,
        want_dh0=False,
        **x.places,
    )
    return of_states, of_values


def gradients(
    x: Inputs, operands: tuple[Array, ...], cotangent: Array, inverse: Array, starts: Array, ends: Array
) -> tuple[Array, ...]:
    """Of the operands, from the padded gradient of outputs, states before pieces, gradients of later ones."""
    from jla.ops.mosaic_gpu import gated_delta_rule_bwd as backward

    of_states, of_values = reverse(x, cotangent, inverse, ends)
    of_queries, of_keys, of_strength, _ = backward.chunk_grads(
        x.queries,
        x.keys,
        x.values,
        cotangent,
        inverse,
        *x.vectors,
        states(x, inverse, starts),
        of_states,
        scale=1.0,
        seg=x.segments,
    )
    found = (of_queries, of_keys, of_values, jnp.swapaxes(of_strength, 1, 2))
    time = operands[0].shape[1]
    return tuple(g[:, :time].astype(o.dtype) for g, o in zip(found, operands, strict=True))
