"""A stand-in for the package of kernels: its functions in plain JAX, and a list of their calls."""

import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.functional import accumulate
from holo_jax.kernels.hopper import backend as hopper
from holo_jax.kernels.hopper import parts as hopper_parts
from tests.functional.cases import chained

Calls = list[tuple[Any, ...]]


def install(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Makes denoiser, loss and memory believe that they run on Hopper; returns the list that calls join."""
    calls: Calls = []

    def swiglu_mlp(x, gate_up, w_down, *, compute_dtype):
        calls.append(("swiglu", x.shape, gate_up.shape))
        gate, up = (x @ gate_up[:, i].astype(compute_dtype) for i in (0, 1))
        return (jax.nn.silu(gate) * up) @ w_down.astype(compute_dtype)

    def objective_sums(hidden, weight, targets, valid, *, compute_dtype, row_chunk, **options):
        assert set(options.values()) == {0.0} and compute_dtype == hidden.dtype
        calls.append(("loss", hidden.shape, weight.shape, row_chunk))
        logits = jnp.matmul(hidden, weight.T, preferred_element_type=jnp.float32)
        losses = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
        return (jnp.sum(jnp.where(valid, losses, 0)),) * 3

    def exponentials(hidden, table, reference, targets, *, vocabulary):
        calls.append(("chunk", hidden.shape, table.shape))
        logits = jnp.matmul(hidden, table.T, preferred_element_type=jnp.float32)
        columns = jnp.arange(logits.shape[1])[None]
        found = jnp.exp2(logits * np.log2(np.e) - reference[:, None])
        found = jnp.where((columns != targets[:, None]) & (columns < vocabulary), found, 0)
        return found.astype(jnp.bfloat16), jnp.sum(found.reshape(len(found), -1, 16), axis=2).T

    def memory(call):
        calls.append(("memory", call.values.shape))
        return accumulate(**call._asdict())

    def parts(call, axis, continues, initial):
        calls.append(("parts", call.values.shape))
        given = call._asdict() | dict(axis=axis, continues=continues, initial=initial)
        inputs = [given.pop(name) for name in ("write_phases", "read_phases", "values", "gates", "erase")]
        del given["initial_state"]
        return chained(*inputs, **given)

    for name, members in (
        ("jla", {}),
        ("jla.ops", {}),
        ("jla.ops.mosaic_gpu", {}),
        ("jla.ops.mosaic_gpu.fused_gemm", {"swiglu_mlp": swiglu_mlp}),
        ("jla.ops.mosaic_gpu.linear_cross_entropy", {"objective_sums": objective_sums}),
    ):
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], own, module, raising=False)
    loss = sys.modules["holo_jax.kernels.products.linear_cross_entropy"]
    for name, member in dict(exponentials=exponentials, ROWS=16, COLUMNS=32).items():
        monkeypatch.setattr(loss, name, member)
    monkeypatch.setattr(hopper, "missing", lambda: None)
    monkeypatch.setattr(hopper, "accumulate", memory)
    monkeypatch.setattr(hopper_parts, "accumulate", parts)
    return calls
