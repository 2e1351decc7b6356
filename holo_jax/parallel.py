"""The device mesh as the model sees it: its axes by name, and how activations lie on them.

The model runs on whatever mesh is ambient while it is traced (``on_mesh``, or ``jax.set_mesh``); without
one, or on a mesh of one device, nothing here leaves a trace in the program. Most of the model is left to the
compiler, which needs to be told only where activations lie (``constrain``). What mixes tokens, and what calls
kernels, is written per device (``sharded``): rows over ``data`` and ``fsdp``, time over ``seq``, heads over
``tensor``.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from holo_jax.array_types import Array

DATA, FSDP, SEQ, TENSOR = MESH_AXES = ("data", "fsdp", "seq", "tensor")
BATCH_AXES = (DATA, FSDP)
Tree = Any

_LAYOUT: dict[str, Any] = {"b": BATCH_AXES, "t": SEQ, "h": TENSOR, "_": None}


def layout(names: str) -> P:
    """Mesh axes of an activation by dimension: ``b`` rows, ``t`` time, ``h`` heads or vocabulary, ``_`` none.

    Dimensions that are not named are whole on every device.
    """
    return P(*(_LAYOUT[name] for name in names.split()))


def on_mesh(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Makes ``mesh`` the one that a model traced inside runs on."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def ambient_mesh() -> AbstractMesh | None:
    """The mesh to divide work over: the ambient one if it has the axes above and several devices.

    None inside a ``shard_map`` too, where the work has been divided.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(MESH_AXES) <= set(mesh.axis_names):
        return None
    return None if AxisType.Manual in mesh.axis_types else mesh


def sequence_axis() -> str | None:
    """``"seq"`` where this code runs per device on a part of the sequence, None where it sees all of it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or SEQ not in mesh.axis_names or mesh.shape[SEQ] == 1:
        return None
    manual = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[SEQ] == AxisType.Manual
    return SEQ if manual else None


def tensor_axis() -> str | None:
    """``"tensor"`` where this code runs per device on a part of the heads or vocabulary, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or TENSOR not in mesh.axis_names or mesh.shape[TENSOR] == 1:
        return None
    manual = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[TENSOR] == AxisType.Manual
    return TENSOR if manual else None


def constrain(x: Array, names: str) -> Array:
    """Says where an activation lies; see ``layout``."""
    return x if ambient_mesh() is None else lax.with_sharding_constraint(x, layout(names))


def sharded(function: Callable[..., Any], arguments: Tree, results: Tree) -> Callable[..., Any]:
    """``function`` run once per device on its part of every argument; itself without a mesh.

    Args:
      function: of arrays (or trees, or None) alone; whatever it closes over must not be traced.
      arguments: a layout for each argument, or a tree of layouts that is a prefix of it.
      results: the same of the result. A result that does not name an axis must be equal along it.

    Kernels and collectives are allowed inside, so the compiler's own check of the last condition is off.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=arguments, out_specs=results, check_vma=False)


def check_divides(batch: int, time: int) -> None:
    """Checks that rows and time divide over the ambient mesh.

    Raises:
      ValueError: with the sizes.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return
    ways = mesh.shape[DATA] * mesh.shape[FSDP]
    if batch % ways:
        raise ValueError(
            f"the batch has {batch} rows; it must be a multiple of data x fsdp = {ways} of the mesh"
        )
    if time % mesh.shape[SEQ]:
        raise ValueError(
            f"the batch has {time} tokens a row; it must be a multiple of seq = {mesh.shape[SEQ]}"
        )
