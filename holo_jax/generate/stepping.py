"""One token through a model in decoding form, with the writes of its memories held back."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Bool, Float, Int
from holo_jax.config import HoloConfig
from holo_jax.generate import counts, stack
from holo_jax.generate.pending import (
    GROUP,
    Held,
    Pending,
    Token,
    again,
    begin,
    join,
    read_and_write,
    scaled,
    supported,
)
from holo_jax.generate.reading import next_logits
from holo_jax.kernels import capability
from holo_jax.kernels.decode import gate as decode_gate
from holo_jax.kernels.decode import products as decode_products
from holo_jax.kernels.decode import rows_plan as decode_rows_plan
from holo_jax.kernels.decode import shape as decode_shape
from holo_jax.layers import embedding_std, lookup, project
from holo_jax.mixers import Context
from holo_jax.model import HoloForCausalLM, ModelState


class Form(NamedTuple):
    """How tokens are read.

    Attributes:
      stacked: by one kernel over all layers, on states stacked over depth and weights dealt to its programs.
      heads: memories by a kernel.
      products: with ``heads``, also the products between memories, with norms, gates and sums around them.
      folded: with ``heads``, norms' weights in the maps after them, and the norms in kernels after those.
      joined: with ``heads``, the last token of a group joins the group with the memory that it reads.
      drawn: tokens are drawn by kernels (``drawing``).
      cublas: the compiler's products are all cuBLAS's, none generated.
      programs: programs of the kernel over all layers.
      interpret: see ``decode_shape.Shape``.
    """

    stacked: bool = False
    heads: bool = False
    products: bool = False
    folded: bool = False
    joined: bool = False
    drawn: bool = False
    cublas: bool = False
    programs: int = 1
    interpret: bool = False


PORTABLE = Form()
# A kernel joins when it has been equal to the definition, and faster, on hardware: at width 1024 and one row
# "rows" took 0.147 ms a token where "products" had taken 0.313, and at 16 rows 0.200 where "folded" had taken
# 0.371 (H200, in other runs).
AUTOMATIC: tuple[str, ...] = ("rows", "products", "folded", "heads")
# One row takes a kernel a layer from this many bytes of weights a layer: at width 1024 (25 MB) it was slower
# than the portable form, at 2048 (99 MB) sixteen rows by it took 0.73 of one row's time without.
_HEADS_BYTES = 2**25
_PRODUCTS_ROWS = 1  # four rows took 0.488 ms a token by products and 0.433 by a kernel a layer
_CUBLAS_ROWS = 256  # 1.174 ms a token and 1.311 at width 1024, 4.145 and 4.325 at 2048; fewer were not timed


def choose(config: HoloConfig, rows: int) -> Form:
    """The fastest form for this model, batch and device, with a state in float32."""
    if not supported(config):
        return PORTABLE
    programs = max(capability.multiprocessors(), 1)
    shape = stack.shape_of(config, rows, GROUP, programs)
    every = config.mlp == "swiglu" and config.norm == "rmsnorm" and not config.anchor_every
    heads = decode_shape.unsupported_heads(shape) is None
    if (
        "rows" in AUTOMATIC
        and every
        and decode_rows_plan.unsupported(shape, config.precision.storage) is None
    ):
        return Form(stacked=True, drawn=True, programs=programs)
    narrow = every and heads and jnp.dtype(config.precision.storage) == jnp.bfloat16
    if (
        "products" in AUTOMATIC
        and narrow
        and rows <= _PRODUCTS_ROWS
        and decode_products.unsupported(rows, (shape.width, shape.values, shape.hidden)) is None
    ):
        return Form(heads=True, products=True, drawn=True)
    small = _layer_bytes(shape, config) < _HEADS_BYTES
    # Width 1024, 16 rows: 0.431 ms where norms of their own took 0.457 (H100); 256: 0.861 and 0.874 (H200),
    # and 0.795 where a group joined by a kernel of its own took 0.798; 64: equal.
    folded = "folded" in AUTOMATIC and narrow and small and rows > 1
    if folded or ("heads" in AUTOMATIC and heads and (rows > 1 or not small)):
        many = rows >= _CUBLAS_ROWS
        return Form(heads=True, folded=folded, joined=many and small, drawn=True, cublas=many)
    return PORTABLE


def _layer_bytes(shape: decode_shape.Shape, config: HoloConfig) -> int:
    """Bytes of a layer's weights in products."""
    numbers = shape.width * (shape.offsets["all"] + shape.values + 3 * shape.hidden)
    return numbers * jnp.dtype(config.precision.storage).itemsize


