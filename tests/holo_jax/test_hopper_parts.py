"""Parts of a divided sequence by the package's kernels: one part, or several, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from holo_jax import kernels
from holo_jax.functional import MemoryState, accumulate
from holo_jax.kernels.hopper import backend as hopper
from holo_jax.kernels.hopper.parts import joined

B, H, M, D = 2, 2, 32, 64


def test_maps_of_pieces_are_joined_in_their_order() -> None:
    maps = np.random.default_rng(0).normal(size=(2, 3, 1, 4 + 5, 4))
    state = np.random.default_rng(1).normal(size=(2, 1, 4, 5))
    want = state
    for piece in range(3):
        transition, added = (np.swapaxes(x, -1, -2) for x in np.split(maps[:, piece], [4], axis=-2))
        want = transition @ want + added
    transition, added = joined(jnp.asarray(maps))
    np.testing.assert_allclose(transition @ state + added, want, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(hopper.missing() is not None, reason=f"needs Hopper's kernels: {hopper.missing()}")
@pytest.mark.parametrize("time", [129, 4096 + 65])
@pytest.mark.parametrize("packed", [False, True])
def test_parts_on_gpus_equal_the_definition(packed: bool, time: int) -> None:
    """Values and gradients, bfloat16 operands against float32, no further off than one device's kernel."""
    devices = jax.devices()
    time *= len(devices)
    keys = jax.random.split(jax.random.key(3), 10)
    write, read = (2 * jax.random.normal(k, (B, time, H, M)) for k in keys[:2])
    values = jax.random.normal(keys[2], (B, time, H, D))
    gates = jax.nn.sigmoid(jax.random.normal(keys[3], (B, time, H)))
    erase = gates * jax.nn.sigmoid(jax.random.normal(keys[4], (B, time, H)) - 2)
    segments = None
    if packed:
        segments = jnp.cumsum(jax.random.bernoulli(keys[5], 0.003, (B, time)), 1).astype(jnp.int32)
        segments = segments.at[1, time // len(devices) :].add(1)  # a border between two parts
    memory = jax.lax.complex(*(jax.random.normal(k, (B, H, M, D)) for k in keys[6:8]))
    weights = jax.random.normal(keys[9], values.shape)

    def objective(run):
        def total(memory, *inputs):
            state = MemoryState(memory, jnp.zeros_like(memory), jnp.ones((B, H)))
            outputs, after = run(state, *inputs)
            return jnp.sum(outputs * weights) + jnp.sum(jnp.square(after.memory.real)), (outputs, after)

        return jax.jit(jax.value_and_grad(total, argnums=tuple(range(6)), has_aux=True))

    options = dict(binding="outer", segment_ids=segments)

    def exact(state, *inputs):
        return accumulate(*inputs, initial_state=state, method="chunked", **options)

    def mesh_of(*devices):
        return jax.make_mesh((len(devices),), ("seq",), axis_types=(AxisType.Auto,), devices=devices)

    def whole(state, *inputs):
        # Inside a mesh of one device, as with several present nothing else runs a kernel.
        def run(state, write, read, values, *rest):
            found = kernels.accumulate(
                write,
                read,
                values.astype(jnp.bfloat16),
                *rest,
                initial_state=state,
                backend="hopper",
                **options,
            )
            return found[0], found[1]

        return jax.shard_map(run, mesh=mesh_of(devices[0]), in_specs=P(), out_specs=P(), check_vma=False)(
            state, *inputs
        )

    def parts(state, *inputs):
        def part(state, segments, write, read, values, *rest):
            found = kernels.accumulate_parts(
                "seq",
                write,
                read,
                values.astype(jnp.bfloat16),
                *rest,
                binding="outer",
                segment_ids=segments,
                initial_state=state,
                backend="hopper",
            )
            return found[0], found[2]

        at = P(None, "seq")
        mesh = mesh_of(*devices)
        specs = (P(), at, *(at for _ in inputs))
        run = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=(at, P()), check_vma=False)
        return run(state, segments, *inputs)

    arguments = (memory, write, read, values, gates, erase)
    # The package's own code promotes ranks.
    with jax.numpy_rank_promotion("allow"):
        want, one, several = (objective(run)(*arguments) for run in (exact, whole, parts))
    names = ["outputs", "memory", "residue", "writes"]
    names += [f"d_{name}" for name in ("memory", "write", "read", "values", "gates", "erase")]
    for name, x, y, z in zip(
        names,
        *(jax.tree.leaves((found[0][1], found[1])) for found in (want, one, several)),
        strict=True,
    ):
        scale = float(jnp.linalg.norm(x)) or 1.0
        own, ours = (float(jnp.linalg.norm(jnp.asarray(found) - x)) / scale for found in (y, z))
        assert ours < 1.5 * own + 1e-5, (name, own, ours)
