"""Causal softmax attention with rotary positions: the exact, growing memory to compare with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from holo_jax.array_types import Array, Float, Int, UInt32
from holo_jax.config import HoloConfig
from holo_jax.functional import phases_at, rope_frequencies
from holo_jax.layers import Linear, parameter, project, residual_std
from holo_jax.mixers.attention_shapes import attention_shapes
from holo_jax.mixers.context import Context
from holo_jax.parallel import SEQ, ambient_mesh, layout, sequence_axis, sharded
from holo_jax.sequence import next_tail, of_last_device, short_convolution, tail_before, with_tail
from holo_jax.target import platform, told

_FLASH_MULTIPLE = 64


class AttentionState(NamedTuple):
    """A preallocated cache of S slots a row; with a sliding window the slots are reused in a ring.

    Without a window the cache can be full. ``index > S`` then says so, and what is read from it is NaN:
    callers that can raise do it before (``holo_jax.generate``).

    Attributes:
      keys: rotated keys [b, S, h, d].
      values: values [b, S, h, d].
      segment_ids: document of each slot [b, S].
      times: how many tokens the row had before the one in this slot [b, S], -1 while empty.
      index: tokens of each row so far [b]; padding does not count.
      tail: the last keys before their convolution, [b, k, h * d], which it still needs, or None.
    """

    keys: Float[Array, "b s h d"]
    values: Float[Array, "b s h d"]
    segment_ids: Int[Array, "b s"]
    times: Int[Array, "b s"]
    index: Int[Array, "b"]  # type: ignore[assignment]  # tuple.index is not used
    tail: Float[Array, "b k f"] | None = None


class AttentionMixer(nnx.Module):
    """softmax(q k^T / sqrt(d)) v over earlier tokens of the same segment, RoPE on q and k.

    With ``key_conv`` a key is a learned mixture of the last few tokens' keys, so that one layer can find what
    followed an earlier occurrence of a token (Olsson et al. 2022, "smeared" keys).
    """

    def __init__(self, config: HoloConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        e, hd = config.hidden_size, config.hd_dim
        self.queries = Linear(config, (e, hd), ("embed", "heads"), rngs=rngs)
        self.keys = Linear(config, (e, hd), ("embed", "heads"), rngs=rngs)
        self.values = Linear(config, (e, hd), ("embed", "heads"), rngs=rngs)
        self.out = Linear(config, (hd, e), ("heads", "embed"), std=residual_std(config, hd), rngs=rngs)
        if config.key_conv:
            taps = jnp.zeros((config.key_conv, hd), jnp.dtype(config.precision.params))
            self.key_taps = parameter(taps.at[-2:].set(0.5), (None, "heads"))

    @property
    def maps(self) -> dict[str, str | None]:
        """Linear maps of the input, and their result dtypes (None is the storage dtype)."""
        return {"queries": None, "keys": None, "values": None}

    @staticmethod
    def init_state(config: HoloConfig, batch: int, cache_length: int) -> AttentionState:
        """An empty cache of ``cache_length`` slots (of the window, if that is shorter)."""
        slots = min(cache_length, config.attention_window) if config.attention_window else cache_length
        shape = (batch, slots, config.num_heads, config.head_dim)
        dtype = jnp.dtype(config.precision.storage)
        return AttentionState(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            segment_ids=jnp.zeros((batch, slots), jnp.int32),
            times=jnp.full((batch, slots), -1, jnp.int32),
            index=jnp.zeros((batch,), jnp.int32),
            tail=jnp.zeros((batch, config.key_conv - 1, config.hd_dim), dtype) if config.key_conv else None,
        )

    def __call__(
        self,
        x: Float[Array, "b t e"],
        context: Context,
        turns: UInt32[Array, "h m"] | None,
        state: AttentionState | None,
    ) -> tuple[Float[Array, "b t e"], AttentionState | None]:
        """Mixes tokens; the phasors of ``turns`` are not used (rotary ones are)."""
        return self.of_maps(project(self, x, self.maps), context, turns, state)

    def of_maps(
        self,
        maps: dict[str, Array],
        context: Context,
        turns: UInt32[Array, "h m"] | None,
        state: AttentionState | None,
    ) -> tuple[Float[Array, "b t e"], AttentionState | None]:
        """The same from the maps of the input."""
        del turns
        config = self.config
        b, t, _ = maps["queries"].shape
        shape = (b, t, config.num_heads, config.head_dim)
        angles = phases_at(jnp.asarray(rotary_turns(config)), context.inside)[:, :, None]
        keys, tail = maps["keys"], None
        if config.key_conv:
            tail_layout = None if state is None else layout("b _ h")
            smear = sharded(
                self._smear,
                (layout("_ h"), layout("b t h"), context.layout, tail_layout),
                (layout("b t h"), tail_layout),
            )
            keys, tail = smear(self.key_taps[...], keys, context, None if state is None else state.tail)
        queries = _rotate(maps["queries"].reshape(shape), angles)
        keys = _rotate(keys.reshape(shape), angles)
        values = maps["values"].reshape(shape)
        if state is None:
            rows = layout("b t h")
            attend = sharded(self._attend_all, (rows, rows, rows, layout("b t")), rows)
            mixed = attend(queries, keys, values, context.segment_ids)
        else:
            mesh = ambient_mesh()
            if mesh is not None and mesh.shape[SEQ] > 1:
                raise ValueError(
                    f"seq is {mesh.shape[SEQ]}; attention with a state needs a mesh with seq = 1"
                )
            mixed, state = self._attend_cached(queries, keys, values, context, state)
            state = state._replace(tail=tail)
        return self.out(mixed.reshape(b, t, config.hd_dim)), state

    def _smear(
        self, taps: Array, keys: Array, context: Context, tail: Array | None
    ) -> tuple[Array, Array | None]:
        """Convolved keys and, with a state, the raw keys that the next call needs."""
        size = taps.shape[0] - 1
        past = with_tail(keys, size, tail_before(keys, size, tail), context.padding)
        smeared = short_convolution(past, taps.astype(keys.dtype), context.inside)
        return smeared, None if tail is None else of_last_device(next_tail(past, size, context.inside))

    def _attend_all(self, queries: Array, keys: Array, values: Array, segment_ids: Array | None) -> Array:
        window = self.config.attention_window
        axis = sequence_axis()
        if axis is not None:
            return _attend_parts(axis, queries, keys, values, segment_ids, window)
        mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        # cuDNN adds a mask to scores: b t t numbers in the storage dtype. With a window too it is unchecked.
        flash = (
            platform() == "gpu"
            and (mask is None or not window)
            and queries.dtype in (jnp.bfloat16, jnp.float16)
            and queries.shape[1] % _FLASH_MULTIPLE == 0
        )
        if flash and told() is not None:
            bias = None if mask is None else jnp.where(mask, 0, -jnp.inf).astype(queries.dtype)
            return attention_shapes(queries, keys, values, bias)
        return jax.nn.dot_product_attention(
            queries,
            keys,
            values,
            mask=mask,
            is_causal=True,
            local_window_size=(window - 1, 0) if window else None,
            implementation="cudnn" if flash else "xla",
        )

    def _attend_cached(
        self, queries: Array, keys: Array, values: Array, context: Context, state: AttentionState
    ) -> tuple[Array, AttentionState]:
        b, t = queries.shape[:2]
        window, segment_ids, real = self.config.attention_window, context.segment_ids, context.real
        if segment_ids is None:
            assert context.segment is not None
            segment_ids = jnp.broadcast_to(context.segment[:, None], (b, t))
        times = state.index[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        if context.padding is not None:
            times = times - context.padding[:, None]
        after = _append(state, keys, values, segment_ids, times, real, ring=window > 0)
        if window:
            # A ring may overwrite what new tokens still see: they attend to the old slots and themselves.
            own_times = times if real is None else jnp.where(real, times, -1)
            seen_keys = jnp.concatenate([state.keys, keys], axis=1)
            seen_values = jnp.concatenate([state.values, values], axis=1)
            seen_times = jnp.concatenate([state.times, own_times], axis=1)
            seen_segments = jnp.concatenate([state.segment_ids, segment_ids], axis=1)
        else:
            seen_keys, seen_values, seen_segments, seen_times = after[:4]
        visible = (seen_times[:, None] >= 0) & (seen_times[:, None] <= times[..., None])
        visible = visible & (segment_ids[..., None] == seen_segments[:, None])
        if window:
            visible = visible & (times[..., None] - seen_times[:, None] < window)
        mixed = jax.nn.dot_product_attention(
            queries, seen_keys, seen_values, mask=visible[:, None], implementation="xla"
        )
        if not window:
            overfull = after.index > state.times.shape[1]
            mixed = jnp.where(overfull[:, None, None, None], jnp.nan, mixed)
        return mixed, after


def _attend_parts(
    axis: str, queries: Array, keys: Array, values: Array, segment_ids: Array | None, window: int
) -> Array:
    """Attention of a device's part of the queries to the keys and values of all parts, which are gathered."""
    b, t = queries.shape[:2]
    keys, values = (lax.all_gather(x, axis, axis=1, tiled=True) for x in (keys, values))
    own = lax.axis_index(axis) * t + jnp.arange(t, dtype=jnp.int32)
    age = own[:, None] - jnp.arange(keys.shape[1], dtype=jnp.int32)[None]
    visible = (age >= 0) & (age < window) if window else age >= 0
    visible = jnp.broadcast_to(visible[None], (b, *age.shape))
    if segment_ids is not None:
        every = lax.all_gather(segment_ids, axis, axis=1, tiled=True)
        visible = visible & (segment_ids[:, :, None] == every[:, None])
    return jax.nn.dot_product_attention(queries, keys, values, mask=visible[:, None], implementation="xla")


