"""What the devices of a mesh send each other in one train step: bytes and hops by axis, from shapes alone.

Every exchange is a ring: of n devices, an all-gather or reduce-scatter of an array of B bytes sends
B (n - 1) / n from each in n - 1 hops; an all-reduce is one after the other.
Where an axis reaches beyond a node, its ring goes at the rate of the network between nodes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from holo_jax.config import HoloConfig
from holo_jax.model import count_parameters
from train.compilation import JOINED
from train.model_functions import model_functions
from train.planning.hardware import Hardware, Link
from train.run_config import RunConfig
from train.sharding import MESH_AXES


class Exchange(NamedTuple):
    """What one device sends in one step.

    Attributes:
      axis: of the mesh, or axes.
      what: is sent.
      bytes: from each device.
      hops: messages that wait for one another.
      collectives: how many are started.
      link: the network.
    """

    axis: str
    what: str
    bytes: float
    hops: int
    collectives: int
    link: Link

    @property
    def seconds(self) -> float:
        """Duration when nothing else uses the network."""
        return self.link.seconds(self.bytes, self.hops, self.collectives)


def exchanges(config: RunConfig, mesh: AbstractMesh, hardware: Hardware) -> list[Exchange]:
    """Every exchange of a step of ``config`` on ``mesh``; axes of size 1 have none.

    Gradients are sent in ``mesh.reduce_dtype``, weights and activations in the storage dtype. Each of the
    parts of an accumulated batch is taken to gather weights and to sum gradients anew.
    """
    model, sizes = config.model, dict(mesh.shape)
    data, fsdp, seq, tensor = (sizes[axis] for axis in MESH_AXES)
    parts, layers = config.accumulation_steps, model.num_hidden_layers
    again = 1 if model.remat == "none" else 2  # runs of the blocks' forward pass
    rows = config.global_batch_size // (data * fsdp * parts)
    length = config.context_length // seq
    count = count_parameters(model_functions(model).shapes)
    summed = count * jnp.dtype(config.mesh.reduce_dtype).itemsize
    sent = count * jnp.dtype(model.precision.storage).itemsize
    found = []

    def ring(axes: tuple[str, ...], what: str, size: float, times: int, count: int) -> None:
        """``times`` rounds of a ring, by ``count`` collectives in a row, of ``size`` bytes in all."""
        axes = tuple(axis for axis in axes if sizes[axis] > 1)
        if axes and size:
            ways = math.prod(sizes[axis] for axis in axes)
            link = hardware.link(ways, _in_node(axes, sizes, hardware.node_devices))
            share = size * (ways - 1) / ways
            found.append(Exchange(" x ".join(axes), what, share, times * (ways - 1), count, link))

    # Both replicate the weights. What fsdp and tensor divide is summed in the divided form.
    own = summed / (fsdp * tensor)
    started = _started(model)
    ring(("data", "seq"), "gradients, all-reduce", 2 * parts * own, 2 * parts, parts * started)
    gathers, when = (2, "forward and backward") if config.mesh.reshard_after_forward else (1, "once")
    ring(
        ("fsdp",),
        f"weights, gathered {when}; gradients, scattered",
        parts * (gathers * sent + summed) / tensor,
        (gathers + 1) * parts * model.num_periods,
        (gathers + 1) * parts * started,
    )
    state = sum(_part_bytes(model, kind, rows, length) for kind in model.layer_kinds) * model.num_periods
    ring(
        ("seq",),
        "state of each part, forward and backward",
        (again + 1) * parts * seq * state / tensor,
        (again + 1) * parts * layers,
        (again + 1) * parts * layers,
    )
    # The outputs of mixer and denoiser forward, the gradients of their inputs backward; "full" computes the
    # mixer's output again, for the denoiser.
    blocks = 2 if model.mlp != "none" else 1
    reduced = (2 * blocks + (blocks - 1 if model.remat == "full" else 0)) * parts * layers
    activation = rows * length * model.hidden_size * jnp.dtype(model.precision.storage).itemsize
    ring(
        ("tensor",),
        "activations, all-reduce around mixer and denoiser",
        2 * reduced * activation,
        2 * reduced,
        reduced,
    )
    return found


def _started(model: HoloConfig) -> int:
    """How many collectives sum the gradients: a layer's are joined (``train.compilation``), others not."""
    shapes = model_functions(model).shapes
    layered = jax.tree.leaves(shapes["model"]["periods"])
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in layered) / model.num_periods
    pieces = min(len(layered), math.ceil(size / JOINED))
    return pieces * model.num_periods + len(jax.tree.leaves(shapes)) - len(layered)


def _in_node(axes: tuple[str, ...], sizes: dict[str, int], node: int) -> int:
    """Members of a ring over ``axes`` in one node; devices are numbered with the last axis fastest."""
    members = 1
    for axis in axes:
        stride = math.prod(sizes[a] for a in MESH_AXES[MESH_AXES.index(axis) + 1 :])
        members *= min(sizes[axis], max(1, node // stride))
    return members


def _part_bytes(config: HoloConfig, kind: str, rows: int, length: int) -> int:
    """What one device tells of its part of a sequence in one layer; only attention's grows with it."""
    wide = jnp.dtype(config.precision.memory).itemsize
    heads = config.num_heads
    if kind == "attention":
        width = config.hd_dim if config.mixer == "attention" else config.hidden_size
        return 2 * rows * length * width * jnp.dtype(config.precision.storage).itemsize
    if kind == "ssm":
        return rows * (config.hd_dim * config.ssm_state + heads) * wide
    taps = max(config.short_conv - 1, 1) if config.addressing != "position" else 0
    halo = taps * heads * config.key_dim * jnp.dtype(config.precision.phases).itemsize
    memories = 2 if config.addressing == "both" else 1
    if config.binding == "hadamard":
        return rows * (memories * 2 * config.hd_dim * wide + halo)
    transition = heads * (2 * config.phasors) ** 2 if config.erase else 0
    return rows * ((2 * config.phasors * config.hd_dim + transition + heads) * wide + halo)