def room(size: int) -> int:
    """Pending writes that ``size`` tokens have room for: kernels want a power of two, at least 4."""
    return max(4, 1 << (size - 1).bit_length())


def split_held(layers: Any, size: int, before: Any = None, mail: Any = None) -> tuple[Any, Any]:
    """What a group of ``size`` tokens only reads, and what each of its tokens changes.

    Layers without held memory are all of the second kind.

    Args:
      layers: of a state that the loop carries.
      size: tokens of the group.
      before: ``reusable`` of the group before; None makes room.
      mail: ``room_for_mail``.
    """
    if isinstance(layers[0], Held):
        if before is not None:
            pending = jax.vmap(again)(layers[0], before.pending)
            return layers[0], before._replace(pending=pending)
        pending = jax.vmap(lambda held: begin(held, room(size)))(layers[0])
        return layers[0], stack.Moving(pending, mail, jnp.int32(0))
    fixed = tuple(tuple(x if isinstance(x, Held) else None for x in period) for period in layers)

    def start(x: Any, used: Any) -> Any:
        if not isinstance(x, Held):
            return x
        return begin(x, room(size)) if used is None else again(x, used)

    moving = tuple(
        tuple(start(x, None if before is None else before[n][k]) for k, x in enumerate(period))
        for n, period in enumerate(layers)
    )
    return fixed, moving


def room_for_mail(config: HoloConfig, form: Form, rows: int) -> Any:
    """Of the kernel over all layers before its first launch, where the form has it."""
    return decode_rows_plan.mail(stack.shape_of(config, rows, 1, form.programs)) if form.stacked else None


def reusable(moving: Any, form: Form, size: int) -> Any:
    """The room of a group of ``size`` tokens that the next one can have as it is left, or None.

    Kernels read no more of it than their own group has written. Zeros for every group would be made anew.
    """
    if isinstance(moving, stack.Moving):
        return moving._replace(launch=moving.launch + size)
    if not form.heads:
        return None

    def room(x: Any) -> Any:
        x = x.pending if isinstance(x, stack.Joined) else x
        return x if isinstance(x, Pending) else None

    return tuple(tuple(map(room, period)) for period in moving)


def join_held(fixed: Any, moving: Any, count: Int[Array, "b"], size: int, form: Form) -> Any:
    """The layers after a group of ``size`` tokens, of which each row read ``count``."""
    by_kernel = partial(stack.joined, size=size, interpret=form.interpret)
    if isinstance(fixed, Held):
        layers = fixed.writes.shape[0]
        # Layers as rows, which all are joined alike.
        held, pending = (
            jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), x) for x in (fixed, moving.pending)
        )
        joined = join(held, pending, jnp.tile(count, layers), by_kernel)
        return (jax.tree.map(lambda x: x.reshape(layers, -1, *x.shape[1:]), joined),)

    def own(held: Any, x: Any) -> Any:
        if held is None:
            return x
        if isinstance(x, stack.Joined):
            return join(held, x.pending, count, lambda *_: (x.memory, x.residue))
        return join(held, x, count, by_kernel if form.heads else None)

    return tuple(
        tuple(own(held, x) for held, x in zip(*period, strict=True))
        for period in zip(fixed, moving, strict=True)
    )


def step(
    model: HoloForCausalLM,
    tokens: Int[Array, "b"],
    fixed: Any,
    moving: ModelState,
    index: Int[Array, ""],
    active: Bool[Array, "b"],
    turns: Array | None,
    form: Form,
    packed: Any = None,
) -> tuple[Float[Array, "b v"], ModelState]:
    """``through_blocks`` and ``logits_of``: reads one token a row; rows that are not active keep their state.

    Returns:
      Logits in float32, and ``moving`` after the token.
    """
    hidden = no_hidden(model.config, tokens.shape[0])
    hidden, moving = through_blocks(model, tokens, hidden, fixed, moving, index, active, turns, form, packed)
    return logits_of(model, hidden, form, packed), moving


def no_hidden(config: HoloConfig, rows: int) -> Float[Array, "b e"]:
    """``hidden`` of ``through_blocks`` before any token."""
    return jnp.zeros((rows, config.hidden_size), config.precision.storage)


def first_launch(moving: Any) -> Int[Array, ""]:
    """``launch`` of a group; 0 where there is none."""
    return moving.launch if isinstance(moving, stack.Moving) else jnp.int32(0)


def embed(model: HoloForCausalLM, tokens: Int[Array, "b"]) -> Float[Array, "b e"]:
    """The residual stream before the first block."""
    config = model.config
    x = lookup(model.model.embedding[...], tokens[:, None], config.precision.storage)[:, 0]
    return x / jnp.asarray(embedding_std(config), x.dtype) if config.tie_embeddings else x


