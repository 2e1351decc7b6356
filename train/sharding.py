"""Where every array of a run lives: the device mesh, and every array's sharding on it.

The model names the axes of its parameters ("embed", "heads", ...); which mesh axis each lies on, and where
activations lie, is said in ``holo_jax.parallel``.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from holo_jax.config import HoloConfig
from holo_jax.parallel import BATCH_AXES, MESH_AXES, PARAMETER_AXES, SEQ, TENSOR, parameter_layout
from train.errors import MeshError
from train.run_config import MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, seq, tensor) over the first ``config.devices`` of ``devices``, by default all.

    Raises:
      MeshError: if there are too few, or the sizes do not multiply to their number.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    # Auto leaves the inner layout to the compiler; jax.make_mesh's own default is Explicit.
    devices = devices[: math.prod(sizes)]
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def mesh_sizes(config: MeshConfig, present: int) -> tuple[int, ...]:
    """Sizes of the mesh axes over the first ``config.devices`` of the devices that are ``present``.

    Raises:
      MeshError: if there are too few, or the sizes do not multiply to their number.
    """
    if config.devices > present:
        raise MeshError(f"mesh.devices is {config.devices}; it must be at most the {present} present")
    used = config.devices or present
    sizes = [config.data, config.fsdp, config.seq, config.tensor]
    others = math.prod(sizes[1:])
    if sizes[0] == -1:
        if used % others:
            raise MeshError(f"mesh fsdp x seq x tensor = {others} must divide the {used} device(s) used")
        sizes[0] = used // others
    if math.prod(sizes) != used:
        shape = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise MeshError(f"mesh {shape} = {math.prod(sizes)}; it must equal the {used} device(s) used")
    return tuple(sizes)


def check_batch(
    mesh: Mesh | AbstractMesh, global_batch_size: int, accumulation_steps: int, context_length: int
) -> None:
    """Checks that batches divide over the mesh.

    Raises:
      MeshError: with the sizes that do not fit.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if global_batch_size % (ways * accumulation_steps):
        raise MeshError(
            f"global_batch_size {global_batch_size} must be a multiple of mesh.data x mesh.fsdp x "
            f"accumulation_steps = {mesh.shape['data']} x {mesh.shape['fsdp']} x {accumulation_steps}"
        )
    if context_length % mesh.shape["seq"]:
        raise MeshError(f"context_length {context_length} must be a multiple of mesh.seq {mesh.shape['seq']}")


