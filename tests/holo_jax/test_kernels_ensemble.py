"""Kernels under vmap: the same values and gradients as vmapping the portable form, from one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax import kernels
from holo_jax.functional import MemoryState, accumulate
from holo_jax.kernels import ensemble
from holo_jax.kernels.call import Call
from holo_jax.kernels.hopper import backend as hopper

B, T, H, M, D = 2, 9, 2, 3, 4


@jax.jit
def arguments():
    keys = jax.random.split(jax.random.key(0), 6)
    normal = jax.random.normal
    write, read = (normal(k, (B, T, H, M)) for k in keys[:2])
    values = normal(keys[2], (B, T, H, D))
    gates, share = jax.nn.sigmoid(normal(keys[3], (2, B, T, H)))
    memory, residue = (jax.lax.complex(*normal(k, (2, B, H, M, D))) for k in keys[4:])
    return write, read, values, gates, gates * share, MemoryState(memory, 1e-3 * residue, jnp.ones((B, H)))


SEGMENTS = jnp.array([[1] * 4 + [2] * 5, [1] * 9])


def portable(call):
    return accumulate(**call._asdict())


@pytest.mark.parametrize("erases", [True, False])
def test_a_grid_equals_its_members(erases):
    """As the evaluations train: rates share a batch, seeds do not; segments are shared by all."""
    seen = []

    def merging(call):
        def run(merged):
            seen.append(merged.values.shape)
            return portable(merged)

        return ensemble.accumulate(run, call)

    def member(run, scale, inputs):
        def loss(inputs):
            write, read, values, gates, erase, state = inputs
            call = Call(
                # Phases of position are shared by the rows of a batch.
                write[:1],
                read,
                scale * values,
                gates,
                erase if erases else None,
                binding="outer",
                segment_ids=SEGMENTS,
                initial_state=state,
                chunk_size=4,
            )
            outputs, after = run(call)
            return jnp.sum(jnp.sin(outputs)) + jnp.sum(jnp.square(jnp.abs(after.memory))), after.writes

        return jax.value_and_grad(loss, has_aux=True)(inputs)

    def grid(run):
        over_rates = jax.vmap(lambda scale, inputs: member(run, scale, inputs), (0, None))
        return jax.jit(jax.vmap(over_rates, (None, 0)))

    seeds = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, 0.8 * x]), arguments())
    scales = jnp.array([0.5, 1.0])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5),
        grid(merging)(scales, seeds),
        grid(portable)(scales, seeds),
    )
    # A kernel has no batching rule: in the end it sees rows only.
    assert (3 * 2 * B, T, H, D) in seen


def test_without_a_kernel_it_is_the_portable_form():
    *inputs, state = arguments()

    def alone(run, **backend):
        options = dict(binding="outer", segment_ids=SEGMENTS, initial_state=state, **backend)
        return jax.jit(lambda *inputs: run(*inputs, **options))(*inputs)

    found, wanted = alone(kernels.accumulate, backend="ensemble"), alone(accumulate)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_with_one_the_kernel_is_given_the_merged_batch(monkeypatch):
    seen = []

    class Kernel:
        @staticmethod
        def unsupported(call):
            return None

        @staticmethod
        def accumulate(call):
            seen.append(call.values.shape)
            return portable(call)

    monkeypatch.setitem(kernels._KERNELS, "hopper", Kernel)
    long = [jnp.tile(x, (1, 8, *[1] * (x.ndim - 2))) for x in arguments()[:5]]

    def run(*inputs):
        return kernels.accumulate(*inputs, backend="ensemble", binding="outer")[0]

    stacked = [jnp.stack([x, x / 2, x / 3]) for x in long]
    found = jax.jit(jax.vmap(run))(*stacked)
    assert seen[-1] == (3 * B, 8 * T, H, D)
    wanted = jax.jit(lambda *inputs: accumulate(*inputs, binding="outer")[0])(*long)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(hopper.missing() is not None, reason="needs the Hopper kernels")
@pytest.mark.parametrize("erases", [True, False])
def test_hopper_under_vmap_is_the_kernel_of_each_member(erases):
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (2, 2, 128, 2)  # members, rows, time, heads
    write, read = (jax.random.normal(k, (*shape, 32)) for k in keys[:2])
    values = jax.random.normal(keys[2], (*shape, 64)).astype(jnp.bfloat16)
    gates, share = jax.nn.sigmoid(jax.random.normal(keys[3], (2, *shape)))
    segments = jnp.cumsum(jax.random.bernoulli(keys[4], 0.02, shape[1:3]), axis=1).astype(jnp.int32)

    def member(backend, write, read, values, gates, share):
        def loss(write, read, values, gates, share):
            erase = gates * share if erases else None
            outputs, _ = kernels.accumulate(
                write, read, values, gates, erase, backend=backend, binding="outer", segment_ids=segments
            )
            return jnp.sum(jnp.sin(outputs)), outputs

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)(
            write, read, values, gates, share
        )

    inputs = (write, read, values, gates, share)
    found = jax.jit(jax.vmap(lambda *x: member("ensemble", *x)))(*inputs)
    alone = jax.jit(lambda *x: member("hopper", *x))
    for index in range(shape[0]):
        wanted = alone(*(x[index] for x in inputs))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            x, y = np.asarray(x[index], np.float64), np.asarray(y, np.float64)
            assert np.linalg.norm(x - y) <= 1e-3 * np.linalg.norm(y)
