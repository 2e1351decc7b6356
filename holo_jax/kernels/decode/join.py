"""Writes of a group of tokens join the memory of a layer (Pallas, lowered to Triton).

``M + R <- M + R + sum_c k_c w_c^T``, compensated as in ``functional.memory.state.compensated_add``. The sum
over a group stays in registers, and memory ``M`` and residue ``R`` are read and written once, in place.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from holo_jax.array_types import Array, Float
from holo_jax.functional.memory.state import compensated_add

_WARPS = 4


def join(
    memory: Float[Array, "b h k d"],
    residue: Float[Array, "b h k d"],
    keys: Float[Array, "b h c k"],
    written: Float[Array, "b h c d"],
    *,
    size: int,
    interpret: bool = False,
) -> tuple[Float[Array, "b h k d"], Float[Array, "b h k d"]]:
    """Memory and residue after a group.

    Args:
      memory, residue: as planes, float32; see ``generate.pending.Held``.
      keys, written: the group's; what lies past ``size`` is not read.
      size: tokens of the group.
      interpret: run in Pallas' interpreter, anywhere.
    """
    b, h, k, d = memory.shape
    m = k // 2

    def kernel(inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        head, row = pl.program_id(0), pl.program_id(1)
        phasors, channels = jax.lax.iota(jnp.int32, m), jax.lax.iota(jnp.int32, d)
        for plane in (0, 1):
            across = jnp.broadcast_to(channels[None, :], (m, d))
            at = (row, head, jnp.broadcast_to((plane * m + phasors)[:, None], (m, d)), across)
            before = [plgpu.load(outputs[name].at[*at]) for name in ("memory", "residue")]
            added = jnp.zeros((m, d), jnp.float32)
            for slot in range(size):
                where = row * 0 + slot
                key = plgpu.load(inputs["keys"].at[row, head, where, plane * m + phasors])
                bound = plgpu.load(inputs["written"].at[row, head, where, channels])
                added += key[:, None] * bound[None, :]
            for name, after in zip(("memory", "residue"), compensated_add(*before, added), strict=True):
                plgpu.store(outputs[name].at[*at], after)

    given = {"memory": memory, "residue": residue}
    found = pl.pallas_call(
        lambda changed, inputs, outputs: kernel(inputs, outputs),
        out_shape={name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in given.items()},
        grid=(h, b),
        # What is changed in place is read as an output: both are the same memory.
        input_output_aliases={0: 0, 1: 1},
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="decode_join",
    )(given, {"keys": keys, "written": written})
    return found["memory"], found["residue"]
