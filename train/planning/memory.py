"""Bytes on one device, by part, for a train step: traced and divided, never compiled or run.

State and gradients follow from the shapes and the sharding rules. What loss and backward pass hold is read
from the program that one device traces, with the kernels of the card that is planned for and its exchanges:
the arrays that are written and still needed at its worst moment (``train.planning.liveness``); and, to show
it by part, what the forward pass keeps for the backward pass.
"""

import contextlib
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from holo_jax.config import HoloConfig
from holo_jax.exchange import Exchange
from holo_jax.kernels.block import uses
from holo_jax.kernels.capability import planned_for
from holo_jax.kernels.products.linear_cross_entropy import unsupported as loss_unsupported
from holo_jax.parallel import exchanging
from holo_jax.target import Card
from train.model_functions import model_functions
from train.optimizer import make_optimizer
from train.planning.liveness import live_bytes
from train.run_config import RunConfig
from train.sharding import MESH_AXES, check_batch, check_model, optimizer_shardings, parameter_shardings


class Memory(NamedTuple):
    """Bytes on one device.

    Attributes:
      params: float32 masters.
      optimizer: moments.
      other: counters, the key, and the batch.
      gradients: float32; twice where a batch is accumulated in parts.
      kept: activations that the forward pass keeps.
      working: the rest of what loss and backward pass hold: what a block makes, or computes again.
      gathered: weights of one block, and their gradient, in one piece where ``fsdp`` divides them.
      logits: one chunk of logits and its gradient, and the output weights with theirs.
      update: what the optimizer needs beside moments and gradients.
      traced: the most that loss and backward pass hold beside their arguments, gradients included, by the
        traced program.
    """

    params: int
    optimizer: int
    other: int
    gradients: int
    kept: int
    working: int
    gathered: int
    logits: int
    update: int
    traced: int

    @property
    def state(self) -> int:
        """What lives from step to step, and the batch: the arguments of the compiled step."""
        return self.params + self.optimizer + self.other

    @property
    def phases(self) -> dict[str, int]:
        """Bytes at the moments that can be the largest."""
        summed = self.gradients // 2 if self.accumulated else 0
        return {
            "loss and backward": self.state + summed + self.traced,
            "update": self.state + self.gradients - summed + self.update,
        }

    @property
    def accumulated(self) -> bool:
        """Whether gradients of several parts are summed."""
        return self.gradients > self.params

    @property
    def peak(self) -> int:
        """The largest of ``phases``."""
        return max(self.phases.values())


