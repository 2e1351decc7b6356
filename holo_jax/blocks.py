"""A block, the period of blocks that repeats through the depth, and what their backward pass makes again."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from holo_jax import kernels
from holo_jax.array_types import Array
from holo_jax.config import HoloConfig
from holo_jax.layers import Denoiser, Normalization, normed_project
from holo_jax.mixers import MIXERS, Context, fused_memory
from holo_jax.mixers.memory import MemoryMixer
from holo_jax.parallel import (
    DATA,
    GATHERED_NAME,
    ROUNDED_NAME,
    constrain,
    divides_tokens,
    gathering_again,
    layout,
    parameter_layout,
    sharded,
)
from holo_jax.residual import Pending, added

_KERNEL_PRIMITIVES = frozenset(
    ("pallas_call", "mpmd_map", "custom_vmap_call", "dot_product_attention_fwd_wrapper")
)
_SUM_PRIMITIVES = frozenset(("psum", "psum_invariant"))


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + denoiser(norm(x))."""

    def __init__(self, config: HoloConfig, kind: str, *, rngs: nnx.Rngs) -> None:
        e = config.hidden_size
        self.mixer_norm = Normalization(config, (e,), ("embed",))
        self.mixer: Any = MIXERS[kind](for_kind(config, kind), rngs=rngs)
        if config.mlp != "none":
            self.mlp_norm = Normalization(config, (e,), ("embed",))
            self.mlp = Denoiser(config, rngs=rngs)
        self.has_mlp = config.mlp != "none"
        # What recomputes whole blocks keeps what they are given: one array then, not two.
        self.defers, self.recomputed = config.remat != "full", config.remat != "none"

    def __call__(
        self, x: Array, pending: Pending | None, context: Context, turns: Array | None, state: Any
    ) -> tuple[Array, Pending | None, Any]:
        """One block on [b, t, e]; the state of its mixer in and out.

        ``pending`` is what the block before still has to add to x: where kernels norm, they also add.
        Parameters may be given once a device (``ordered_sums.summed_meanwhile``).
        """
        if state is not None or not divides_tokens():
            return self._run(x, pending, context, turns, state)
        graph, parameters = nnx.split(self)
        rows, each = layout("b t"), self.mixer_norm.weight[...].ndim == 2
        given = (P(DATA) if each else _layouts(parameters), rows, rows, context.layout, layout("_"))

        def own(parameters: Any, *arguments: Any) -> tuple[Array, Pending | None]:
            if each:
                parameters = jax.tree.map(lambda leaf: leaf[0], parameters)
            block: Any = nnx.merge(graph, parameters)
            return block._run(*arguments, None)[:2]

        own = own if self.recomputed else gathering_again(own)
        return *sharded(own, given, (rows, rows))(parameters, x, pending, context, turns), None

    def _run(
        self, x: Array, pending: Pending | None, context: Context, turns: Array | None, state: Any
    ) -> tuple[Array, Pending | None, Any]:
        fused = state is None and self.mixer_norm.fuses(x)
        if pending is not None and not fused:
            x, pending = constrain(added(x, pending), "b t _"), None
        x, mixed, state = self._mix(x, pending, context, turns, state)
        if not self.has_mlp:
            left = Pending(mixed)
        elif fused:
            x, left = self.mlp.after(self.mlp_norm, x, mixed)
        else:
            x = constrain(x + mixed, "b t _")
            left = Pending(self.mlp(self.mlp_norm(x)))
        if fused and self.defers:
            return x, left, state
        return constrain(added(x, left), "b t _"), None, state

    def _mix(
        self, x: Array, pending: Pending | None, context: Context, turns: Array | None, state: Any
    ) -> tuple[Array, Array, Any]:
        """(x with ``pending``, mixer of its norm, state after it); by fewer passes where kernels allow it."""
        mixer, norm = self.mixer, self.mixer_norm
        if state is not None:
            return x, *mixer(norm(x), context, turns, state)
        if isinstance(mixer, MemoryMixer) and fused_memory.unsupported(mixer, x, context) is None:
            return *fused_memory.after_norm(mixer, norm, x, pending, context), None
        if norm.fuses(x):
            x, maps = normed_project(norm, mixer, x, pending, mixer.maps)
            return x, *mixer.of_maps(maps, context, turns, None)
        return x, *mixer(norm(x), context, turns, None)


