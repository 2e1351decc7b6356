"""Inputs and compiled functions shared by the memory tests; compiled once per rule, method and shape."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from holo_jax.functional import MemoryState, accumulate
from holo_jax.functional.memory.chain import Part, chain

RULES = ("hadamard", "outer", "erase")
METHODS = ("recurrent", "associative_scan", "chunked")
BATCH, HEADS, M, D = 2, 2, 3, 5
# The tests compile many tiny programs: optimising them costs more than it saves.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def binding_of(rule):
    return "hadamard" if rule == "hadamard" else "outer"


def make_inputs(rule, time, *, kind="random", dtype="float64", seed=0, shared_phases=False):
    """Arrays by name. ``coherent``: one phase, positive values, gates of 1, so that sums grow linearly."""
    rng = np.random.default_rng(seed)
    m, d = (D, D) if rule == "hadamard" else (M, D)
    rows = 1 if shared_phases else BATCH
    write, read = (rng.normal(size=(rows, time, HEADS, m)) * 3 for _ in range(2))
    values = rng.normal(size=(BATCH, time, HEADS, d))
    gates, share = rng.uniform(size=(2, BATCH, time, HEADS))
    if kind == "coherent":
        write, read = np.full_like(write, 0.7), np.full_like(read, 0.7)
        values, gates = np.abs(values[:, :1]) + np.zeros_like(values), np.ones_like(gates)
    shape = (BATCH, HEADS, d) if rule == "hadamard" else (BATCH, HEADS, m, d)
    memory = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    inputs = {
        "write": write,
        "read": read,
        "values": values,
        "gates": gates,
        "memory": memory,
        "residue": 0.1 * memory[::-1],
        "writes": rng.uniform(size=(BATCH, HEADS)),
    }
    if rule == "erase":
        inputs["erase"] = gates * (0.05 if kind == "coherent" else share)
    if dtype == "float64":
        return inputs
    complex_dtype = "complex64"
    return {k: v.astype(complex_dtype if np.iscomplexobj(v) else dtype) for k, v in inputs.items()}


def make_segments(time, seed=0):
    """Ids per row with borders at the first and last inner positions too, and an id that returns."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((BATCH, time), np.int32)
    for b in range(BATCH):
        cuts = (
            sorted(rng.choice(np.arange(1, time), size=min(4, time - 1), replace=False)) if time > 1 else []
        )
        for i, cut in enumerate([*cuts, time - 1] if time > 1 else []):
            ids[b, cut:] = (i + 1) % 3
    return ids


def arguments(inputs):
    """Phases, values and gates in the order in which all forms take them."""
    return (*(inputs[name] for name in ("write", "read", "values", "gates")), inputs.get("erase"))


def run(inputs, rule, method, segments=None, chunk=None):
    """``accumulate`` on arrays by name."""
    state = MemoryState(inputs["memory"], inputs["residue"], inputs["writes"])
    return accumulate(
        *arguments(inputs),
        binding=binding_of(rule),
        method=method,
        segment_ids=segments,
        initial_state=state,
        chunk_size=chunk,
    )


@cache
def forward(rule, method, chunk=None):
    return jax.jit(
        lambda inputs, segments=None: run(inputs, rule, method, segments, chunk),
        compiler_options=FAST_COMPILE,
    )


def loss(rule, method, chunk, inputs, segments):
    """A function of every output and of the final state, with a different weight on each entry."""
    outputs, state = run(inputs, rule, method, segments, chunk)
    memory = state.memory + state.residue

    def weigh(x):
        return jnp.sum(x * jnp.cos(1.7 * jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)))

    total = weigh(outputs) + weigh(memory.real) + weigh(jnp.square(memory.imag)) + weigh(state.writes)
    return total, (outputs, memory, state.writes)


@cache
def value_and_grad(rule, method, chunk=None):
    """Jitted ``(inputs, segments) -> ((loss, results), gradients by name)``."""
    return jax.jit(
        jax.value_and_grad(partial(loss, rule, method, chunk), has_aux=True), compiler_options=FAST_COMPILE
    )


def relative_error(x, y):
    """Largest difference over the largest magnitude of ``y``."""
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape
    return float(np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-30))


def chained(*inputs, axis, continues, initial, segment_ids=None, **options):
    """``accumulate_parts``'s erase rule by a chain, each part by the portable form and its own gradient."""

    def run(inputs, segment_ids, start):
        memory = jax.lax.complex(*jnp.split(start, 2, axis=-2))
        begin = MemoryState(memory, jnp.zeros_like(memory), jnp.zeros(start.shape[:2], start.dtype))
        outputs, after = accumulate(*inputs, segment_ids=segment_ids, initial_state=begin, **options)
        after = after.memory + after.residue
        return outputs, jnp.concatenate([after.real, after.imag], axis=-2)

    def maps(inputs, segment_ids):
        # A value channel for each entry of the state before it.
        write, _, values, gates, erase = inputs
        b, t, h, d = values.shape
        k = 2 * write.shape[-1]
        widened = jnp.concatenate([values, jnp.zeros((b, t, h, k), values.dtype)], -1)
        start = jnp.zeros((b, h, k, d + k), initial.dtype).at[..., d:].set(jnp.eye(k, dtype=initial.dtype))
        _, after = run((write, write, widened, gates, erase), segment_ids, start)
        return after[..., d:], after[..., :d], None

    def read(inputs, segment_ids, found, start):
        (outputs, _), pull = jax.vjp(lambda x, s: run(x, segment_ids, s), inputs, start)
        return outputs, pull

    def gradient(pull, cotangent):
        return pull((cotangent, jnp.zeros_like(initial)))[1], None

    def finish(pull, found, cotangent, of_end):
        return pull((cotangent, of_end))[0]

    return chain(Part(maps, read, gradient, finish), axis, inputs, segment_ids, continues, initial)
