"""A sequence divided over devices is one sequence: outputs, states and gradients in float64."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from holo_jax.functional import MemoryState, accumulate, accumulate_parts, decayed_accumulate, decayed_parts
from tests.functional.cases import (
    BATCH,
    FAST_COMPILE,
    HEADS,
    RULES,
    arguments,
    binding_of,
    chained,
    make_inputs,
    relative_error,
    value_and_grad,
)

PARTS, TIME = 4, 20
STATE = ("memory", "residue", "writes")
pytestmark = pytest.mark.devices(PARTS)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def mesh():
    return jax.make_mesh((PARTS,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:PARTS])


def weigh(x):
    return jnp.sum(x * jnp.cos(1.7 * jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)))


def total(outputs, state):
    """As ``cases.loss``: every output and the final state, each entry with its own weight."""
    memory = state.memory + state.residue
    loss = weigh(outputs) + weigh(memory.real) + weigh(jnp.square(memory.imag)) + weigh(state.writes)
    return loss, (outputs, memory, state.writes)


@cache
def divided(rule, method, by_chain=False):
    """Jitted ``(inputs, segments) -> ((loss, results), gradients by name)`` over the parts."""

    def part(inputs, segments):
        outputs, _, final = accumulate_parts(
            partial(accumulate, method=method, chunk_size=3),
            "seq",
            *arguments(inputs),
            binding=binding_of(rule),
            segment_ids=segments,
            initial_state=MemoryState(*(inputs[name] for name in STATE)),
            **(dict(chained=chained) if by_chain else {}),
        )
        return outputs, final

    def loss(inputs, segments):
        specs = {name: P() if name in STATE else P(None, "seq") for name in inputs}
        ids = P(None, "seq")
        run = jax.shard_map(
            part, mesh=mesh(), in_specs=(specs, ids), out_specs=(P(None, "seq"), P()), check_vma=False
        )
        return total(*run(inputs, segments))

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE)


def segments(kind):
    """Parts have 5 positions; ``borders`` has them at a part's beginning, inside one, and twice in one."""
    if kind == "none":
        return None
    cuts = {"borders": [(5, 12, 13), (3, 19)], "long": [(11,), ()]}[kind]
    ids = np.zeros((BATCH, TIME), np.int32)
    for row, places in enumerate(cuts):
        for i, place in enumerate(places):
            ids[row, place:] = (i + 1) % 3
    return ids


@pytest.mark.parametrize("kind", ["none", "borders", "long"])
@pytest.mark.parametrize("rule, by_chain", [*((rule, False) for rule in RULES), ("erase", True)])
def test_parts_equal_the_definition(rule, by_chain, kind):
    """``by_chain`` finds each part's map before its outputs; the others in one pass with them."""
    inputs = make_inputs(rule, TIME)
    ids = segments(kind)
    want, want_gradients = value_and_grad(rule, "recurrent")(inputs, ids)
    got, gradients = divided(rule, "chunked", by_chain)(inputs, ids)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) < 1e-11
    for name in inputs:
        assert relative_error(gradients[name], want_gradients[name]) < 1e-11, name


def test_segments_of_other_parts_change_no_bit():
    """Row 0 has a border at the first position of part 1: nothing before it may be seen after it."""
    inputs, ids = make_inputs("erase", TIME), segments("borders")

    def after(inputs):
        (_, (outputs, _, _)), _ = divided("erase", "chunked")(inputs, ids)
        return outputs[0, 5:]

    changed = {
        name: x if name in STATE else np.concatenate([x[:, :5] * 1.3, x[:, 5:]], 1)
        for name, x in inputs.items()
    }
    changed |= {name: inputs[name] * 1.7 for name in STATE}
    np.testing.assert_array_equal(after(inputs), after(changed))


@pytest.mark.parametrize("kind", ["none", "borders"])
def test_decayed_parts(kind):
    rng = np.random.default_rng(0)
    keys, queries = rng.normal(size=(2, BATCH, TIME, HEADS, 3))
    values = rng.normal(size=(BATCH, TIME, HEADS, 5))
    logs = -rng.uniform(size=(BATCH, TIME, HEADS))
    state = rng.normal(size=(BATCH, HEADS, 3, 5))
    ids = None if kind == "none" else jnp.asarray(segments(kind))

    def whole(*arrays):
        return decayed_accumulate(*arrays[:4], initial_state=arrays[4], segment_ids=ids, method="recurrent")

    def parts(*arrays):
        def part(ids, *arrays):
            return decayed_parts("seq", *arrays[:4], initial_state=arrays[4], segment_ids=ids, chunk_size=3)

        at = P(None, "seq")
        run = jax.shard_map(
            part, mesh=mesh(), in_specs=(at,) * 5 + (P(),), out_specs=(at, P()), check_vma=False
        )
        return run(ids, *arrays)

    def loss(read, *arrays):
        outputs, state = read(*arrays)
        return weigh(outputs) + weigh(state), (outputs, state)

    arrays = (keys, queries, values, logs, state)
    want, got = (
        jax.jit(jax.value_and_grad(partial(loss, read), argnums=tuple(range(5)), has_aux=True))(*arrays)
        for read in (whole, parts)
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) < 1e-11
