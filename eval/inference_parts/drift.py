"""Error of a running sum over many steps: the compensated step, a plain float32 sum, and float64."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eval.common import Reporter
from eval.results import exact
from eval.speed_parts.timing import say
from holo_jax.array_types import Array
from holo_jax.functional import MemoryState, bind, init_memory, step

_HEADS, _D = 2, 8


class _Sums(NamedTuple):
    ours: MemoryState
    plain: Array
    true: Array


def run(reporter: Reporter, steps: Sequence[int], seed: int) -> None:
    """Relative error of the memory after each number of steps, on coherent and on random inputs.

    Coherent inputs write the same value under the same phase at every step: the sum grows linearly and a
    plain sum rounds the same way each time. The float64 sum adds the same float32 increments.
    """
    cpu = jax.local_devices(backend="cpu")[0]
    for kind in ("coherent", "random"):
        with jax.default_device(cpu), jax.enable_x64(True):
            key = jax.random.key(seed)
            zero = jnp.zeros((1, _HEADS, _D), jnp.complex64)
            sums = _Sums(
                init_memory(1, _HEADS, _D, _D, binding="hadamard", dtype=jnp.float32),
                zero,
                zero.astype(jnp.complex128),
            )
            done = 0
            for count in sorted(steps):
                sums = _advance(sums, key, done, count, kind == "coherent")
                done = count
                true = np.asarray(sums.true)
                ours = np.asarray(sums.ours.memory, np.complex128) + np.asarray(sums.ours.residue)
                for method, value in (("compensated", ours), ("plain", np.asarray(sums.plain))):
                    error = float(np.abs(value - true).max() / np.abs(true).max())
                    where = {"part": "drift", "inputs": kind, "method": method, "steps": count}
                    reporter.add(exact("relative_error", error, **where))
                    say(f"{kind} {method}: relative error {error:.2e} after {count:,} steps")


@partial(jax.jit, static_argnums=4)
def _advance(sums: _Sums, key: Array, begin: Array, end: Array, coherent: bool) -> _Sums:
    def body(index: Array, sums: _Sums) -> _Sums:
        own = jax.random.fold_in(key, jnp.where(coherent, 0, index))
        phase_key, value_key = jax.random.split(own)
        phase = jax.random.uniform(phase_key, (1, _HEADS, _D), jnp.float32, maxval=2 * np.pi)
        value = jax.random.normal(value_key, (1, _HEADS, _D), jnp.float32)
        added = bind(phase, value, binding="hadamard")
        _, ours = step(sums.ours, phase, phase, value)
        return _Sums(ours, sums.plain + added, sums.true + added.astype(jnp.complex128))

    return jax.lax.fori_loop(begin, end, body, sums)
