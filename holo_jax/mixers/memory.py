"""The phasor memory as a module: phases, gates, accumulation, retrieval, output."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from holo_jax import kernels
from holo_jax.array_types import Array, Float, UInt32
from holo_jax.config import HoloConfig
from holo_jax.functional import (
    MemoryState,
    init_memory,
    phases_at,
    retrieval_scale,
)
from holo_jax.layers import Linear, Normalization, parameter, project, residual_std
from holo_jax.mixers.context import Context, keep_rows
from holo_jax.parallel import layout, sequence_axis, sharded
from holo_jax.precision import assert_dtype
from holo_jax.sequence import (
    delayed,
    next_tail,
    of_last_device,
    short_convolution,
    short_convolutions,
    tail_before,
    with_tail,
)


class MemoryMixerState(NamedTuple):
    """State of one memory layer.

    Attributes:
      tail: the last raw phases, [b, k, h * m], which the short convolution (or shift) still needs.
      content: memory addressed by content, or None.
      position: memory addressed by position, or None.
      value_tail: the last values, [b, k, h * d], which their convolution still needs, or None.
    """

    tail: Float[Array, "b k f"] | None
    content: MemoryState | None
    position: MemoryState | None
    value_tail: Float[Array, "b k f"] | None = None


class MemoryMixer(nnx.Module):
    """Writes each token's value under a phasor key and reads with another (docs/design.md).

    With raw phases p_t = phase_scale * W x_t, write phases a and read phases b are two causal
    convolutions of p, which start as the previous and the current token's phase ("bind the value to
    the key before it"). y_t = retrieve(b_t) / n_t, then RMSNorm a head, silu gate, output map.
    """

    def __init__(self, config: HoloConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        e, h, m, hd = config.hidden_size, config.num_heads, config.key_dim, config.hd_dim
        dtype = jnp.dtype(config.precision.params)
        self.values = Linear(config, (e, hd), ("embed", "heads"), rngs=rngs)
        std = residual_std(config, hd)
        self.out = Linear(config, (hd, e), ("heads", "embed"), std=std, rngs=rngs)
        if config.addressing != "position":
            self.phases = Linear(config, (e, h * m), ("embed", "heads"), rngs=rngs)
            if config.short_conv:
                taps = jnp.zeros((config.short_conv, h * m), dtype)
                self.read_taps = parameter(taps.at[-1].set(1), (None, "heads"))
                self.write_taps = parameter(taps.at[-2].set(1), (None, "heads"))
        if config.value_conv:
            self.value_taps = parameter(
                jnp.zeros((config.value_conv, hd), dtype).at[-1].set(1), (None, "heads")
            )
        if config.addressing == "both":
            self.mix = parameter(jnp.full((2, h), 0.5, dtype), (None, "heads"))
        if config.write_gate:
            self.write = Linear(config, (e, h), ("embed", "heads"), bias=True, rngs=rngs)
        if config.erase:
            self.erase = Linear(
                config, (e, h), ("embed", "heads"), bias=True, bias_init=config.erase_bias, rngs=rngs
            )
        if config.output_gate:
            self.gate = Linear(config, (e, hd), ("embed", "heads"), rngs=rngs)
        if config.head_norm:
            self.head_norm = Normalization(config, (h, config.head_dim), ("heads", None), kind="rmsnorm")

    @property
    def maps(self) -> dict[str, str | None]:
        """Linear maps of the input, and their result dtypes (None is the storage dtype)."""
        config = self.config
        maps: dict[str, str | None] = {"values": None}
        if config.addressing != "position":
            maps["phases"] = config.precision.phases
        if config.write_gate:
            maps["write"] = "float32"
        if config.erase:
            maps["erase"] = "float32"
        if config.output_gate:
            maps["gate"] = None
        return maps

    @staticmethod
    def init_state(config: HoloConfig, batch: int, cache_length: int) -> MemoryMixerState:
        """The empty memory of one layer; its size does not depend on ``cache_length``."""
        del cache_length
        h, m, d = config.num_heads, config.key_dim, config.head_dim
        dtype = jnp.dtype(config.precision.memory)

        def memory() -> MemoryState:
            return init_memory(batch, h, m, d, binding=config.binding, dtype=dtype)

        content = config.addressing != "position"
        shape = (batch, _tail_size(config), h * m)
        return MemoryMixerState(
            tail=jnp.zeros(shape, jnp.dtype(config.precision.phases)) if content else None,
            content=memory() if content else None,
            position=memory() if config.addressing != "content" else None,
            value_tail=jnp.zeros(
                (batch, config.value_conv - 1, config.hd_dim), jnp.dtype(config.precision.storage)
            )
            if config.value_conv
            else None,
        )

    def __call__(
        self,
        x: Float[Array, "b t e"],
        context: Context,
        turns: UInt32[Array, "h m"] | None,
        state: MemoryMixerState | None,
    ) -> tuple[Float[Array, "b t e"], MemoryMixerState | None]:
        """Mixes tokens; ``turns`` are the layer's positional phasors, used where positions address."""
        return self.of_maps(project(self, x, self.maps), context, turns, state)

    def of_maps(
        self,
        maps: dict[str, Array],
        context: Context,
        turns: UInt32[Array, "h m"] | None,
        state: MemoryMixerState | None,
    ) -> tuple[Float[Array, "b t e"], MemoryMixerState | None]:
        """The same from the maps of the input."""
        maps = dict(maps)
        gate = maps.pop("gate", None)
        state_layout = None
        if state is not None:
            every: tuple[Any, ...] = (layout("b _ h"), layout("b h"), layout("b h"), layout("b _ h"))
            present = [at if field is not None else None for at, field in zip(every, state, strict=True)]
            state_layout = MemoryMixerState._make(present)
        mix_tokens = sharded(
            self._mix_tokens,
            (layout("_ h"), layout("b t h"), context.layout, layout("h"), state_layout),
            (layout("b t h"), state_layout),
        )
        names = ("read_taps", "write_taps", "value_taps", "mix")
        taps = {name: getattr(self, name)[...] for name in names if hasattr(self, name)}
        retrieved, state = mix_tokens(taps, maps, context, turns, state)
        return self.out(self._finish(retrieved, gate)), state

    def _mix_tokens(
        self,
        taps: dict[str, Array],
        maps: dict[str, Array],
        context: Context,
        turns: Array | None,
        state: MemoryMixerState | None,
    ) -> tuple[Array, MemoryMixerState | None]:
        """From the maps of the input to what is retrieved ``[b, t, h, d]``; of any of its heads."""
        config = self.config
        values, value_tail = maps["values"], None
        if config.value_conv:
            value_before = None if state is None else state.value_tail
            value_before = tail_before(values, config.value_conv - 1, value_before)
            past = with_tail(values, config.value_conv - 1, value_before, context.padding)
            values = short_convolution(past, taps["value_taps"].astype(values.dtype), context.inside)
            if state is not None:
                value_tail = of_last_device(next_tail(past, config.value_conv - 1, context.inside))
        b, t, width = values.shape
        d = config.head_dim
        h = width // d
        values = values.reshape(b, t, h, d)
        gates = jax.nn.sigmoid(maps["write"]) if config.write_gate else None
        if context.real is not None:
            written = jnp.ones((b, t, h), jnp.float32) if gates is None else gates
            gates = jnp.where(context.real[..., None], written, 0.0)
        erase = None
        if config.erase:
            assert gates is not None  # erase needs write_gate, which the configuration checks
            erase = gates * jax.nn.sigmoid(maps["erase"])
        retrieved = jnp.zeros((b, t, h, d), jnp.dtype(config.precision.memory))
        content = position = tail = None
        if config.addressing != "position":
            past, write, read = self._content_phases(taps, maps["phases"], context, state)
            content_gates = gates
            if not config.short_conv:
                follows = (context.inside > 0)[..., None].astype(jnp.float32)
                content_gates = follows * (jnp.ones((b, t, h), jnp.float32) if gates is None else gates)
            before = None if state is None else state.content
            y, content = self._memory(write, read, values, content_gates, erase, context, before)
            retrieved = y if config.addressing == "content" else taps["mix"][1][None, None, :, None] * y
            if state is not None:
                tail = of_last_device(next_tail(past, _tail_size(config), context.inside))
        if config.addressing != "content":
            if turns is None:
                raise ValueError("turns is None; positional addressing needs the layer's phasors")
            phases = phases_at(turns, context.inside)
            before = None if state is None else state.position
            at = kernels.Positions(turns, context.inside)
            y, position = self._memory(phases, phases, values, gates, None, context, before, at)
            if config.addressing == "both":
                retrieved = retrieved + taps["mix"][0][None, None, :, None] * y
            else:
                retrieved = y
        if state is None:
            return retrieved, None
        return retrieved, MemoryMixerState(tail, content, position, value_tail)

    def _content_phases(
        self, taps: dict[str, Array], raw: Array, context: Context, state: MemoryMixerState | None
    ) -> tuple[Array, Array, Array]:
        config = self.config
        b, t, width = raw.shape
        raw = config.phase_scale * raw
        assert_dtype(raw, config.precision.phases, "phases")
        tail = tail_before(raw, _tail_size(config), None if state is None else state.tail)
        past = with_tail(raw, _tail_size(config), tail, context.padding)
        if config.short_conv:
            both = (taps["write_taps"], taps["read_taps"])
            write, read = short_convolutions(past, both, context.inside)
        else:
            write, read = delayed(past, 1, context.inside), raw
        shape = (b, t, width // config.key_dim, config.key_dim)
        return past, write.reshape(shape), read.reshape(shape)

    def _memory(
        self,
        write: Array,
        read: Array,
        values: Array,
        gates: Array | None,
        erase: Array | None,
        context: Context,
        state: MemoryState | None,
        positions: kernels.Positions | None = None,
    ) -> tuple[Array, MemoryState]:
        config = self.config
        b, t, h, _ = values.shape
        if state is not None:
            state = jax.tree.map(lambda leaf: keep_rows(leaf, context.continues), state)
        axis = sequence_axis()
        options: dict[str, Any] = dict(
            backend=config.memory_backend,
            binding=config.binding,
            method="recurrent" if t == 1 else config.memory_method,
            segment_ids=context.segment_ids,
            initial_state=state,
            chunk_size=config.chunk_size or None,
        )
        if config.read_scale == "sqrt_time":
            options["factors"] = 1.0 / jnp.sqrt(context.inside.astype(jnp.float32) + 1)
        if axis is None:
            options["positions"] = positions
            y, after = kernels.accumulate(write, read, values, gates, erase, **options)
        else:
            y, state, after = kernels.accumulate_parts(axis, write, read, values, gates, erase, **options)
        assert_dtype(y, config.precision.memory, "retrieval")
        if config.read_scale in ("none", "sqrt_time"):
            return y, after
        written = jnp.ones((b, t, h), jnp.float32) if gates is None else gates
        scale = retrieval_scale(
            config.read_scale,
            written,
            segment_ids=context.segment_ids,
            initial_writes=None if state is None else state.writes,
        )
        return y / scale[..., None], after

    def _finish(self, retrieved: Array, gate: Array | None) -> Array:
        b, t, h, d = retrieved.shape
        if self.config.head_norm:
            retrieved = self.head_norm(retrieved)
        retrieved = retrieved.astype(self.config.precision.storage).reshape(b, t, h * d)
        return retrieved if gate is None else jax.nn.silu(gate) * retrieved


def _tail_size(config: HoloConfig) -> int:
    """Earlier raw phases that a token's phases depend on."""
    return max(config.short_conv - 1, 1)