def _append(
    state: AttentionState,
    keys: Array,
    values: Array,
    segment_ids: Array,
    times: Array,
    real: Array | None,
    *,
    ring: bool,
) -> AttentionState:
    """The state after tokens of these times; padding, and what a cache without a ring has no slot for, is not
    written.

    Tokens of consecutive times have slots of their own modulo their number. So every token writes inside the
    cache, one that is not kept what its slot held, and no two of them write to one slot: where deterministic
    operations are asked for, XLA gives a scatter that may repeat an index or leave the operand a form of its
    own, whose results on a GPU were wrong.
    """
    (b, t), slots = times.shape, state.times.shape[1]
    kept = min(t, slots)
    last = times[:, t - kept :]
    written = jnp.ones_like(last, dtype=bool) if real is None else real[:, t - kept :]
    if not ring:
        written = written & (last < slots)
    rows, where = jnp.arange(b)[:, None], last % slots

    def put(cache: Array, new: Array) -> Array:
        at = cache.at[rows, where]
        old = at.get(mode="promise_in_bounds")
        new = jnp.where(written.reshape(*written.shape, *[1] * (new.ndim - 2)), new[:, t - kept :], old)
        return at.set(new, mode="promise_in_bounds", unique_indices=True)

    return AttentionState(
        keys=put(state.keys, keys),
        values=put(state.values, values),
        segment_ids=put(state.segment_ids, segment_ids),
        times=put(state.times, times),
        index=times[:, -1] + 1,
    )


def rotary_turns(config: HoloConfig) -> np.ndarray:
    """Rotary frequencies in uint32 turns a token, so that angles stay exact at any position."""
    # Constants of the program, also where a caller forbids transfers while it traces a step.
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        frequencies = np.asarray(rope_frequencies(config.head_dim // 2, config.rope_base), np.float64)
    return np.round(frequencies / (2 * np.pi) * 2**32).astype(np.uint64).astype(np.uint32)


def _rotate(x: Float[Array, "b t h d"], angles: Float[Array, "b t 1 p"]) -> Float[Array, "b t h d"]:
    first, second = jnp.split(x.astype(angles.dtype), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