def through_blocks(
    model: HoloForCausalLM,
    tokens: Int[Array, "b"],
    hidden: Float[Array, "b e"],
    fixed: Any,
    moving: ModelState,
    index: Int[Array, ""],
    active: Bool[Array, "b"],
    turns: Array | None,
    form: Form,
    packed: Any = None,
    numbers: Int[Array, "n b"] | None = None,
    embedded: Array | None = None,
    joins: int = 0,
) -> tuple[Float[Array, "b e"], ModelState]:
    """Reads one token a row; rows that are not active keep what they have.

    Args:
      model: in decoding form.
      tokens: ids.
      hidden: what this function returned for the token before.
      fixed, moving: see ``split_held``; ``moving`` also has position and segment.
      index: tokens in the group before.
      active: rows that read.
      turns: see ``HoloModel``.
      form: how.
      packed: ``pack`` of the model.
      numbers: ``index``, ``active`` and position once more, first rows as of ``counts.numbers``, if they are
        there as one array.
      embedded: ``tokens`` as of ``drawing.first_input``, if they are looked up already.
      joins: for the last token of a group in a form with ``joined``, how many it has: layers are
        ``stack.Joined`` then.

    Returns:
      The residual stream after the last block, for ``logits_of``, and ``moving`` after the token.
    """
    config = model.config
    x = embed(model, tokens) if embedded is None else embedded
    segment = moving.segment
    position = moving.position + active.astype(jnp.uint32)
    if numbers is None:
        launch = index + first_launch(moving.layers)
        numbers = counts.numbers(
            *(jnp.broadcast_to(x, active.shape) for x in (index, active, moving.position, launch))
        )
    if form.stacked:
        assert packed is not None
        own: Any = moving.layers
        room = own.pending.keys.shape[-2]
        shape = stack.shape_of(config, tokens.shape[0], room, form.programs, interpret=form.interpret)
        x, after = stack.through(shape, packed["stack"], x, hidden, fixed, own, numbers)
        return x, ModelState(after, position, segment)
    context = Context(
        moving.position[:, None],
        segment[:, None],
        jnp.ones_like(active),
        jnp.where(active, 0, 1).astype(jnp.int32),
        segment,
    )
    x = x[:, None]
    layers = []
    periods: Any = model.model.periods
    for n, period in enumerate(periods):
        own_turns = None if turns is None else turns[n]
        states = []
        for k, block in enumerate(period.blocks):
            held, state = fixed[n][k], moving.layers[n][k]
            if form.products:
                x, state = _by_products(block, packed["blocks"][n][k], x, held, state, numbers, form, joins)
            elif form.folded:
                x, state = _by_folded(block, packed["blocks"][n][k], x, held, state, numbers, form, joins)
            elif held is None:
                own = None if own_turns is None else own_turns[k]
                # With a state a block leaves nothing for the next one to add.
                x, _, state = block(x, None, context, own, state)
            else:
                at = (index, active, moving.position, numbers)
                mixed, state = _mix(block.mixer, block.mixer_norm(x), held, state, *at, form, joins)
                x = x + mixed
                if block.has_mlp:
                    x = x + block.mlp(block.mlp_norm(x))
            states.append(state)
        layers.append(tuple(states))
    hidden = jnp.where(active[:, None], x[:, 0], hidden)
    return hidden, ModelState(tuple(layers), position, segment)


def pack(model: HoloForCausalLM, form: Form) -> Any:
    """The weights once more as kernels want them, or None where the form has none; see ``stack``."""
    if form.stacked:
        packed = {"stack": stack.deal(model, form.programs)}
        return packed | ({"head": stack.folded_head(model)} if unscaled(model.config, form) else {})
    if form.products:
        return {"blocks": stack.transposed(model), "head": stack.transposed_head(model)}
    if form.folded:
        return {"blocks": stack.folded(model)}
    return None


def logits_of(model: HoloForCausalLM, x: Float[Array, "b e"], form: Form, packed: Any) -> Float[Array, "b v"]:
    """From the residual stream after the last block to logits in float32; with ``products`` by a kernel."""
    norm = model.model.norm
    if unscaled(model.config, form):
        return scaled_logits(model, unscaled_logits(x, packed), x)
    if not form.products:
        return next_logits(model, norm(x[:, None])[:, 0])
    weight = norm.weight[...]
    logits = decode_products.product(
        "maps", x, packed["head"], norm=weight, eps=norm.eps, interpret=form.interpret
    )
    return logits.astype(model.config.precision.logits).astype(jnp.float32)


