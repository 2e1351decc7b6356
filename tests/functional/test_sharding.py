"""The memory over a mesh: rows and heads are independent, so no data moves, and results are the same."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from holo_jax.functional import accumulate
from tests.functional.cases import BATCH, FAST_COMPILE, HEADS, binding_of, make_inputs

SPEC = P("data", None, "tensor")
NAMES = ("write", "read", "values", "gates", "erase")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@cache
def _mesh():
    return jax.make_mesh((BATCH, HEADS), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def _outputs(rule, *arrays):
    return accumulate(*arrays, binding=binding_of(rule), chunk_size=4)[0]


def _gradient(read):
    def loss(*arrays):
        return jnp.sum(jnp.sin(read(*arrays)))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), compiler_options=FAST_COMPILE)


@pytest.mark.devices(BATCH * HEADS)
@pytest.mark.parametrize("rule", ["hadamard", "erase"])
def test_sharded_rows_and_heads(rule):
    """By the partitioner, without collectives in the gradients, and inside ``shard_map``."""
    inputs = make_inputs(rule, 63, dtype="float32")
    arrays = [jnp.asarray(inputs[name]) for name in NAMES if name in inputs]
    placed = [jax.device_put(x, NamedSharding(_mesh(), SPEC)) for x in arrays]
    here = partial(_outputs, rule)
    mapped = jax.shard_map(here, mesh=_mesh(), in_specs=(SPEC,) * len(arrays), out_specs=SPEC)
    want = _gradient(here)(*arrays)
    program = _gradient(here).lower(*placed).compile()
    text = program.as_text()
    assert [name for name in COLLECTIVES if f" {name}(" in text or f" {name}-start(" in text] == []
    for got in (program(*placed), _gradient(mapped)(*placed)):
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
