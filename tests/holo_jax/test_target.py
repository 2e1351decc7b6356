"""Traces made for a card that is not here: its kernels while it is told, none before or after."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.speed_parts.models import Size, model_config
from holo_jax import kernels
from holo_jax.functional.stacks import splits_stacks
from holo_jax.kernels import capability
from holo_jax.kernels.capability import compute_capability, installed_version, partitioned, planned_for
from holo_jax.kernels.hopper import backend as hopper
from holo_jax.mixers.attention_shapes import attention_shapes
from holo_jax.target import Card, platform, told
from train.model_functions import model_functions

HOPPER, AMPERE = Card((9, 0), 132), Card((8, 0), 108)
INSTALLED = installed_version("jla", "jax-linear-attention") is not None


def names(jaxpr) -> set[str]:
    """Of the kernels in a jaxpr, those in calls and loops included."""
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("pallas_call", "mpmd_map"):
            found.add(str(eqn.params.get("name") or eqn.primitive.name))
        for value in eqn.params.values():
            for one in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    found |= names(inner)
    return found


def kernels_of(name: str) -> set[str]:
    """In loss and gradient of a block of a model of ``eval.speed``."""
    config = model_config(name, Size(1, 1024, 256))
    functions = model_functions(config)
    ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    loss = lambda params, ids: functions.model(params)(ids, labels=ids).loss  # noqa: E731
    return names(jax.make_jaxpr(jax.grad(loss))(functions.shapes, ids).jaxpr)


@pytest.mark.cpu
def test_one_jitted_function_has_kernels_only_while_a_card_is_told() -> None:
    """JAX's caches are no way from one to the other; what was traced before still runs."""
    phases = jax.random.normal(jax.random.key(0), (1, 64, 2, 32))
    values = jax.random.normal(jax.random.key(1), phases.shape)

    @jax.jit
    def read(phases, values):
        return kernels.accumulate(phases, phases, values, binding="hadamard")[0]

    def found() -> set[str]:
        return names(read.trace(phases, values).jaxpr.jaxpr)

    before = read(phases, values)
    assert not found()
    for card in (HOPPER, AMPERE):
        with planned_for(card):
            assert found()
    assert not found()
    np.testing.assert_array_equal(read(phases, values), before)


@pytest.mark.cpu
def test_what_is_told_holds_inside_and_in_its_thread_alone() -> None:
    def seen():
        return told(), platform(), compute_capability(), splits_stacks(), hopper.missing()

    other = []
    before = seen()
    with planned_for(HOPPER):
        assert seen()[:4] == (HOPPER, "gpu", (9, 0), True)
        assert capability.multiprocessors() == 132
        assert not partitioned()
        with planned_for(AMPERE):
            assert seen()[:3] == (AMPERE, "gpu", (8, 0))
            assert hopper.missing() is not None
        assert seen()[2] == (9, 0)
        assert (hopper.missing() is None) == INSTALLED
        thread = threading.Thread(target=lambda: other.append(seen()))
        thread.start()
        thread.join()
    assert seen() == before == other[0] and before[:2] == (None, "cpu")


@pytest.mark.skipif(not INSTALLED, reason="needs jax-linear-attention")
def test_the_package_of_kernels_remembers_the_card_inside_alone() -> None:
    from jla.ops.mosaic_gpu import _common as package

    before = package.is_hopper()
    for card, expected in ((HOPPER, (True, 132)), (AMPERE, (False, 108))):
        with planned_for(card):
            assert (package.is_hopper(), package.num_sms()) == expected
    with pytest.raises(RuntimeError, match="stops"), planned_for(HOPPER):
        raise RuntimeError("stops")
    assert package.is_hopper() == before and package.jax is jax


@pytest.mark.cpu
@pytest.mark.devices(1)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("seed", {"rotation_forward", "rotation_backward", "gelu_forward", "norm_backward"}),
        ("holo_sum", {"outer_outputs", "outer_writes", "phase_features_forward", "gated_norm_backward"}),
        ("attention", {"attention", "attention_backward", "norm_forward", "norm_backward"}),
    ],
)
def test_a_block_is_traced_with_the_kernels_of_its_card(name: str, expected: set) -> None:
    assert not kernels_of(name)
    with planned_for(HOPPER):
        found = kernels_of(name)
    assert found >= expected
    assert not kernels_of(name)


def test_attention_by_shape_keeps_what_the_kernel_keeps() -> None:
    rows = jax.ShapeDtypeStruct((2, 64, 4, 16), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((2, 1, 64, 64), jnp.bfloat16)
    for given in ((rows,) * 3 + (None,), (rows,) * 3 + (bias,)):
        out, back = jax.eval_shape(lambda *inputs: jax.vjp(attention_shapes, *inputs), *given)
        assert (out.shape, out.dtype) == (rows.shape, rows.dtype)
        kept = sorted(leaf.shape for leaf in jax.tree.leaves(back))
        extra = [] if given[3] is None else [bias.shape]
        assert kept == sorted([rows.shape] * 4 + [(2, 4, 64)] + extra)
