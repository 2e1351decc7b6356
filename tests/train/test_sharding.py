"""Meshes, batches and parameters that do not fit are refused with their sizes; the rules hold."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.train.common import micro_config
from train.errors import MeshError
from train.model_functions import model_functions
from train.sharding import (
    MESH_AXES,
    batch_sharding,
    check_batch,
    local_rows,
    make_mesh,
    parameter_shardings,
    path_name,
    put_batch,
)

pytestmark = pytest.mark.devices(8)


def mesh(**sizes: int):
    return make_mesh(micro_config(**{f"mesh__{name}": size for name, size in sizes.items()}).mesh)


def test_mesh_takes_the_devices_that_are_left() -> None:
    assert dict(mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4, "seq": 1, "tensor": 1}
    assert mesh().axis_names == MESH_AXES
    assert dict(mesh(devices=2).shape)["data"] == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(fsdp=3), "fsdp x seq x tensor = 3 must divide the 8 device(s) used"),
        (dict(data=2, fsdp=2), "data 2 x fsdp 2 x seq 1 x tensor 1 = 4; it must equal the 8 device(s)"),
        (dict(devices=9), "mesh.devices is 9; it must be at most the 8 present"),
        (dict(devices=4, data=3), "= 3; it must equal the 4 device(s)"),
        (dict(data=16), "= 16; it must equal the 8 device(s)"),
    ],
)
def test_bad_meshes_are_refused(sizes: dict, message: str) -> None:
    with pytest.raises(MeshError, match=re.escape(message)):
        mesh(**sizes)


def test_bad_batches_are_refused() -> None:
    check_batch(mesh(fsdp=4), 16, 2, 5)
    with pytest.raises(MeshError, match=r"global_batch_size 12 must be a multiple of .* = 2 x 4 x 1"):
        check_batch(mesh(fsdp=4), 12, 1, 4)
    with pytest.raises(MeshError, match=r"context_length 5 must be a multiple of mesh\.seq 2"):
        check_batch(mesh(seq=2), 8, 1, 5)


def test_parameters_follow_their_axes() -> None:
    functions = model_functions(micro_config(model__preset="holo").model)
    at = parameter_shardings(mesh(fsdp=4, tensor=2), functions.axes, functions.shapes)
    specs = {path_name(path): s.spec for path, s in jax.tree_util.tree_flatten_with_path(at)[0]}
    assert specs["model.embedding"] == P("tensor", "fsdp")
    assert specs["model.periods.blocks.0.mlp.down.weight"] == P(None, "tensor", "fsdp")
    assert specs["model.periods.blocks.0.mixer.write.bias"] == P(None, "tensor")
    assert specs["model.norm.weight"] == P(None), "vectors are not divided over fsdp"


def test_axes_that_do_not_divide_or_have_no_rule_are_refused() -> None:
    shape = {"w": jax.ShapeDtypeStruct((6, 4), jnp.float32)}
    with pytest.raises(MeshError, match=r"w: axis embed of size 6 must be a multiple of mesh.fsdp = 4"):
        parameter_shardings(mesh(fsdp=4), {"w": ("embed", "mlp")}, shape)
    with pytest.raises(MeshError, match="w has the axis 'embd', for which"):
        parameter_shardings(mesh(), {"w": ("embd", "mlp")}, shape)
    with pytest.raises(MeshError, match="it needs one a dimension"):
        parameter_shardings(mesh(), {"w": ("embed",)}, shape)


def test_batches_are_cut_into_parts_in_order() -> None:
    rows = np.arange(16 * 2, dtype=np.int32).reshape(16, 2)
    put = put_batch({"tokens": rows, "segment_ids": rows, "positions": rows}, 2, batch_sharding(mesh()))
    assert put.keys() == {"tokens", "segment_ids"}
    np.testing.assert_array_equal(put["tokens"].reshape(16, 2), rows)
    assert put["tokens"].shape == (2, 8, 2)


@pytest.mark.parametrize("sizes", [dict(fsdp=4), dict(fsdp=2, seq=2), dict(seq=4, tensor=2), dict(tensor=4)])
@pytest.mark.parametrize("first", [0, 4])
def test_a_process_reads_the_rows_that_its_devices_hold(sizes: dict[str, int], first: int) -> None:
    """As if the eight devices were those of two processes; a batch in one process is the reference."""
    sharding = batch_sharding(mesh(**sizes))
    rows = np.repeat(np.arange(16, dtype=np.int32)[:, None], 8, axis=1)
    whole = put_batch({"tokens": rows, "segment_ids": rows}, 2, sharding)["tokens"]
    devices = jax.devices()[first : first + 4]
    held = {int(row) for s in whole.addressable_shards if s.device in devices for row in np.unique(s.data)}
    found = local_rows(sharding, 16, 2, devices)
    assert found == sorted(held)
    assert len(found) == 16 // min(2, whole.sharding.mesh.shape["data"] * whole.sharding.mesh.shape["fsdp"])