class Period(nnx.Module):
    """The blocks that repeat through the depth: one, or k with a closing attention anchor."""

    def __init__(self, config: HoloConfig, *, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(config, kind, rngs=rngs) for kind in config.layer_kinds])

    def __call__(
        self,
        x: Array,
        pending: Pending | None,
        context: Context,
        turns: Array | None,
        states: tuple[Any, ...] | None,
    ) -> tuple[Array, Pending | None, tuple[Any, ...] | None]:
        """Runs the blocks in order; ``turns`` is [k, h, m], ``pending`` as in ``Block``."""
        after = []
        for index, block in enumerate(self.blocks):
            own_turns = None if turns is None else turns[index]
            state = None if states is None else states[index]
            x, pending, state = block(x, pending, context, own_turns, state)
            after.append(state)
        return x, pending, None if states is None else tuple(after)

    def nothing(self, x: Array) -> Pending:
        """Zeros of the form that the last block leaves, for a loop that begins at x."""
        last = self.blocks[-1]
        bias = last.mlp.down.bias if last.has_mlp else None

        def own(x: Array) -> Pending:
            offset = None if bias is None else jnp.zeros((1, 1, x.shape[-1]), bias.dtype)
            return Pending(jnp.zeros_like(x), offset)

        rows = layout("b t")
        return (sharded(own, (rows,), rows) if divides_tokens() else own)(x)


def for_kind(config: HoloConfig, kind: str) -> HoloConfig:
    """The configuration of a block of a kind: anchors of another mixer are attention."""
    if kind == "attention" and config.mixer != "attention":
        return config.replace(mixer="attention", erase=False, hd_dim=config.hidden_size)
    return config


def _layouts(params: nnx.State) -> Any:
    """Where the parameters of one block lie on a mesh."""
    return jax.tree.map(
        lambda variable: parameter_layout(variable.get_metadata()["axes"]), params, is_leaf=is_variable
    )


def is_variable(node: Any) -> bool:
    """Whether a node of a state is a parameter."""
    return isinstance(node, nnx.Variable)


def rematerialised(body: Any, policy: str, *, looped: bool) -> Any:
    """``body`` with a policy of ``HoloConfig.remat``; ``looped``: the body of a scan over blocks."""
    if policy == "none":
        return body
    policies = jax.checkpoint_policies
    # A loop keeps forward and backward apart; without one, the compiler would merge the recomputation away.
    if policy == "full":
        return jax.checkpoint(
            body, policy=policies.save_only_these_names(GATHERED_NAME), prevent_cse=not looped
        )
    # What a kernel made is kept like a product: computing it twice costs a kernel. Rounded weights are kept
    # where blocks are unrolled; a loop would stack them.
    names = (kernels.READ_NAME, kernels.SCALED_NAME, GATHERED_NAME, *(() if looped else (ROUNDED_NAME,)))
    saved = policies.save_from_both_policies(
        policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, _made_by_a_kernel),
        policies.save_only_these_names(*names),
    )
    return jax.checkpoint(body, policy=saved, prevent_cse=not looped)


def _made_by_a_kernel(primitive: Any, *avals: Any, **parameters: Any) -> bool:
    """A rematerialisation policy: Pallas kernels, bare or with a batching rule, and attention of cuDNN.

    And what devices have summed, in place of the product they summed.
    """
    del avals, parameters
    return primitive.name in _KERNEL_PRIMITIVES | _SUM_PRIMITIVES