def check_model(mesh: Mesh | AbstractMesh, model: HoloConfig, context_length: int) -> None:
    """Checks that heads divide over the mesh, and that convolutions reach into one part of a sequence only.

    Widths are checked with the parameters (``parameter_shardings``).

    Raises:
      MeshError: with the sizes that do not fit.
    """
    if model.num_heads % mesh.shape[TENSOR]:
        raise MeshError(
            f"model has {model.num_heads} heads; they must be a multiple of mesh.tensor {mesh.shape[TENSOR]}"
        )
    part = context_length // mesh.shape[SEQ]
    reach = max(4 if "ssm" in model.layer_kinds else model.short_conv, model.value_conv, 2) - 1
    if mesh.shape[SEQ] > 1 and part < reach:
        raise MeshError(
            f"context_length / mesh.seq = {part}; it must be at least the {reach} token(s) that a "
            "convolution of the model reaches back"
        )


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of scalars: a copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of [accumulation, b, t] batches."""
    return NamedSharding(mesh, P(None, BATCH_AXES, SEQ))


def parameter_shardings(mesh: Mesh | AbstractMesh, axes: Any, shapes: Any) -> Any:
    """A sharding for every parameter from the names of its axes.

    Args:
      mesh: the device mesh.
      axes: tree of tuples, one logical name or None a dimension.
      shapes: the same tree of ``jax.ShapeDtypeStruct``.

    Raises:
      MeshError: if a name has no rule, or a dimension does not divide over its mesh axis.
    """

    def one(path: Any, shape: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> NamedSharding:
        where = path_name(path)
        if len(names) != len(shape.shape):
            raise MeshError(f"{where} has axes {names} for shape {shape.shape}; it needs one a dimension")
        unknown = [name for name in names if name is not None and name not in PARAMETER_AXES]
        if unknown:
            raise MeshError(
                f"{where} has the axis {unknown[0]!r}, for which holo_jax/parallel.py has no rule"
            )
        spec = parameter_layout(names)
        for name, target, size in zip(names, spec, shape.shape, strict=True):
            if target is not None and size % mesh.shape[target]:
                raise MeshError(
                    f"{where}: axis {name} of size {size} must be a multiple of mesh.{target} "
                    f"= {mesh.shape[target]}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def optimizer_shardings(mesh: Mesh | AbstractMesh, opt_shapes: Any, param_shardings: Any) -> Any:
    """Moments lie where their parameters lie; counters are replicated.

    A moment is known by its path, which ends with that of its parameter, whatever transformations
    (chains, partitions by kind of parameter) are around it.
    """
    by_path = dict(jax.tree_util.tree_flatten_with_path(param_shardings)[0])
    lengths = sorted({len(path) for path in by_path}, reverse=True)

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        own = (by_path.get(path[-n:]) for n in lengths if len(path) >= n)
        found = next((sharding for sharding in own if sharding is not None), None)
        return replicated(mesh) if found is None or not leaf.shape else found

    return jax.tree_util.tree_map_with_path(sharding, opt_shapes)


def check_processes(mesh: Mesh) -> None:
    """Checks that every process has its share of the mesh.

    Raises:
      MeshError: if some have more devices in it than others.
    """
    counts = [0] * jax.process_count()
    for device in mesh.devices.flat:
        counts[device.process_index] += 1
    if min(counts) != max(counts):
        raise MeshError(
            f"the mesh has {mesh.size} device(s), {min(counts)} to {max(counts)} of each of {len(counts)} "
            "processes; it must have equally many of each (mesh.devices: 0 for all)"
        )


def local_rows(
    sharding: NamedSharding,
    global_batch_size: int,
    accumulation_steps: int = 1,
    devices: Collection[jax.Device] | None = None,
) -> list[int]:
    """Which rows of a global batch a process's devices hold a part of, in the order ``put_batch`` takes them.

    Devices that divide a sequence or the model hold the same rows, wherever they are.

    Args:
      sharding: ``batch_sharding``.
      global_batch_size, accumulation_steps: row ``i`` of the batch is in part ``i // (size / steps)``.
      devices: this process's by default.
    """
    part = global_batch_size // accumulation_steps
    size = part // _ways(sharding)
    inside = [block * size + row for block in _blocks(sharding, devices) for row in range(size)]
    return [first + row for first in range(0, global_batch_size, part) for row in inside]


def _ways(sharding: NamedSharding) -> int:
    return math.prod(sharding.mesh.shape[axis] for axis in BATCH_AXES)


def _blocks(sharding: NamedSharding, devices: Collection[jax.Device] | None) -> list[int]:
    """The numbers of the equal blocks of rows that lie on some devices."""
    here = sharding.addressable_devices if devices is None else devices
    places = sharding.devices_indices_map((1, _ways(sharding), sharding.mesh.shape[SEQ]))
    return sorted({places[device][1].indices(_ways(sharding))[0] for device in here if device in places})


def put_batch(batch: Mapping[str, np.ndarray], accumulation_steps: int, sharding: NamedSharding) -> dict:
    """A process's rows [b, t] (``local_rows``) onto the devices as [accumulation, b / accumulation, t]."""

    def put(rows: np.ndarray) -> jax.Array:
        parts = rows.reshape(accumulation_steps, rows.shape[0] // accumulation_steps, *rows.shape[1:])
        if jax.process_count() == 1:
            return jax.device_put(parts, sharding)
        blocks = _blocks(sharding, None)
        size = parts.shape[1] // len(blocks)

        def part(index: Any) -> np.ndarray:
            first = blocks.index((index[1].start or 0) // size) * size
            return parts[index[0], first : first + size, index[2]]

        shape = (accumulation_steps, size * _ways(sharding), *rows.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return {name: put(batch[name]) for name in ("tokens", "segment_ids")}


def path_name(path: Any) -> str:
    """A tree path as dotted names."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
