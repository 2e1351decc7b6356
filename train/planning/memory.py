"""Bytes on one device, by part, for a train step: traced and divided, never compiled or run.

State and gradients follow from the shapes and the sharding rules. What loss and backward pass hold is read
from the program that one device traces, its exchanges included: the arrays that are written and still needed
at its worst moment (``train.planning.liveness``); and, to show it by part, what the forward pass keeps for
the backward pass. Of memory and attention by kernels a trace says nothing: there only what the forward pass
keeps is read from it, and what a block computes again and a kernel keeps are rules, given where they are
used; they were set with three measured programs in view (``tests/train/test_plan.py``).
"""

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
from holo_jax.functional import accumulate
from holo_jax.parallel import exchanging
from train.model_functions import model_functions
from train.optimizer import make_optimizer
from train.planning.liveness import live_bytes
from train.run_config import RunConfig
from train.sharding import MESH_AXES, check_batch, check_model, optimizer_shardings, parameter_shardings

_KERNEL_WIDTHS = (64, 128)


class Memory(NamedTuple):
    """Bytes on one device.

    Attributes:
      params: float32 masters.
      optimizer: moments.
      other: counters, the key, and the batch.
      gradients: float32; twice where a batch is accumulated in parts.
      kept: activations that the forward pass keeps.
      working: what one block computes again in the backward pass.
      gathered: weights of one block, and their gradient, in one piece where ``fsdp`` divides them.
      logits: one chunk of logits and its gradient, and the output weights with theirs.
      update: what the optimizer needs beside moments and gradients.
      traced: the most that loss and backward pass hold beside their arguments, gradients included, by the
        traced program; None where the rules for a kernel stand for it.
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
    traced: int | None = None

    @property
    def state(self) -> int:
        """What lives from step to step, and the batch: the arguments of the compiled step."""
        return self.params + self.optimizer + self.other

    @property
    def phases(self) -> dict[str, int]:
        """Bytes at the moments that can be the largest."""
        summed = self.gradients // 2 if self.accumulated else 0
        if self.traced is not None:
            return {
                "loss and backward": self.state + summed + self.traced,
                "update": self.state + self.gradients - summed + self.update,
            }
        return {
            "loss": self.state + summed + self.kept + self.logits,
            "backward": self.state + self.gradients + self.kept + self.working + self.gathered,
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
    config: RunConfig, mesh: AbstractMesh, *, kernels: bool = True, packed: bool = True
) -> Memory:
    """Bytes on each device of ``mesh`` for a step of ``config``.

    Args:
      config: the run.
      mesh: its axes; devices are not needed.
      kernels: whether the memory runs by a kernel where one supports it, as on the planned GPU, or in
        portable form.
      packed: whether rows have segment ids, as in training.

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
    shard = _shard(model, tensor)
    divided = _Divided(fsdp, sizes["seq"], tensor, config.mesh.exchange)
    by_kernel = kernels and _by_kernel(model, packed)
    activations = _activations(shard, rows, length, by_kernel, packed, divided)
    width, vocab = shard.hidden_size, shard.vocab_size
    storage, wide = _itemsize(model.precision.storage), _itemsize(model.precision.logits)
    chunk = rows * min(length, max(1, model.loss_chunk // rows))
    period = sum(_bytes(leaf) for leaf in _blocks(functions.shapes)) // model.num_periods // tensor
    # Weights that stay gathered are among what is kept.
    gathered = (2 if config.mesh.reshard_after_forward else 1) * period if fsdp > 1 else 0
    traced, working = None, activations.working
    if not by_kernel:
        traced = _traced(shard, rows, length, packed, divided)
        working = max(0, traced - params - activations.kept - gathered)
    ways = sizes["data"] * fsdp * sizes["seq"]
    tokens = config.global_batch_size * config.context_length // ways
    return Memory(
        params=params,
        optimizer=_divided(moments, optimizer_shardings(mesh, moments, params_at)),
        other=2 * 4 * tokens + 20,  # tokens and segment ids; step, skipped, nonfinite_run and the key
        gradients=params * (2 if config.accumulation_steps > 1 else 1),
        kept=activations.kept,
        working=working,
        gathered=gathered,
        logits=chunk * vocab * (wide + storage) + width * vocab * (wide + storage),
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


class _Activations(NamedTuple):
    kept: int
    working: int


@functools.lru_cache(maxsize=64)
def _activations(
    config: HoloConfig, rows: int, length: int, by_kernel: bool, packed: bool, divided: _Divided
) -> _Activations:
    """Activations of one device's rows [rows, length], which may be parts of a divided sequence.

    What is computed again is given only where the memory runs by a kernel.
    """
    portable = config.replace(memory_backend="portable")
    kept = _kept(portable, rows, length, packed, divided)
    if not by_kernel:
        return _Activations(kept.stacked + kept.outside, 0)
    memories = sum(kind == "holo" for kind in config.layer_kinds)  # of one period
    token = rows * length * _itemsize(config.precision.storage)
    keys = config.num_heads * 2 * config.phasors
    # A part of a divided sequence keeps inverses of chunks and what segments need as well: about as much as
    # more channels. A million tokens over four H200: 25.5 GiB by this, 28.3 by XLA's plan.
    channels = config.hd_dim + (keys if divided.seq > 1 and config.erase else 0)
    # What a kernel keeps: the features of both phases, the written values and the read.
    op = token * (2 * keys + 2 * channels)
    stacked = kept.stacked
    if config.remat == "none":
        stacked += memories * config.num_periods * (op - _memory_op(portable, rows, length, packed))
        return _Activations(stacked + kept.outside, 0)
    if config.remat == "dots":
        stacked += memories * config.num_periods * token * channels
    whole = _kept(portable.replace(remat="none"), rows, length, packed, divided)
    again = (whole.materialised - kept.materialised) // config.num_periods
    return _Activations(stacked + kept.outside, max(0, again) + memories * op)


def _by_kernel(config: HoloConfig, packed: bool) -> bool:
    """Whether a mixer runs by a kernel on Hopper; attention is planned so without segments only.

    Packed rows run by cuDNN as well where there is no window; their plan still holds scores of all pairs,
    which is more than is needed.
    """
    if "attention" in config.layer_kinds and not packed:
        return True
    return "holo" in config.layer_kinds and _kernel_supports(config)


def _kernel_supports(config: HoloConfig) -> bool:
    """Whether the Hopper kernels take this memory (``holo_jax.kernels.hopper.unsupported``)."""
    return (
        config.memory_backend in ("auto", "hopper")
        and config.binding == "outer"
        and config.memory_method == "chunked"
        and config.chunk_size in (0, 64)
        and config.precision.storage in ("bfloat16", "float16")
        and 2 * config.phasors in _KERNEL_WIDTHS
        and config.head_dim in _KERNEL_WIDTHS
    )


class _Kept(NamedTuple):
    """Bytes that the forward pass keeps.

    Attributes:
      stacked: of the blocks, over depth.
      materialised: those of them that are written to memory when a block is computed again. Steps between two
        arrays of the storage dtype are element-wise, so the compiler fuses them; scores of pairs are not.
      outside: before and after the blocks.
    """

    stacked: int
    materialised: int
    outside: int


@functools.lru_cache(maxsize=64)
def _kept(config: HoloConfig, rows: int, length: int, packed: bool, divided: _Divided) -> _Kept:
    weights = (config.hidden_size, config.vocab_size)
    attends = "attention" in config.layer_kinds
    params, ids, loss = _loss(config, rows, length, packed, divided)
    stacked = materialised = 0
    outside: dict[tuple[int, ...], int] = {}
    for leaf in _residuals(loss, divided, params, ids, ids):
        size = _bytes(leaf)
        if leaf.shape[:1] == (config.num_periods,):
            pairs = attends and leaf.ndim > 4 and leaf.shape[-2:] == (length, length)
            if pairs and not packed:
                continue  # without segments attention runs by a kernel, which keeps no scores
            stacked += size
            materialised += size if pairs or leaf.dtype == config.precision.storage else 0
        elif leaf.shape != weights:  # the output weights' gradient is counted as such
            # Wide and narrow forms of one array are one.
            outside[leaf.shape] = min(size, outside.get(leaf.shape, size))
    return _Kept(stacked, materialised, sum(outside.values()))


@functools.lru_cache(maxsize=64)
def _memory_op(config: HoloConfig, rows: int, length: int, packed: bool) -> int:
    """Bytes that the portable form of one layer's memory keeps for its own backward pass."""
    h, m, d = config.num_heads, config.key_dim, config.head_dim
    shape = lambda *tail: jax.ShapeDtypeStruct((rows, length, h, *tail), jnp.float32)  # noqa: E731
    values = jax.ShapeDtypeStruct((rows, length, h, d), jnp.dtype(config.precision.storage))
    inputs = [shape(m), shape(m), values, shape()]
    inputs += [shape()] if config.erase else []
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def read(inputs: Any, segments: Any) -> Any:
        return accumulate(
            *inputs,
            binding=config.binding,
            method=config.memory_method,
            segment_ids=segments if packed else None,
            chunk_size=config.chunk_size or None,
        )[0]

    return sum(_bytes(leaf) for leaf in _residuals(read, _Divided(), inputs, segments))


@functools.lru_cache(maxsize=64)
def _traced(config: HoloConfig, rows: int, length: int, packed: bool, divided: _Divided) -> int:
    """The most bytes that loss and gradient of one device hold beside their arguments, in portable form."""
    portable = config.replace(memory_backend="portable")
    params, ids, loss = _loss(portable, rows, length, packed, divided)
    traced = _of_one_device(lambda *given: jax.grad(loss)(*given), divided, params, ids, ids)
    return live_bytes(traced)


def _loss(
    config: HoloConfig, rows: int, length: int, packed: bool, divided: _Divided
) -> tuple[Any, jax.ShapeDtypeStruct, Any]:
    """Parameters and ids of one device, by shape, and its summed loss.

    Its blocks are a loop, whatever the machine that plans would run: only a loop shows what it keeps by
    layer. Unrolled on a GPU they hold less (`holo` with dots, 8 x 4,096: 17.0 GiB where a loop took 18.1).
    """
    functions = model_functions(config.replace(scan_unroll=1))
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


def _residuals(function: Any, divided: _Divided, differentiated: Any, *others: Any) -> list[Any]:
    """Shapes of what the vjp of ``function`` keeps, its inputs and constants excepted, each once.

    Args:
      function: of one device's arrays.
      divided: over how many devices; see ``_of_one_device``.
      differentiated, others: its arguments, of one device.
    """

    def backward(differentiated: Any, *others: Any) -> Any:
        return jax.tree.leaves(jax.vjp(lambda x: function(x, *others), differentiated)[1])

    traced = _of_one_device(backward, divided, differentiated, *others)
    given = {*traced.invars, *traced.constvars}
    kept = dict.fromkeys(v for v in traced.outvars if not isinstance(v, Literal))
    return [variable.aval for variable in kept if variable not in given]


def _of_one_device(function: Any, divided: _Divided, *arguments: Any) -> Any:
    """The jaxpr of ``function`` as one of the devices of a mesh runs it, with its exchanges."""
    if divided.sizes == (1, 1, 1):
        return jax.make_jaxpr(function)(*arguments).jaxpr
    mesh = AbstractMesh((1, *divided.sizes), MESH_AXES)
    every = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    with exchanging(divided.exchange):
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
    if ways == 1:
        return config
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(HoloConfig)}
    divided = {"hd_dim": config.hd_dim // ways, "vocab_size": config.vocab_size // ways}
    return _Shard(**fields | divided, ways=ways)


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
