"""The arguments of ``accumulate`` as one object that every backend can look at."""

from typing import NamedTuple

import jax.numpy as jnp

from holo_jax.array_types import Array
from holo_jax.functional import MemoryState
from holo_jax.functional.segments import run_index

# What the kernels call their results, for rematerialisation policies.
READ_NAME = "memory_read"
SCALED_NAME = "scaled_values"


class Call(NamedTuple):
    """Arguments of ``holo_jax.functional.accumulate``; see there."""

    write_phases: Array
    read_phases: Array
    values: Array
    gates: Array | None
    erase: Array | None
    binding: str
    method: str = "chunked"
    segment_ids: Array | None = None
    initial_state: MemoryState | None = None
    chunk_size: int | None = None

    @property
    def well_formed(self) -> bool:
        """Whether shapes and dtypes fit together; the portable form says in detail what does not."""
        if self.values.ndim != 4 or self.write_phases.ndim != 4 or self.read_phases.ndim != 4:
            return False
        b, t, h, d = self.values.shape
        m = self.write_phases.shape[-1]
        matrix = self.binding == "outer"
        state_shape = (b, h, m, d) if matrix else (b, h, d)
        state, ids = self.initial_state, self.segment_ids
        return (
            t >= 1
            and (matrix or (self.binding == "hadamard" and m == d and self.erase is None))
            and all(p.shape in ((b, t, h, m), (1, t, h, m)) for p in (self.write_phases, self.read_phases))
            and all(p.dtype == jnp.float32 for p in (self.write_phases, self.read_phases))
            and all(
                g is None or (g.shape == (b, t, h) and jnp.issubdtype(g.dtype, jnp.floating))
                for g in self[3:5]
            )
            and (ids is None or (ids.shape == (b, t) and jnp.issubdtype(ids.dtype, jnp.integer)))
            and (
                state is None
                or (
                    state.memory.shape == state.residue.shape == state_shape
                    and state.memory.dtype == state.residue.dtype == jnp.complex64
                    and state.writes.shape == (b, h)
                    and state.writes.dtype == jnp.float32
                )
            )
        )


def total_writes(call: Call) -> Array:
    """float32 ``[b, h]``: sum of g^2 over the last segment of each row, the state's ``writes``."""
    b, t, h, _ = call.values.shape
    gates = jnp.ones((b, t, h), jnp.float32) if call.gates is None else call.gates.astype(jnp.float32)
    before = jnp.zeros((b, h), jnp.float32) if call.initial_state is None else call.initial_state.writes
    if call.segment_ids is None:
        return before + jnp.sum(jnp.square(gates), axis=1)
    runs = run_index(call.segment_ids)
    last = runs[:, -1:]
    own = jnp.where((runs == last)[..., None], jnp.square(gates), 0.0)
    return jnp.sum(own, axis=1) + jnp.where(last == 0, before, 0.0)
