"""A stand-in for the package of kernels: its functions in plain JAX, and a list of their calls."""

import sys
import types
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from holo_jax.functional import accumulate
from holo_jax.kernels import hopper

Calls = list[tuple[Any, ...]]


def install(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Makes denoiser, loss and memory believe that they run on Hopper; returns the list that calls join."""
    calls: Calls = []

    def swiglu_mlp(x, gate_up, w_down, *, compute_dtype):
        calls.append(("swiglu", x.shape, gate_up.shape))
        gate, up = (x @ gate_up[:, i].astype(compute_dtype) for i in (0, 1))
        return (jax.nn.silu(gate) * up) @ w_down.astype(compute_dtype)

    def linear_cross_entropy_objective(hidden, weight, targets, *, ignore_index, **options):
        calls.append(("loss", hidden.shape, weight.shape, options["row_chunk"], options["impl"]))
        logits = (hidden @ weight.astype(hidden.dtype).T).astype(jnp.float32)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[:, None], 1)[:, 0]
        return SimpleNamespace(objective_sum=-jnp.sum(jnp.where(targets == ignore_index, 0, picked)))

    def memory(call):
        calls.append(("memory", call.values.shape))
        return accumulate(**call._asdict())

    for name, members in (
        ("jla", {}),
        ("jla.ops", {}),
        ("jla.ops.mosaic_gpu", {}),
        ("jla.ops.mosaic_gpu.fused_gemm", {"swiglu_mlp": swiglu_mlp}),
        ("jla.ops.cross_entropy", {"linear_cross_entropy_objective": linear_cross_entropy_objective}),
    ):
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(hopper, "missing", lambda: None)
    monkeypatch.setattr(hopper, "accumulate", memory)
    return calls