def unscaled(config: HoloConfig, form: Form) -> bool:
    """Whether the last norm's weight is in the head's, so that one over the root mean square is left."""
    return form.stacked and jnp.dtype(config.precision.logits) == jnp.float32


def unscaled_logits(x: Float[Array, "b e"], packed: Any) -> Float[Array, "b v"]:
    """``logits_of`` times the root mean square, of a form with ``unscaled``."""
    return jnp.einsum("be,ev->bv", x, packed["head"], preferred_element_type=jnp.float32)


def scaled_logits(
    model: HoloForCausalLM, logits: Float[Array, "b v"], x: Float[Array, "b e"]
) -> Float[Array, "b v"]:
    """``logits_of``, from ``unscaled_logits``."""
    mean = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return logits * jax.lax.rsqrt(mean + model.model.norm.eps)


def _by_products(
    block: Any,
    weights: dict[str, Array],
    x: Float[Array, "b 1 e"],
    held: Held,
    pending: Pending,
    numbers: Array,
    form: Form,
    joins: int,
) -> tuple[Float[Array, "b 1 e"], Pending | stack.Joined]:
    """A block on one token by five kernels."""
    interpret = form.interpret
    product = partial(decode_products.product, eps=block.mixer_norm.eps, interpret=interpret)
    x = x[:, 0]
    y = product("maps", x, weights["maps"], norm=block.mixer_norm.weight[...])
    z, after = stack.heads(block.mixer, y, held, pending, numbers, interpret, joins=joins)
    x = product("added", z, weights["out"], residual=x)
    hidden = product("gated", x, weights["up"], norm=block.mlp_norm.weight[...])
    return product("added", hidden, weights["down"], residual=x)[:, None], after


def _by_folded(
    block: Any,
    weights: dict[str, Array],
    x: Float[Array, "b 1 e"],
    held: Held,
    pending: Pending,
    numbers: Array,
    form: Form,
    joins: int,
) -> tuple[Float[Array, "b 1 e"], Pending | stack.Joined]:
    """A block on one token without norms between its products: what follows a product norms its results."""
    interpret, eps = form.interpret, block.mlp_norm.eps

    def product(x: Array, weight: Array, dtype: Any) -> Array:
        return jnp.einsum("bi,io->bo", x, weight, preferred_element_type=dtype)

    # cuBLAS writes half the bytes in .4 us less; a product that the compiler generates takes longer for it.
    stored = x.dtype if form.cublas else jnp.float32

    x = x[:, 0]
    y = product(x, weights["maps"], jnp.float32)
    z, after = stack.heads(block.mixer, y, held, pending, numbers, interpret, x, joins)
    x = x + product(z, block.mixer.out.weight[...], x.dtype)
    y = product(x, weights["up"], stored)
    hidden = decode_gate.gated(y, x, eps=eps, interpret=interpret)
    return (x + product(hidden, block.mlp.down.weight[...], x.dtype))[:, None], after


def _mix(
    mixer: Any,
    x: Float[Array, "b 1 e"],
    held: Held,
    pending: Pending,
    index: Array,
    active: Array,
    position: Array,
    numbers: Array,
    form: Form,
    joins: int,
) -> tuple[Float[Array, "b 1 e"], Pending | stack.Joined]:
    """The memory mixer on one token."""
    config = mixer.config
    if form.heads:
        y = jnp.concatenate(list(mixer.joined(x).values()), axis=-1)[:, 0]
        z, after = stack.heads(mixer, y, held, pending, numbers, form.interpret, joins=joins)
        return mixer.out(z[:, None]), after
    maps = project(mixer, x, mixer.maps)
    b, h, d = x.shape[0], config.num_heads, config.head_dim
    gate = jax.nn.sigmoid(maps["write"][:, 0]) if config.write_gate else jnp.ones((b, h), jnp.float32)
    gate = jnp.where(active[:, None], gate, 0.0)
    token = Token(
        phases=config.phase_scale * maps["phases"][:, 0],
        values=maps["values"][:, 0].reshape(b, h, d).astype(jnp.float32),
        gate=gate,
        erase=gate * jax.nn.sigmoid(maps["erase"][:, 0]) if config.erase else None,
    )
    taps = (mixer.read_taps[...], mixer.write_taps[...])
    read, pending = read_and_write(held, pending, index, token, *taps)
    read = scaled(config, read, held, pending, position)
    return mixer.out(mixer._finish(read[:, None], maps.get("gate"))), pending
