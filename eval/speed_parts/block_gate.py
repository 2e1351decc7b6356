"""Equality before speed for what stands around the memory: denoiser and loss, by kernel, against float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.common import Reporter
from eval.results import absent, exact
from eval.speed_parts.gate import errors
from eval.speed_parts.timing import failure
from holo_jax.functional.cross_entropy import IGNORE, chunked_cross_entropy
from holo_jax.kernels import linear_cross_entropy, swiglu

# 16-bit operands and results: plain products in bfloat16 are off by up to 8e-3 on these inputs.
LIMIT = 2e-2
_ROWS, _WIDTH, _HIDDEN, _VOCABULARY = 384, 256, 512, 1000


def denoiser_case(rng: np.random.Generator) -> tuple[Callable, Callable, dict[str, np.ndarray]]:
    """(kernel or portable form, float64 form, inputs); both return a scalar and the output."""
    shapes = {"x": (2, _ROWS // 2, _WIDTH), "gate": (_WIDTH, _HIDDEN), "up": (_WIDTH, _HIDDEN)}
    inputs = {name: rng.normal(size=shape) / np.sqrt(_WIDTH) for name, shape in shapes.items()}
    inputs["x"] *= np.sqrt(_WIDTH)
    inputs["down"] = rng.normal(size=(_HIDDEN, _WIDTH)) / np.sqrt(_HIDDEN)
    cotangent = _rounded(rng.normal(size=shapes["x"]))

    def measured(p: dict) -> Any:
        y = swiglu(p["x"].astype(jnp.bfloat16), p["gate"], p["up"], p["down"])
        return jnp.sum(y.astype(jnp.float32) * cotangent), y

    def wanted(p: dict) -> Any:
        y = (jax.nn.silu(p["x"] @ p["gate"]) * (p["x"] @ p["up"])) @ p["down"]
        return jnp.sum(y * cotangent), y

    return measured, wanted, inputs


def loss_case(rng: np.random.Generator) -> tuple[Callable, Callable, dict[str, np.ndarray]]:
    """The same for the loss of an output projection, with targets that are ignored."""
    inputs = {
        "hidden": rng.normal(size=(2, _ROWS // 2, _WIDTH)),
        "weights": rng.normal(size=(_WIDTH, _VOCABULARY)) / np.sqrt(_WIDTH),
    }
    targets = rng.integers(0, _VOCABULARY, (2, _ROWS // 2)).astype(np.int32)
    targets[:, ::7] = IGNORE

    def measured(p: dict) -> Any:
        hidden = p["hidden"].astype(jnp.bfloat16)
        total, _ = linear_cross_entropy(hidden, p["weights"], jnp.asarray(targets), chunk_tokens=256)
        return total, total

    def wanted(p: dict) -> Any:
        total, _ = chunked_cross_entropy(
            p["hidden"], p["weights"], jnp.asarray(targets), chunk_tokens=256, logits_dtype="float64"
        )
        return total, total

    return measured, wanted, inputs


def run(reporter: Reporter, *, seed: int) -> bool:
    """Reports every error; whether all are within the limit."""
    passed = True
    for name, case in (("denoiser", denoiser_case), ("loss", loss_case)):
        measured, wanted, inputs = case(np.random.default_rng(seed))
        inputs = {key: _rounded(array) for key, array in inputs.items()}
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            reference = _named(jax.jit(jax.value_and_grad(wanted, has_aux=True))(inputs))
        where = {"part": "gate", "case": name}
        try:
            narrow = {key: jnp.asarray(array, jnp.float32) for key, array in inputs.items()}
            found = _named(jax.jit(jax.value_and_grad(measured, has_aux=True))(narrow))
        except Exception as error:
            reporter.add(absent("relative_error", "failed", detail=failure(error)[1], array="all", **where))
            passed = False
            continue
        for key, error in errors(found, reference).items():
            passed = passed and error <= LIMIT
            if np.isfinite(error):
                reporter.add(exact("relative_error", error, detail=f"limit {LIMIT:g}", array=key, **where))
            else:
                reporter.add(absent("relative_error", "failed", detail="not finite", array=key, **where))
    if not passed:
        reporter.fail_control("denoiser or loss differ from their definition: no model is timed")
    return passed


def _named(found: Any) -> dict[str, np.ndarray]:
    (_, output), gradients = found
    named = {"output": output} | {f"d_{name}": array for name, array in gradients.items()}
    return {name: np.asarray(array, np.float64) for name, array in named.items()}


def _rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), np.float64)
