"""The next token of each row from its scores, and all small numbers after it, by one kernel (Pallas, Triton).

It does what ``Counts.after`` does, and looks the token up, so that one launch stands between the head's
product and the first layer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array, Float, Int
from holo_jax.kernels.decode.scores import Scores
from holo_jax.kernels.instructions import released

# Rows of the array of small numbers, before the tokens of the group.
ROWS = ("before", "active", "position", "launch", "token", "remaining", "limit", "finite")
_NO_ID = 2**31 - 1
_WARPS = 8


def choose(
    scores: Scores,
    numbers: Int[Array, "n b"],
    stop_tokens: Int[Array, " s"],
    embedding: Float[Array, "v e"],
    *,
    divisor: float | None,
    interpret: bool = False,
) -> tuple[Int[Array, "n b"], Array]:
    """What is read next, and the small numbers then.

    Args:
      scores: of the logits after the token that was read.
      numbers: before that token; rows as of ``ROWS``, then the group's tokens.
      stop_tokens: ids that end a row.
      embedding: in the storage dtype.
      divisor: of its rows, or None for 1.
      interpret: run in Pallas' interpreter, anywhere.

    Returns:
      ``numbers`` after the token, and the embedding of the next one (of id 0 for rows that read none), ``[b,
      e]``, in the storage dtype.
    """
    (length, rows), programs = numbers.shape, scores.best.shape[1]
    width, stops = embedding.shape[1], stop_tokens.shape[0]

    def kernel(*refs: Any) -> None:
        _program(refs, (length, programs, width, stops), divisor, interpret)

    return pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct(numbers.shape, jnp.int32),
            jax.ShapeDtypeStruct((rows, width), embedding.dtype),
        ),
        grid=(rows,),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="decode_choose",
    )(scores.best, scores.at, numbers, stop_tokens, embedding)


def _iota(length: int) -> Array:
    return jax.lax.iota(jnp.int32, 1 << max(0, length - 1).bit_length())


def _program(refs: Any, sizes: tuple[int, ...], divisor: float | None, interpret: bool) -> None:
    """One row."""
    best, at, numbers, stop_tokens, embedding, after, out = refs
    length, programs, width, stops = sizes
    row = pl.program_id(0)
    found = _iota(programs)
    here = (jnp.full_like(found, row), found)
    own: Any = plgpu.load(best.at[here], mask=found < programs, other=-jnp.inf)
    own = released(own, not interpret)
    ids: Any = plgpu.load(at.at[here], mask=found < programs, other=_NO_ID)
    now = {name: plgpu.load(numbers.at[row * 0 + n, row]) for n, name in enumerate(ROWS)}
    places = _iota(length)
    kept: Any = plgpu.load(numbers.at[places, jnp.full_like(places, row)], mask=places < length, other=0)
    ends = _iota(stops)
    stop: Any = plgpu.load(stop_tokens.at[ends], mask=ends < stops, other=-1)

    finite = jnp.min(jnp.where(own == own, 1, 0), axis=0)
    own = jnp.where(own == own, own, -jnp.inf)
    highest = jnp.max(own, axis=0)
    # If no logit was a number there is none, and what is looked up has to exist.
    token = jnp.minimum(jnp.min(jnp.where(own == highest, ids, _NO_ID), axis=0), embedding.shape[0] - 1)

    active = now["active"] != 0
    stopped = jnp.max(jnp.where(stop == now["token"], 1, 0), axis=0) != 0
    remaining = jnp.where(active, jnp.where(stopped, 0, now["remaining"] - 1), now["remaining"])
    before = now["before"] + 1
    reads = (remaining > 0) & (before < now["limit"])
    then = {
        "before": before,
        "active": reads.astype(jnp.int32),
        "position": now["position"] + now["active"],
        "launch": now["launch"] + 1,
        "token": token,
        "remaining": remaining,
        "limit": now["limit"],
        "finite": now["finite"] & finite,
    }
    # The token that was read has its place among the group's.
    result = jnp.where(active & (places == len(ROWS) + now["before"]), now["token"], kept)
    for n, name in enumerate(ROWS):
        result = jnp.where(places == n, then[name], result)
    plgpu.store(after.at[places, jnp.full_like(places, row)], result, mask=places < length)

    columns = _iota(width)
    looked_up = jnp.full_like(columns, jnp.where(reads, token, 0))
    x: Any = plgpu.load(embedding.at[looked_up, columns], mask=columns < width, other=0.0)
    if divisor is not None:
        by = jnp.asarray(divisor, x.dtype).astype(jnp.float32)
        x = (x.astype(jnp.float32) / by).astype(x.dtype)
    plgpu.store(out.at[jnp.full_like(columns, row), columns], x, mask=columns < width)
