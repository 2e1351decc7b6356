"""Kernels of ``1 / sqrt(sum of g^2)`` over a segment so far, by which retrievals are multiplied.

A program walks one head of one row in tiles of ``_ROWS`` runs of ``_STEPS`` positions, forwards for the sums
and backwards for their gradient. A run is summed position by position; what runs and tiles before it leave is
added where it belongs to the same segment, so nothing is a difference of longer sums (Pallas, lowered to
Triton).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array

# A tile of 1,024 positions takes a program of two warps about as long as one small kernel takes to start.
_ROWS, _STEPS = 64, 16
# From here on the levels of a parallel sum are faster than one program a head.
MOST_POSITIONS = 16_384


class _Walk:
    """One head of one row, in either direction."""

    def __init__(self, time: int, inside: Any, *, backwards: bool, interpret: bool) -> None:
        self.time, self.inside, self.backwards = time, inside, backwards
        # The interpreter compiles every position of a run on its own.
        self.rows, self.steps = (4, 4) if interpret else (_ROWS, _STEPS)
        self.row, self.head = pl.program_id(1), pl.program_id(0)
        self.slots = jax.lax.iota(jnp.int32, self.rows)

    def positions(self, places: Array) -> Array:
        return self.time - 1 - places if self.backwards else places

    def _load(self, view: Any, positions: Array, other: Any) -> Array:
        return plgpu.load(view, mask=(positions >= 0) & (positions < self.time), other=other)

    def gates(self, ref: Any, positions: Array) -> Array:
        """``[rows]`` of ``[b, h, t]``."""
        return self._load(ref.at[self.row, self.head, positions], positions, 0.0)

    def factors(self, ref: Any, positions: Array) -> Array:
        """``[rows]`` of ``[b, t, h]``."""
        return self._load(ref.at[self.row, positions, self.head], positions, 0.0)

    def begin(self, positions: Array) -> Array | None:
        """Where the segments of positions begin; None where every row is one."""
        if self.inside is None:
            return None
        row = 0 if self.inside.shape[0] == 1 else self.row
        return positions - self._load(self.inside.at[row, positions], positions, 0)

    def run(self, added: Callable[[Array], Array], store: Callable[[Array, Array], None]) -> None:
        """Stores sums of what positions have ``added``, from where the walk came into their segment."""
        tile = self.rows * self.steps

        def visit(index: Array, before: tuple[Array, Array]) -> tuple[Array, Array]:
            carried, segment = before
            places = index * tile + self.slots * self.steps
            previous = self.begin(self.positions(places - 1))
            begins: list[Array | None] = []
            sums: list[Array] = []
            for step in range(self.steps):
                positions = self.positions(places + step)
                begins.append(self.begin(positions))
                total = added(positions)
                if step:
                    total = total + _where(_same(begins[-1], begins[-2]), sums[-1])
                sums.append(total)
            earlier = self.slots[None, :] < self.slots[:, None]
            if previous is not None and begins[-1] is not None:
                earlier = earlier & (begins[-1][None, :] == previous[:, None])
            left = jnp.sum(jnp.where(earlier, sums[-1][None, :], 0.0), axis=1)
            left = left + _where(None if previous is None else previous == segment, carried)
            for step, begin in enumerate(begins):
                sums[step] = sums[step] + _where(_same(begin, previous), left)
                store(self.positions(places + step), sums[step])
            last = self.slots == self.rows - 1
            after = segment if begins[-1] is None else jnp.sum(jnp.where(last, begins[-1], 0))
            return jnp.sum(jnp.where(last, sums[-1], 0.0)), after

        jax.lax.fori_loop(0, -(-self.time // tile), visit, (jnp.float32(0), jnp.int32(-1)))


def _same(x: Array | None, y: Array | None) -> Array | None:
    return None if x is None or y is None else x == y


def _where(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, 0.0)


def forward(gates: Array, inside: Array | None, *, eps: float, interpret: bool) -> Array:
    """``1 / sqrt(sum of g^2 + eps)``, float32 ``[b, t, h]``.

    Args:
      gates: float32 ``[b, h, t]``.
      inside: int32 positions inside segments, ``[b or 1, t]``; None where every row is one segment.
      eps: added under the root.
      interpret: run in Pallas' interpreter, anywhere.
    """
    b, h, t = gates.shape
    inputs = {"gates": gates} | ({} if inside is None else {"inside": inside})

    def kernel(ins: dict[str, Any], out: Any) -> None:
        walk = _Walk(t, ins.get("inside"), backwards=False, interpret=interpret)

        def store(positions: Array, total: Array) -> None:
            view = out.at[walk.row, positions, walk.head]
            plgpu.store(view, jax.lax.rsqrt(total + eps), mask=positions < t)

        walk.run(lambda positions: jnp.square(walk.gates(ins["gates"], positions)), store)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((b, t, h), jnp.float32),
        grid=(h, b),
        compiler_params=_parameters(interpret),
        interpret=interpret,
        name="write_factors_forward",
    )(inputs)


def backward(
    gates: Array, factors: Array, inside: Array | None, cotangent: Array, *, interpret: bool
) -> Array:
    """The gradient of the gates, ``[b, h, t]``."""
    b, h, t = gates.shape
    inputs = {"gates": gates, "factors": factors, "cotangent": cotangent}
    inputs |= {} if inside is None else {"inside": inside}

    def kernel(ins: dict[str, Any], out: Any) -> None:
        walk = _Walk(t, ins.get("inside"), backwards=True, interpret=interpret)

        def added(positions: Array) -> Array:
            factor = walk.factors(ins["factors"], positions)
            return -factor * factor * factor * walk.factors(ins["cotangent"], positions)

        def store(positions: Array, total: Array) -> None:
            view = out.at[walk.row, walk.head, positions]
            plgpu.store(view, total * walk.gates(ins["gates"], positions), mask=positions >= 0)

        walk.run(added, store)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(gates.shape, jnp.float32),
        grid=(h, b),
        compiler_params=_parameters(interpret),
        interpret=interpret,
        name="write_factors_backward",
    )(inputs)


def _parameters(interpret: bool) -> Any:
    return None if interpret else plgpu.CompilerParams(num_warps=2, num_stages=1)
