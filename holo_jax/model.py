"""The stack of blocks, its state, and the causal language model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from holo_jax import kernels
from holo_jax.array_types import Array, Float, Int, UInt32
from holo_jax.blocks import Period, for_kind, is_variable, rematerialised
from holo_jax.config import HoloConfig
from holo_jax.functional import generate_multiscale_phasors, generate_random_phasors
from holo_jax.functional.cross_entropy import next_token_targets
from holo_jax.functional.stacks import splits_stacks, unstacked
from holo_jax.layers import (
    Linear,
    Normalization,
    embedding_std,
    lookup,
    parameter,
)
from holo_jax.mixers import MIXERS, Context
from holo_jax.ordered_sums import known_together, signalling, summed_meanwhile, sums_alone
from holo_jax.parallel import (
    SEQ,
    ambient_mesh,
    asked_where_blocks_run,
    check_divides,
    layout,
    sharded,
)
from holo_jax.residual import Pending, settled
from holo_jax.sequence import (
    leading_padding,
    positions_in_segments,
    segment_positions,
    segment_starts,
)


class ModelState(NamedTuple):
    """Everything that has been read so far, at constant size (attention caches excepted).

    Attributes:
      layers: one entry a block of a period; each a mixer state stacked over periods.
      position: position of the next token inside its segment, [b].
      segment: segment id of the last token read, [b]; 1 before the first.
    """

    layers: tuple[Any, ...]
    position: UInt32[Array, "b"]
    segment: Int[Array, "b"]


class HiddenOutput(NamedTuple):
    """Final normalised hidden states [b, t, e] and, if a state was given, the state after them."""

    hidden: Array
    state: ModelState | None


class CausalLMOutput(NamedTuple):
    """What ``HoloForCausalLM`` returns.

    Attributes:
      logits: [b, t, v] in the logits dtype.
      loss: mean nats over counted targets, or None without labels.
      loss_sum: their sum.
      num_targets: how many targets were counted.
      state: the state after these tokens, or None if none was given.
    """

    logits: Array
    loss: Array | None
    loss_sum: Array | None
    num_targets: Array | None
    state: ModelState | None


class HoloModel(nnx.Module):
    """Embedding, the blocks (stacked, run by ``lax.scan``), and the final norm.

    ``periods`` may be an ``nnx.List`` of single periods instead, which run in turn; ``ModelState.layers`` is
    then a tuple over periods. Decoding uses that form: no slices of weights and caches are copied.
    """

    def __init__(self, config: HoloConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = jnp.dtype(config.precision.params)
        shape = (config.vocab_size, config.hidden_size)
        table = embedding_std(config) * jax.random.normal(rngs.params(), shape, dtype)
        self.embedding = parameter(table, ("vocab", "embed"))
        self.periods = nnx.vmap(lambda r: Period(config, rngs=r))(rngs.split(config.num_periods))
        self.norm = Normalization(config, (config.hidden_size,), ("embed",))

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None = None,
        state: ModelState | None = None,
        turns: UInt32[Array, "n k h m"] | None = None,
    ) -> HiddenOutput:
        """Reads tokens, from nothing or on from ``state``.

        Args:
          input_ids: token ids.
          segment_ids: document of each token; tokens see only their own document. Ids must differ
            between the documents of a row; 0 marks padding.
          state: where reading stopped before; a row goes on with it where its first id is the state's,
            or everywhere without ids. Padding at the beginning of a row leaves the state as it is, so
            rows of different lengths, or none at all, are read in one call by padding on the left.
          turns: ``positional_turns(config)`` of a caller that keeps them over many calls.

        Raises:
          ValueError: if rows or tokens do not divide over the ambient mesh (``holo_jax.parallel``), or for
            ``state`` together with ``segment_ids`` where a sequence is divided over devices.
        """
        return self.followed(input_ids, segment_ids, state, turns)[0]

    def followed(
        self,
        input_ids: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None = None,
        state: ModelState | None = None,
        turns: UInt32[Array, "n k h m"] | None = None,
        following: Array | None = None,
    ) -> tuple[HiddenOutput, Array | None]:
        """The same, and ``following``, a matrix that is used after the blocks.

        Over ``data`` that matrix is returned once a device where blocks are unrolled
        (``ordered_sums.summed_meanwhile``): its gradient is summed while the last block runs back.
        """
        config = self.config
        check_divides(*input_ids.shape)
        context, state_after = _context(input_ids, segment_ids, state)
        turns = positional_turns(config) if turns is None else turns
        apart = state is None and not isinstance(self.periods, nnx.List)
        apart = apart and config.scan_unroll >= config.num_periods and splits_stacks()
        parts = _parts((self.periods, turns)) if apart else []
        table = self.embedding[...]
        signal = None
        if apart and sums_alone():
            table, _, sums = summed_meanwhile(table, None, "embedding")
            signal = sums.signal
        x = lookup(table, input_ids, config.precision.storage)
        if config.tie_embeddings:
            x = x / jnp.asarray(embedding_std(config), x.dtype)
        layers: Any = None
        if isinstance(self.periods, nnx.List):
            x, layers = self._in_turn(x, context, turns, None if state is None else state.layers)
        elif apart:
            x, following = self._apart(x, context, parts, following, signal)
        else:
            x, layers = self._scanned(x, context, turns, None if state is None else state.layers)
        if state_after is not None:
            state_after = state_after._replace(layers=layers)
        hidden = self.norm(x) if state is not None else self.norm.rows(x)
        return HiddenOutput(hidden, state_after), following

    def _scanned(self, x: Array, context: Context, turns: Array | None, layers: Any) -> tuple[Array, Any]:
        config = self.config

        def body(carried: tuple[Array, Pending | None], xs: tuple[Period, Array | None, Any]) -> Any:
            period, own_turns, states = xs
            x, pending, states = period(*carried, context, own_turns, states)
            return (x, pending), states

        # Every iteration carries the same arrays, so the first one has something to add as well.
        deferred = layers is None and config.remat != "full" and asked_where_blocks_run(self.norm.fuses, x)
        pending = self.periods.nothing(x) if deferred else None
        (x, pending), layers = jax.lax.scan(
            rematerialised(body, config.remat, looped=config.scan_unroll < config.num_periods),
            (x, pending),
            (self.periods, turns, layers),
            unroll=min(config.scan_unroll, config.num_periods),
        )
        return settled(x, pending), layers

    def _apart(
        self, x: Array, context: Context, parts: list[Any], following: Array | None, first: Array | None
    ) -> tuple[Array, Array | None]:
        """All periods, with their turns, one after the other; and ``following``, see ``followed``.

        Each takes its part of a single split of the stacked parameters, so that gradients are joined once; a
        loop taken apart by ``lax.scan`` would add up one whole stack a period. Over ``data`` the gradients of
        a period are summed while the one before it runs back, and for what lies before all ``first`` is the
        signal.
        """
        config = self.config

        def body(
            period: Period,
            own_turns: Array | None,
            carried: tuple[Array, Pending | None],
            signal: Array | None,
        ) -> Any:
            return period(*carried, context._replace(signal=signal), own_turns, None)[:2]

        # Traced once, not once a period.
        run = jax.jit(rematerialised(body, config.remat, looped=False))
        carried: Any = (x, None)
        sums = None
        used = [period for period, _ in parts] + [following]
        waits = sums_alone() and following is not None
        if sums_alone():
            used[0] = signalling(summed_meanwhile(used[0], None, "period 0")[0], first)
        for index, (_, own_turns) in enumerate(parts):
            if waits:
                name = "following" if index + 1 == len(parts) else f"period {index + 1}"
                used[index + 1], carried, sums = summed_meanwhile(used[index + 1], carried, name)
            carried = run(used[index], own_turns, carried, None if sums is None else sums.signal)
            if sums is not None:
                used[index + 1], carried = known_together(used[index + 1], carried, sums.room)
        return settled(*carried), used[-1]

    def _in_turn(self, x: Array, context: Context, turns: Array | None, layers: Any) -> tuple[Array, Any]:
        periods: Any = self.periods
        after, pending = [], None
        for index, period in enumerate(periods):
            own_turns = None if turns is None else turns[index]
            states = None if layers is None else layers[index]
            x, pending, states = period(x, pending, context, own_turns, states)
            after.append(states)
        return settled(x, pending), None if layers is None else tuple(after)


class HoloForCausalLM(nnx.Module):
    """A causal language model over ``HoloModel``.

    Example:
      >>> model = HoloForCausalLM(HoloConfig(vocab_size=256, hidden_size=64, hd_dim=64,
      ...                                    head_dim=32, num_hidden_layers=2), rngs=nnx.Rngs(0))
      >>> outputs = model(input_ids, labels=input_ids)
      >>> outputs.loss, outputs.logits.shape
    """

    def __init__(self, config: HoloConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.model = HoloModel(config, rngs=rngs)
        if not config.tie_embeddings:
            features = (config.hidden_size, config.vocab_size)
            self.head = Linear(config, features, ("embed", "vocab"), std=config.initializer_range, rngs=rngs)

    @property
    def output_weights(self) -> Float[Array, "e v"]:
        """The output projection, float32 masters."""
        return self.model.embedding[...].T if self.config.tie_embeddings else self.head.weight[...]

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        labels: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        state: ModelState | None = None,
    ) -> CausalLMOutput:
        """Logits, and the next-token loss if labels are given.

        Args:
          input_ids: token ids in [0, vocab_size).
          labels: usually ``input_ids`` itself; shifted here, once. -100 is ignored.
          segment_ids, state: see ``HoloModel``.

        Returns:
          ``CausalLMOutput``. Under jit, logits that are not used are not computed: the loss goes
          through ``kernels.linear_cross_entropy`` and never needs them.
        """
        loss = loss_sum = num_targets = None
        if labels is None:
            hidden, state = self.model(input_ids, segment_ids, state)
        else:
            (hidden, state), weights = self.model.followed(
                input_ids, segment_ids, state, following=self.output_weights
            )
            loss_sum, num_targets = self.summed_loss(hidden, labels, segment_ids, weights)
            loss = loss_sum / jnp.maximum(num_targets, 1).astype(loss_sum.dtype)
        return CausalLMOutput(self.logits(hidden), loss, loss_sum, num_targets, state)

    def summed_loss(
        self,
        hidden: Float[Array, "b t e"],
        labels: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None,
        weights: Array | None = None,
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """Nats over all counted targets, and how many these are, from final hidden states.

        ``weights`` is the output projection as ``HoloModel.followed`` returns it, or None for the parameter.
        """
        return kernels.linear_cross_entropy(
            hidden,
            self.output_weights if weights is None else weights,
            next_token_targets(labels, segment_ids),
            chunk_tokens=self.config.loss_chunk,
            logits_dtype=self.config.precision.logits,
            backend=self.config.products_backend,
        )

    def logits(self, hidden: Float[Array, "b t e"]) -> Float[Array, "b t v"]:
        """Logits of final hidden states, in the logits dtype."""
        return jnp.einsum(
            "bte,ev->btv",
            hidden,
            self.output_weights.astype(hidden.dtype),
            preferred_element_type=jnp.dtype(self.config.precision.logits),
        )


def init_state(config: HoloConfig, batch: int, *, cache_length: int = 0) -> ModelState:
    """The state before the first token.

    Args:
      config: the model's configuration.
      batch: rows.
      cache_length: slots of attention layers' caches, in tokens; not needed by other mixers.

    Raises:
      ValueError: if the model has attention layers and ``cache_length`` is not positive.
    """
    if "attention" in config.layer_kinds and cache_length < 1:
        raise ValueError(
            f"cache_length is {cache_length}; a model with attention layers needs at least 1 slot"
        )

    def stacked(kind: str) -> Any:
        mixer: Any = MIXERS[kind]
        one = mixer.init_state(for_kind(config, kind), batch, cache_length)
        return jax.tree.map(lambda a: jnp.repeat(a[None], config.num_periods, axis=0), one)

    return ModelState(
        layers=tuple(stacked(kind) for kind in config.layer_kinds),
        position=jnp.zeros((batch,), jnp.uint32),
        segment=jnp.ones((batch,), jnp.int32),
    )


def positional_turns(config: HoloConfig) -> UInt32[Array, "n k h m"] | None:
    """The fixed positional phasors of every layer, drawn from ``phasor_seed``; None if unused."""
    if config.mixer != "holo" or config.addressing == "content":
        return None
    h, m = config.num_heads, config.key_dim
    keys = jax.random.split(jax.random.key(config.phasor_seed, impl="threefry2x32"), config.num_hidden_layers)

    def draw(key: Array) -> Array:
        if config.frequencies == "multiscale":
            return generate_multiscale_phasors(key, h, m, std_max=config.frequency_std)
        return generate_random_phasors(key, (h, m), distribution=config.frequencies, std=config.frequency_std)

    turns = jnp.stack([draw(key) for key in keys])
    return turns.reshape(config.num_periods, len(config.layer_kinds), h, m)


def count_parameters(params: Any) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def logical_axes(params: nnx.State) -> dict[str, Any]:
    """Axis names of every parameter as a pure dict; stacked parameters gain a leading ``layers``."""

    def axes(variable: nnx.Variable) -> tuple[str | None, ...]:
        own = variable.get_metadata()["axes"]
        return ("layers", *own) if len(own) < len(variable.shape) else own

    named = jax.tree.map(axes, params, is_leaf=is_variable)
    return nnx.to_pure_dict(named)


def _parts(stacked: Any) -> list[Any]:
    """The parts of a tree whose arrays are stacked."""
    leaves, tree = jax.tree.flatten(stacked)
    return [jax.tree.unflatten(tree, own) for own in zip(*map(unstacked, leaves), strict=True)]


def _context(
    input_ids: Array, segment_ids: Array | None, state: ModelState | None
) -> tuple[Context, ModelState | None]:
    t = input_ids.shape[1]
    index = jnp.arange(t, dtype=jnp.uint32)[None]
    if segment_ids is None:
        if state is None:
            return Context(index), None
        context = Context(index + state.position[:, None], segment=state.segment)
        return context, ModelState((), state.position + jnp.uint32(t), state.segment)
    mesh = ambient_mesh()
    if state is None:
        inside = sharded(positions_in_segments, (layout("b t"),), layout("b t"))(segment_ids)
        return Context(inside, segment_ids), None
    if mesh is not None and mesh.shape[SEQ] > 1:
        raise ValueError(
            f"segment_ids are given with a state on a mesh with seq = {mesh.shape[SEQ]}; one must be None"
        )
    padding = leading_padding(segment_ids)
    first = jnp.take_along_axis(segment_ids, jnp.minimum(padding, t - 1)[:, None], axis=1)[:, 0]
    first = jnp.where(padding < t, first.astype(jnp.int32), state.segment)
    real = jnp.arange(t, dtype=jnp.int32)[None] >= padding[:, None]
    segment_ids = jnp.where(real, segment_ids.astype(jnp.int32), first[:, None])
    starts = segment_starts(segment_ids, state.segment)
    inside = segment_positions(starts, state.position)
    # Positions count from the first token that is there, up to the next border inside the row.
    own = jnp.cumsum(starts[:, 1:].astype(jnp.int32), axis=1) == 0
    own = jnp.concatenate([jnp.ones_like(starts[:, :1]), own], axis=1)
    inside = inside - jnp.where(own, padding[:, None].astype(jnp.uint32), jnp.zeros((), jnp.uint32))
    context = Context(inside, segment_ids, first == state.segment, padding, state.segment)
    return context, ModelState((), inside[:, -1] + 1, segment_ids[:, -1])
