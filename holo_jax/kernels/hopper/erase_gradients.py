"""Gradients of the erase rule inside chunks, from the states between them (Pallas, Mosaic GPU).

Of 64 positions with features ``k`` of keys and ``q`` of queries, values ``v``, write gates ``g`` and erase
gates ``e``, let ``S`` be the state before the chunk, ``D`` the gradient of the state after it, ``r`` that of
its outputs, ``L_ij = k_i . k_j`` for ``j < i``, ``P_ij = q_i . k_j`` for ``j <= i`` and
``T = (1 + diag(e) L)^-1``. What is written is ``U = T (g v - e k S)``; the keys read ``R = k S + L U`` first.
With ``dU = P^T r + k D`` and ``X = T^T dU``, the gradient of what was to be written,

    d_v = g X,    d_g = X . v,    d_e = -X . R,    d_q = r S^T + tril(r U^T) k,
    d_k = triu(U r^T) q + U D^T - (e X) S^T - (N + N^T) k,    N = diag(e) stril(X U^T).

So the gradient of an erase gate is one product, not the difference of two. A warpgroup takes a chunk of a
head; three share a multiprocessor and hide one another's copies.

Source of the rule: https://arxiv.org/abs/2406.06484; the gradients are our own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.array_types import Array, Float
from holo_jax.kernels import mosaic
from holo_jax.kernels.hopper.chunk_tiles import CHUNK, WIDTH, Products, along, indices, load, tile, vector

_LEAST = 2.0**-126
# Warpgroups of a program, each with a chunk of its own: as many as registers and shared memory allow.
_GROUPS = 3
_LATE = ("queries", "cotangent", "of_states")


class Runs(NamedTuple):
    """Of packed rows, float32 ``[b, t]``: a position's run in its chunk; 1 if it entered the chunk, else 0;
    1 if it leaves it.
    """

    number: Array
    enters: Array
    leaves: Array


class Gradients(NamedTuple):
    """Of queries, keys and values ``[b, t, h, 64]``, of write and erase gates float32 ``[b, h, t]``."""

    queries: Array
    keys: Array
    values: Array
    gates: Array
    erase: Array


def gradients(
    queries: Float[Array, "b t h k"],
    keys: Float[Array, "b t h k"],
    values: Float[Array, "b t h d"],
    gates: Float[Array, "b h t"],
    erase: Float[Array, "b h t"],
    *,
    scaled: bool,
    cotangent: Float[Array, "b t h d"],
    inverse: Float[Array, "b h t c"],
    states: Float[Array, "b h n d k"],
    of_states: Float[Array, "b h n d k"],
    runs: Runs | None = None,
    programs: int = 132,
    interpret: Any = None,
) -> Gradients:
    """See the module.

    Args:
      queries, keys: bfloat16 or float16, ``k = d = 64``, t a multiple of 64.
      values: v in their dtype, or ``g v / e``.
      gates, erase: float32, positive.
      scaled: whether values are the latter. Gradients are those of v and g in either case.
      cotangent: r, in their dtype.
      inverse: T of every chunk, in their dtype, ``c = 64``.
      states, of_states: S and D of every chunk, transposed, in their dtype.
      runs: where rows are packed.
      programs: of three warpgroups each, one a multiprocessor.
      interpret: parameters of Pallas' interpreter, or None.
    """
    plgpu = mosaic.pallas()
    b, t, h, _ = keys.shape
    dtype = keys.dtype
    early = dict(keys=keys, states=states, values=values, inverse=inverse, gates=gates, erase=erase)
    if runs is not None:
        early |= dict(rows=runs.number, columns=runs.number, enters=runs.enters, leaves=runs.leaves)
    late = dict(queries=queries, cotangent=cotangent, of_states=of_states)
    given = early | late
    rooms = {n: vector(_GROUPS) if x.ndim < 4 else tile(dtype, _GROUPS) for n, x in given.items()}
    rooms |= {n: tile(dtype, _GROUPS) for n in ("written", "d_written")}
    rooms |= {n: vector(_GROUPS) for n in ("d_gates", "d_erase")}
    wide = jax.ShapeDtypeStruct((b, t, h, WIDTH), dtype)
    narrow = jax.ShapeDtypeStruct((b, h, t), jnp.float32)
    barriers = dict(
        early=plgpu.Barrier(num_arrivals=len(early), num_barriers=_GROUPS),
        late=plgpu.Barrier(num_arrivals=len(late), num_barriers=_GROUPS),
        done=plgpu.Barrier(num_arrivals=_GROUPS),
    )
    count = b * (t // CHUNK) * h
    programs = min(programs, -(-count // _GROUPS))
    stride = programs * _GROUPS

    def run(*refs: Any, early: Any, late: Any, done: Any, **held: Any) -> None:
        group = jax.lax.axis_index("group")
        first = jax.lax.axis_index("program") * _GROUPS + group
        own = {n: ref.at[group] for n, ref in held.items()}
        come = early.at[group], late.at[group]
        product = Products(interpret is not None)

        def ask(index: Array) -> None:
            place = _Place(index, t // CHUNK, h)
            for name, ref in zip(given, refs[: len(given)], strict=True):
                plgpu.copy_gmem_to_smem(place.of(name, ref), own[name], come[name in _LATE])

        @pl.when(first < count)
        def _begin() -> None:
            ask(first)

        @pl.loop(0, jax.lax.div(jnp.maximum(count - first + stride - 1, 0), stride))
        def _every(n: Array) -> None:
            index = first + n * stride
            place = _Place(index, t // CHUNK, h)
            arrays = {
                n: place.of(n, ref) for n, ref in zip(Gradients._fields, refs[len(given) :], strict=True)
            }
            plgpu.barrier_wait(come[0])
            # 0, but not to the compiler, which would hold addresses and masks in registers over all chunks.
            none = jnp.where(own["erase"][0] < 0, 1, 0)
            rooms = {n: ref.at[group + none] for n, ref in held.items()}
            _chunk(rooms, Gradients(**arrays), product, dtype, come[1], none, scaled)

            @pl.when(index + stride < count)
            def _next() -> None:
                ask(index + stride)

        # No warpgroup leaves while another multiplies.
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    found = plgpu.kernel(
        run,
        out_type=(wide, wide, wide, narrow, narrow),
        scratch_types=rooms | barriers,
        grid=(programs,),
        grid_names=("program",),
        num_threads=_GROUPS,
        thread_name="group",
        interpret=interpret,
        kernel_name="erase_gradients",
    )(*given.values())
    return Gradients(*found)


class _Place:
    """Which chunk of which row and head is a warpgroup's own."""

    def __init__(self, index: Array, chunks: int, heads: int) -> None:
        index, self._head = jax.lax.div(index, heads), jax.lax.rem(index, heads)
        self._row, self._chunk = jax.lax.div(index, chunks), jax.lax.rem(index, chunks)

    def of(self, name: str, ref: Any) -> Any:
        """That chunk of an array."""
        positions = pl.ds(self._chunk * CHUNK, CHUNK)
        if name in ("states", "of_states"):
            return ref.at[self._row, self._head, self._chunk]
        if len(ref.shape) == 2:
            return ref.at[self._row, positions]
        if len(ref.shape) == 3 or name == "inverse":
            return ref.at[self._row, self._head, positions]
        return ref.at[self._row, positions, self._head]


def _chunk(
    held: dict[str, Any], outs: Gradients, product: Products, dtype: Any, late: Any, none: Array, scaled: bool
) -> None:
    """One chunk of a head, from what its copies bring to what they take."""
    plgpu = mosaic.pallas()
    packed = "rows" in held
    keys, queries, cotangent, written = (held[n] for n in ("keys", "queries", "cotangent", "written"))
    states, of_states, values, inverse = (held[n] for n in ("states", "of_states", "values", "inverse"))

    def rows(name: str) -> Array:
        return along(held[name], 0)

    def masked(x: Array, *, before: bool, own: bool = False) -> Array:
        """x where the row's position is before the column's, or behind it, and of one run with it."""
        first, last = indices(0) + none, indices(1)
        first, last = (last, first) if before else (first, last)
        kept = first >= last if own else first > last
        if packed:
            kept = kept & (rows("rows") == along(held["columns"], 1))
        return jnp.where(kept, x, 0.0)

    def store(ref: Any, x: Array) -> None:
        """After everyone has read what stood there."""
        plgpu.commit_smem()
        ref[...] = x.astype(dtype)

    # What is written, and what keys read before it is.
    read, overlaps = product.apart((keys, states.T), (keys, keys.T))
    if packed:
        read = read * rows("enters")
    writing = load(values) * rows("erase" if scaled else "gates")
    written[...] = (writing - read * rows("erase")).astype(dtype)
    plgpu.commit_smem()
    made = product(inverse, written)
    store(written, made)
    plgpu.commit_smem()
    overlaps = masked(overlaps, before=False).astype(dtype)
    read = product.added(read, (overlaps, written))

    # What was to be written.
    plgpu.barrier_wait(late)
    scores, d_written = product.apart((keys, queries.T), (keys, of_states.T))
    if packed:
        d_written = d_written * rows("leaves")
    scores = masked(scores, before=True, own=True).astype(dtype)
    d_written = product.added(d_written, (scores, cotangent))
    held["d_written"][...] = d_written.astype(dtype)
    plgpu.commit_smem()
    d_written = product(inverse.T, held["d_written"])

    # Values and gates.
    held["d_erase"][...] = -jnp.sum(d_written * read, axis=1)
    d_gates = jnp.sum(d_written * load(values), axis=1)
    if scaled:
        gate, strength = (
            plgpu.load(held[n], layout=plgpu.Layout.WGMMA.reduce(1)) for n in ("gates", "erase")
        )
        d_gates = d_gates * strength / jnp.maximum(gate, _LEAST)
    held["d_gates"][...] = d_gates
    values[...] = (d_written * rows("gates")).astype(dtype)

    # Keys: those that read before they wrote, then those that were read by queries and wrote.
    erase = rows("erase")
    links = product(d_written.astype(dtype), written.T)
    links = (masked(links, before=False) * -erase).astype(dtype)
    reading = d_written * -erase
    if packed:
        reading = reading * rows("enters")
    reading = reading.astype(dtype)
    store(inverse, links)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values, outs.values)
    for room, out in (("d_gates", outs.gates), ("d_erase", outs.erase)):
        plgpu.copy_smem_to_gmem(held[room], out)
    scores, d_keys = product.apart((written, cotangent.T), (written, of_states))
    if packed:
        d_keys = d_keys * rows("leaves")
    scores = masked(scores, before=True, own=True).astype(dtype)
    pairs = ((reading, states), (links, keys), (inverse.T, keys), (scores, queries))
    store(of_states, product.added(d_keys, *pairs))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(of_states, outs.keys)

    # Queries.
    scores, d_queries = product.apart((cotangent, written.T), (cotangent, states))
    if packed:
        d_queries = d_queries * rows("enters")
    scores = masked(scores, before=False, own=True).astype(dtype)
    queries[...] = product.added(d_queries, (scores, keys)).astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(queries, outs.queries)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
