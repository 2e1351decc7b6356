"""A model of memory layers as arrays stacked over depth, for the kernels that walk all of them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Float, Int
from holo_jax.config import HoloConfig
from holo_jax.generate.pending import Held, Pending
from holo_jax.kernels.decode import heads as decode_heads
from holo_jax.kernels.decode import join as decode_join
from holo_jax.kernels.decode import plan as decode_plan
from holo_jax.kernels.decode import rows as decode_rows
from holo_jax.kernels.decode import rows_plan as decode_rows_plan
from holo_jax.kernels.decode import shape as decode_shape
from holo_jax.model import HoloForCausalLM


@partial(jax.jit, static_argnums=1)
def deal(model: HoloForCausalLM, programs: int) -> dict[str, Array]:
    """The weights of all blocks by the names of ``decode_rows.run``; of a model in decoding form."""
    config = model.config
    periods: Any = model.model.periods
    blocks = [block for period in periods for block in period.blocks]
    maps = [own for period in folded(model) for own in period]
    own = [
        _transposed(block) | {name: weight.T for name, weight in normed.items()}
        for block, normed in zip(blocks, maps, strict=True)
    ]
    shape = shape_of(config, 1, 1, programs)
    products = _products(config, own).items()
    dealt = {name: decode_rows_plan.dealt(shape, name, weight) for name, weight in products}
    return {**dealt, **_small(config, blocks)}


def _products(config: HoloConfig, blocks: list[dict[str, Array]]) -> dict[str, Array]:
    """Weights in products, stacked over layers, maps head by head."""
    by_head = jnp.asarray(decode_plan.rows_by_head(shape_of(config, 1, 1, 1)))
    stacked = {name: jnp.stack([own[name] for own in blocks]) for name in decode_plan.PRODUCTS}
    return stacked | {"maps": stacked["maps"][:, by_head]}


def _small(config: HoloConfig, blocks: list[Any]) -> dict[str, Array]:
    """What memories have beside the maps, stacked over layers."""

    def stacked(get: Any) -> Array:
        return jnp.stack([get(block) for block in blocks])

    arrays = {
        "read_taps": stacked(lambda block: block.mixer.read_taps[...]),
        "write_taps": stacked(lambda block: block.mixer.write_taps[...]),
    }
    if config.head_norm:
        arrays["head_norm"] = stacked(lambda block: block.mixer.head_norm.weight[...])
    if config.write_gate:
        arrays["write_bias"] = stacked(lambda block: block.mixer.write.bias[...])
    if config.erase:
        arrays["erase_bias"] = stacked(lambda block: block.mixer.erase.bias[...])
    return arrays


@jax.jit
def transposed(model: HoloForCausalLM) -> tuple[tuple[dict[str, Array], ...], ...]:
    """The weights in products of every block, ``[out, in]``; of a model in decoding form."""
    periods: Any = model.model.periods
    return tuple(tuple(_transposed(block) for block in period.blocks) for period in periods)


@jax.jit
def folded(model: HoloForCausalLM) -> tuple[tuple[dict[str, Array], ...], ...]:
    """The maps of every block after norms, with the norms' weights in them; of a model in decoding form."""
    periods: Any = model.model.periods
    return tuple(
        tuple(
            {
                "maps": _times(block.mixer_norm, block.mixer.joined.weight[...]),
                "up": _times(block.mlp_norm, block.mlp.joined.weight[...]),
            }
            for block in period.blocks
        )
        for period in periods
    )


@jax.jit
def folded_head(model: HoloForCausalLM) -> Float[Array, "e v"]:
    """The output projection with the last norm's weight in it; of a model in decoding form."""
    return _times(model.model.norm, model.output_weights.astype(model.config.precision.storage))


@jax.jit
def transposed_head(model: HoloForCausalLM) -> Float[Array, "v e"]:
    """The output projection ``[out, in]`` in the storage dtype; of a model in decoding form."""
    return model.output_weights.T.astype(model.config.precision.storage)


def _times(norm: Any, weight: Float[Array, "e o"]) -> Float[Array, "e o"]:
    """A map with the weight of the norm before it in it."""
    return (norm.weight[...][:, None] * weight).astype(weight.dtype)


def _transposed(block: Any) -> dict[str, Array]:
    return {
        "maps": block.mixer.joined.weight[...].T,
        "out": block.mixer.out.weight[...].T,
        "up": block.mlp.joined.weight[...].T,
        "down": block.mlp.down.weight[...].T,
    }