def estimate_memory(
    config: RunConfig,
    mesh: AbstractMesh,
    card: Card | None = None,
    *,
    packed: bool = True,
    parts: bool = True,
) -> Memory:
    """Bytes on each device of ``mesh`` for a step of ``config``.

    Args:
      config: the run.
      mesh: its axes; devices are not needed.
      card: what each device is; None for those present, then with the memory in portable form.
      packed: whether rows have segment ids, as in training.
      parts: False counts ``kept`` as ``working``, in half the time: the forward pass is not traced by itself.

    Raises:
      MeshError: if batch, heads or parameters do not divide over the mesh.
    """
    check_batch(mesh, config.global_batch_size, config.accumulation_steps, config.context_length)
    check_model(mesh, config.model, config.context_length)
    model, sizes = config.model, mesh.shape
    tensor, fsdp = sizes["tensor"], sizes["fsdp"]
    functions = model_functions(model)
    params_at = parameter_shardings(mesh, functions.axes, functions.shapes)
    optimizer = make_optimizer(config.optimizer, config.num_steps, functions.axes)
    moments = jax.eval_shape(optimizer.init, functions.shapes)
    params = _divided(functions.shapes, params_at)
    rows = config.global_batch_size // (sizes["data"] * fsdp * config.accumulation_steps)
    length = config.context_length // sizes["seq"]
    shard = _shard(model, tensor) if card is not None else _portable(_shard(model, tensor))
    divided = _Divided(fsdp, sizes["seq"], tensor, config.mesh.exchange)
    kept = _kept(shard, rows, length, packed, divided, card) if parts else 0
    width, vocab = shard.hidden_size, shard.vocab_size
    storage, wide = _itemsize(model.precision.storage), _itemsize(model.precision.logits)
    by_kernel = _loss_by_kernel(shard, divided, card)
    if by_kernel:
        wide = storage
    chunk = rows * min(length, max(1, model.loss_chunk // rows))
    period = sum(_bytes(leaf) for leaf in _blocks(functions.shapes)) // model.num_periods // tensor
    # Weights that stay gathered are among what is kept.
    gathered = (2 if config.mesh.reshard_after_forward else 1) * period if fsdp > 1 else 0
    traced = _traced(shard, rows, length, packed, divided, card)
    ways = sizes["data"] * fsdp * sizes["seq"]
    tokens = config.global_batch_size * config.context_length // ways
    return Memory(
        params=params,
        optimizer=_divided(moments, optimizer_shardings(mesh, moments, params_at)),
        other=2 * 4 * tokens + 20,  # tokens and segment ids; step, skipped, nonfinite_run and the key
        gradients=params * (2 if config.accumulation_steps > 1 else 1),
        kept=kept,
        working=max(0, traced - params - kept - gathered),
        gathered=gathered,
        # The kernel's exponentials stand for the logits and are their gradient.
        logits=chunk * vocab * (storage if by_kernel else wide + storage) + width * vocab * (wide + storage),
        update=_update(config, functions.shapes, params_at),
        traced=traced,
    )


def _update(config: RunConfig, shapes: Any, shardings: Any) -> int:
    """Muon holds the orthogonalised updates of all matrices and two iterates of the largest."""
    if config.optimizer.name != "muon":
        return 0
    sizes = [
        _bytes(leaf) // (leaf.size // math.prod(at.shard_shape(leaf.shape)))
        for leaf, at in zip(_blocks(shapes), _blocks(shardings), strict=True)
    ]
    return sum(sizes) + 2 * max(sizes)


class _Divided(NamedTuple):
    """Devices along three axes, and how they send."""

    fsdp: int = 1
    seq: int = 1
    tensor: int = 1
    exchange: Exchange = Exchange()

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.fsdp, self.seq, self.tensor


@functools.lru_cache(maxsize=64)
def _kept(
    config: HoloConfig, rows: int, length: int, packed: bool, divided: _Divided, card: Card | None
) -> int:
    """Bytes that the forward pass of one device's rows [rows, length] keeps, of its blocks and around them.

    Its blocks are a loop here, whatever runs: only a loop shows what it keeps by layer.
    """
    weights = (config.hidden_size, config.vocab_size)
    params, ids, loss = _loss(config.replace(scan_unroll=1), rows, length, packed, divided)
    stacked = 0
    outside: dict[tuple[int, ...], int] = {}
    for leaf in _residuals(loss, divided, card, params, ids, ids):
        if leaf.shape[:1] == (config.num_periods,):
            stacked += _bytes(leaf)
        elif leaf.shape != weights:  # the output weights' gradient is counted as such
            # Wide and narrow forms of one array are one.
            outside[leaf.shape] = min(_bytes(leaf), outside.get(leaf.shape, _bytes(leaf)))
    return stacked + sum(outside.values())


@functools.lru_cache(maxsize=64)
def _traced(
    config: HoloConfig, rows: int, length: int, packed: bool, divided: _Divided, card: Card | None
) -> int:
    """The most bytes that loss and gradient of one device hold beside their arguments."""
    params, ids, loss = _loss(config, rows, length, packed, divided)
    traced = _of_one_device(lambda *given: jax.grad(loss)(*given), divided, card, params, ids, ids)
    return live_bytes(traced, gpu=card is not None)


def _loss(
    config: HoloConfig, rows: int, length: int, packed: bool, divided: _Divided
) -> tuple[Any, jax.ShapeDtypeStruct, Any]:
    """Parameters and ids of one device, by shape, and its summed loss."""
    functions = model_functions(config)
    mesh = AbstractMesh((1, divided.fsdp, 1, 1), MESH_AXES)
    params = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(at.shard_shape(leaf.shape), leaf.dtype),
        functions.shapes,
        parameter_shardings(mesh, functions.axes, functions.shapes),
    )

    def loss(params: Any, tokens: Any, segments: Any) -> Any:
        segments = segments if packed else None
        model = functions.model(params)
        return model.summed_loss(model.model(tokens, segments).hidden, tokens, segments)[0]

    return params, jax.ShapeDtypeStruct((rows, length), jnp.int32), loss


def _loss_by_kernel(config: HoloConfig, divided: _Divided, card: Card | None) -> bool:
    """Whether a kernel computes the loss; it stores 16-bit exponentials in place of logits and gradient."""
    if card is None or divided.tensor > 1 or not uses(config.products_backend, "products"):
        return False
    rows: Any = jax.ShapeDtypeStruct((1, 1, config.hidden_size), jnp.dtype(config.precision.storage))
    weights: Any = jax.ShapeDtypeStruct((config.hidden_size, config.vocab_size), jnp.float32)
    with planned_for(card):
        return loss_unsupported(rows, weights, config.precision.logits) is None


def _residuals(
    function: Any, divided: _Divided, card: Card | None, differentiated: Any, *others: Any
) -> list[Any]:
    """Shapes of what the vjp of ``function`` keeps, its inputs and constants excepted, each once.

    Args:
      function: of one device's arrays.
      divided: over how many devices; see ``_of_one_device``.
      card: of each.
      differentiated, others: its arguments, of one device.
    """

    def backward(differentiated: Any, *others: Any) -> Any:
        return jax.tree.leaves(jax.vjp(lambda x: function(x, *others), differentiated)[1])

    traced = _of_one_device(backward, divided, card, differentiated, *others)
    given = {*traced.invars, *traced.constvars}
    kept = dict.fromkeys(v for v in traced.outvars if not isinstance(v, Literal))
    return [variable.aval for variable in kept if variable not in given]


def _of_one_device(function: Any, divided: _Divided, card: Card | None, *arguments: Any) -> Any:
    """The jaxpr of ``function`` as one of the devices of a mesh runs it, with its exchanges."""
    mesh = AbstractMesh((1, *divided.sizes), MESH_AXES)
    every = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    with exchanging(divided.exchange), contextlib.nullcontext() if card is None else planned_for(card):
        outer = jax.make_jaxpr(every)(*arguments).jaxpr
    (mapped,) = (one for one in outer.eqns if one.primitive.name == "shard_map")
    traced = mapped.params["jaxpr"]
    return getattr(traced, "jaxpr", traced)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shard(HoloConfig):
    """The part of a model that one device of ``ways`` along the tensor axis computes."""

    ways: int = 1

    @property
    def mlp_dim(self) -> int:
        return super().mlp_dim // self.ways

    def replace(self, **changes: Any) -> "_Shard":
        if changes.get("mixer") == "attention":  # an anchor, whose width is that of the whole model
            changes["hd_dim"] = changes["hd_dim"] // self.ways
        return dataclasses.replace(self, **changes)


def _shard(config: HoloConfig, ways: int) -> HoloConfig:
    """Where ``tensor`` divides heads, kernels between products do not run (``holo_jax.parallel``)."""
    if ways == 1:
        return config
    if uses(config.block_backend, "products"):
        config = config.replace(block_backend="products")
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(HoloConfig)}
    divided = {"hd_dim": config.hd_dim // ways, "vocab_size": config.vocab_size // ways}
    return _Shard(**fields | divided, ways=ways)


def _portable(config: HoloConfig) -> HoloConfig:
    """The memory in plain JAX, and blocks in a loop: unrolled where a GPU plans, they would hide it."""
    return config.replace(memory_backend="portable", scan_unroll=1)


def _blocks(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree["model"]["periods"])


def _divided(shapes: Any, shardings: Any) -> int:
    """Bytes on one device."""
    sizes = jax.tree.map(
        lambda leaf, at: math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize, shapes, shardings
    )
    return sum(jax.tree.leaves(sizes))


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _itemsize(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize
