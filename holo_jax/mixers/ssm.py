"""A Mamba-2-style state-space baseline: scalar decay a head, one key and query for all heads."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from holo_jax.array_types import Array, Float, UInt32
from holo_jax.config import HoloConfig
from holo_jax.functional import decayed_accumulate, decayed_parts
from holo_jax.layers import Linear, Normalization, parameter, project, residual_std
from holo_jax.mixers.context import Context, keep_rows
from holo_jax.parallel import layout, sequence_axis, sharded
from holo_jax.sequence import next_tail, of_last_device, short_convolution, tail_before, with_tail

_STEP_MIN, _STEP_MAX = 1e-3, 1e-1
_TAPS = 4


class SsmState(NamedTuple):
    """State of one layer: inputs the convolution still needs, and the memory [b, h, n, d]."""

    tail: Float[Array, "b k f"]
    memory: Float[Array, "b h n d"]


class SsmMixer(nnx.Module):
    """S_t = exp(-A dt_t) S_{t-1} + k_t (dt_t v_t)^T, y_t = q_t^T S_t + D v_t (Dao and Gu, 2024).

    Values, keys and queries pass a short convolution and silu; dt_t = softplus(w.x + b) a head with
    steps of 1e-3 to 1e-1 at initialisation, A from 1 to 16; gated RMSNorm before the output map.
    """

    def __init__(self, config: HoloConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        e, h, hd, n = config.hidden_size, config.num_heads, config.hd_dim, config.ssm_state
        dtype = jnp.dtype(config.precision.params)
        self.values = Linear(config, (e, hd), ("embed", "heads"), rngs=rngs)
        self.keys = Linear(config, (e, 2 * n), ("embed", None), rngs=rngs)
        self.step = Linear(config, (e, h), ("embed", "heads"), rngs=rngs)
        self.gate = Linear(config, (e, hd), ("embed", "heads"), rngs=rngs)
        self.out = Linear(config, (hd, e), ("heads", "embed"), std=residual_std(config, hd), rngs=rngs)
        taps = jax.random.uniform(rngs.params(), (_TAPS, hd + 2 * n), dtype, -0.5, 0.5)
        self.taps = parameter(taps, (None, "heads"))
        steps = jnp.exp(
            jax.random.uniform(rngs.params(), (h,), dtype, math.log(_STEP_MIN), math.log(_STEP_MAX))
        )
        self.step_bias = parameter(steps + jnp.log(-jnp.expm1(-steps)), ("heads",))
        self.log_rate = parameter(
            jnp.log(jax.random.uniform(rngs.params(), (h,), dtype, 1.0, 16.0)), ("heads",)
        )
        self.skip = parameter(jnp.ones((h,), dtype), ("heads",))
        self.norm = Normalization(config, (hd,), ("heads",), kind="rmsnorm")

    @property
    def maps(self) -> dict[str, str | None]:
        """Linear maps of the input, and their result dtypes (None is the storage dtype)."""
        return {"values": None, "keys": None, "step": "float32", "gate": "float32"}

    @staticmethod
    def init_state(config: HoloConfig, batch: int, cache_length: int) -> SsmState:
        """The empty state of one layer."""
        del cache_length
        h, n, d = config.num_heads, config.ssm_state, config.head_dim
        return SsmState(
            tail=jnp.zeros((batch, _TAPS - 1, config.hd_dim + 2 * n), jnp.float32),
            memory=jnp.zeros((batch, h, n, d), jnp.dtype(config.precision.memory)),
        )

    def __call__(
        self,
        x: Float[Array, "b t e"],
        context: Context,
        turns: UInt32[Array, "h m"] | None,
        state: SsmState | None,
    ) -> tuple[Float[Array, "b t e"], SsmState | None]:
        """Mixes tokens; positions are not used."""
        return self.of_maps(project(self, x, self.maps), context, turns, state)

    def of_maps(
        self,
        maps: dict[str, Array],
        context: Context,
        turns: UInt32[Array, "h m"] | None,
        state: SsmState | None,
    ) -> tuple[Float[Array, "b t e"], SsmState | None]:
        """The same from the maps of the input."""
        del turns
        maps = dict(maps)
        gate = maps.pop("gate")
        b, t, hd = maps["values"].shape
        # Values are divided by heads and the shared keys are not, so what holds both is taken apart.
        taps = self.taps[...].astype(jnp.float32)
        weights = (taps[:, :hd], taps[:, hd:], self.step_bias[...], self.log_rate[...], self.skip[...])
        held = None if state is None else (state.tail[..., :hd], state.tail[..., hd:], state.memory)
        heads, shared = layout("b t h"), layout("b t _")
        held_layout = None if state is None else (layout("b _ h"), layout("b _ _"), layout("b h"))
        mix_tokens = sharded(
            self._mix_tokens,
            (
                (layout("_ h"), layout("_ _"), layout("h"), layout("h"), layout("h")),
                {"values": heads, "keys": shared, "step": heads},
                context.layout,
                held_layout,
            ),
            (heads, held_layout),
        )
        y, held = mix_tokens(weights, maps, context, held)
        y = self.norm(y.reshape(b, t, hd) * jax.nn.silu(gate))
        if held is None:
            return self.out(y), None
        return self.out(y), SsmState(jnp.concatenate(held[:2], axis=-1), held[2])

    def _mix_tokens(
        self,
        weights: tuple[Array, ...],
        maps: dict[str, Array],
        context: Context,
        held: tuple[Array, Array, Array] | None,
    ) -> tuple[Array, tuple[Array, Array, Array] | None]:
        """From the maps of the input to what is read ``[b, t, h, d]``; of any of its heads."""
        config = self.config
        value_taps, key_taps, step_bias, log_rate, skip = weights
        b, t, width = maps["values"].shape
        n, d = config.ssm_state, config.head_dim
        h = width // d
        raw = jnp.concatenate([maps["values"], maps["keys"]], axis=-1).astype(jnp.float32)
        tail = None if held is None else jnp.concatenate(held[:2], axis=-1)
        past = with_tail(raw, _TAPS - 1, tail_before(raw, _TAPS - 1, tail), context.padding)
        taps = jnp.concatenate([value_taps, key_taps], axis=-1)
        mixed = jax.nn.silu(short_convolution(past, taps, context.inside))
        mixed = mixed.astype(config.precision.storage)
        values = mixed[..., :width].reshape(b, t, h, d)
        keys = jnp.broadcast_to(mixed[..., None, width : width + n], (b, t, h, n))
        queries = jnp.broadcast_to(mixed[..., None, width + n :], (b, t, h, n))
        step = jax.nn.softplus(maps["step"] + step_bias[None, None])
        if context.real is not None:
            step = jnp.where(context.real[..., None], step, 0.0)
        log_decay = -jnp.exp(log_rate)[None, None] * step
        memory = None if held is None else keep_rows(held[2], context.continues)
        axis = sequence_axis()
        accumulate = decayed_accumulate if axis is None else partial(decayed_parts, axis)
        y, memory = accumulate(
            keys,
            queries,
            values * step[..., None].astype(values.dtype),
            log_decay,
            segment_ids=context.segment_ids,
            initial_state=memory,
            method="recurrent" if t == 1 else "chunked",
            chunk_size=config.chunk_size or None,
        )
        y = y + skip[None, None, :, None] * values.astype(y.dtype)
        if held is None:
            return y, None
        tail = of_last_device(next_tail(past, _TAPS - 1, context.inside))
        return y, (tail[..., :width], tail[..., width:], memory)