def shape_of(
    config: HoloConfig, rows: int, size: int, programs: int, interpret: bool = False
) -> decode_shape.Shape:
    """The kernel's sizes."""
    return decode_shape.Shape(
        rows=rows,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_heads,
        m=config.key_dim,
        d=config.head_dim,
        hidden=config.mlp_dim,
        taps=config.short_conv,
        size=size,
        write=config.write_gate,
        erase=config.erase,
        gate=config.output_gate,
        head_norm=config.head_norm,
        scale=config.read_scale,
        phase_scale=config.phase_scale,
        eps=config.norm_eps,
        programs=programs,
        interpret=interpret,
    )


class Moving(NamedTuple):
    """What a token changes: what is pending in all layers, and ``mail`` of the kernel over them.

    ``launch`` is how many launches of that kernel were before the group.
    """

    pending: Pending
    mail: Int[Array, "s w"]
    launch: Int[Array, ""]


class Joined(NamedTuple):
    """A layer after the last token of a group: what was pending, and memory and residue with it."""

    pending: Pending
    memory: Float[Array, "b h k d"]
    residue: Float[Array, "b h k d"]


def heads(
    mixer: Any,
    y: Float[Array, "b f"],
    held: Held,
    pending: Pending,
    numbers: Int[Array, "n b"],
    interpret: bool,
    stream: Float[Array, "b e"] | None = None,
    joins: int = 0,
) -> tuple[Float[Array, "b e"], Pending | Joined]:
    """One layer's memory on the joined maps of a token, by a kernel; to be given to the output map.

    Args:
      mixer: the memory mixer, in decoding form.
      y: its joined maps in float32.
      held, pending: the memory before the group, and the group so far.
      numbers: first rows as of ``counts.numbers``.
      interpret: run in Pallas' interpreter, anywhere.
      stream: the residual stream, if ``y`` is of it times the norm's weight (``folded``).
      joins: see ``decode_heads.run_heads``.

    Returns:
      What the output map is applied to, in the storage dtype, and the group with its write.
    """
    config = mixer.config
    shape = shape_of(config, y.shape[0], pending.keys.shape[2], 1, interpret=interpret)._replace(layers=1)
    arrays = {**held._asdict(), **pending._asdict()}
    arrays |= {"read_taps": mixer.read_taps[...], "write_taps": mixer.write_taps[...]}
    if config.head_norm:
        arrays["head_norm"] = mixer.head_norm.weight[...]
    if config.write_gate:
        arrays["write_bias"] = mixer.write.bias[...]
    if config.erase:
        arrays["erase_bias"] = mixer.erase.bias[...]
    left_out = ("tail",) if joins else ("residue", "tail")
    arrays = {name: array[None] for name, array in arrays.items() if name not in left_out}
    arrays |= {
        "y": y,
        "numbers": numbers,
    }
    if stream is not None:
        arrays["stream"] = stream
    found = decode_heads.run_heads(shape, arrays, jnp.dtype(config.precision.storage), joins=joins)
    after = Pending(*(found[name][0] for name in Pending._fields))
    return found["z"], Joined(after, found["memory"][0], found["residue"][0]) if joins else after


def joined(
    held: Held, pending: Pending, *, size: int, interpret: bool
) -> tuple[Float[Array, "b h k d"], Float[Array, "b h k d"]]:
    """Memory and residue of one layer after a group of ``size`` tokens, by a kernel."""
    return decode_join.join(
        held.memory, held.residue, pending.keys, pending.written, size=size, interpret=interpret
    )


def through(
    shape: decode_shape.Shape,
    weights: dict[str, Array],
    x: Float[Array, "b e"],
    hidden: Float[Array, "b e"],
    held: Held,
    moving: Moving,
    numbers: Int[Array, "n b"],
) -> tuple[Float[Array, "b e"], Moving]:
    """One token a row through all blocks; states stacked over layers.

    Args:
      shape: see ``decode_shape.Shape``.
      weights: of ``deal``.
      x: the embedded tokens ``[b, e]`` in the storage dtype.
      hidden: what this function returned for the last token that was read.
      held: as in ``heads``, of all layers.
      moving: see ``Moving``.
      numbers: as in ``heads``.

    Returns:
      The residual stream after the last block, or ``hidden``, and ``moving`` after the token.
    """
    pending, mail, launch = moving
    found = decode_rows.run(
        shape,
        {
            **weights,
            **pending._asdict(),
            "mail": mail,
            "x": x,
            "hidden": hidden,
            "memory": held.memory,
            "writes": held.writes,
            "numbers": numbers,
        },
    )
    after = Pending(*(found[name] for name in Pending._fields))
    return found["hidden"], Moving(after, found["mail"], launch)
