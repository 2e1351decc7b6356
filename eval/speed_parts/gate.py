"""Equality before speed: every backend on this device against the definition in float64, with gradients.

Inputs are drawn afresh and rounded to the dtype that the backend reads, so an error is the backend's own. The
error of an array x is ||x - x_ref|| / ||x_ref||.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.common import Reporter
from eval.results import absent, exact
from eval.speed_parts.timing import Built, Compiler, Job
from holo_jax import kernels
from holo_jax.functional import MemoryState
from holo_jax.functional import accumulate as definition

NAMES = ("write_phases", "read_phases", "values", "gates", "erase", "initial_state")
# 16-bit operands round by 2^-9. Where states are given or asked for, the erase gradient is a difference of
# two products of about the size of the write gate's (see kernels.hopper.backend), so it may be off by more.
LIMITS = {"bfloat16": 2e-2, "float32": 1e-4}
ERASE_LIMITS = {"bfloat16": 8e-2, "float32": 1e-3}
# Backends of 16-bit values alone, and of sums alone.
NARROW, SUMS = ("hopper", "triton_outer"), ("triton_outer",)


@dataclasses.dataclass(frozen=True)
class Case:
    """One equality test."""

    binding: str
    erase: bool
    length: int
    packed: bool
    dtype: str
    positioned: bool = False

    @property
    def label(self) -> str:
        """A short name."""
        rule = "positions" if self.positioned else "erase" if self.erase else "sum"
        return f"{self.binding} {rule} t={self.length}{' packed+state' if self.packed else ''} {self.dtype}"


def cases(binding: str, dtype: str) -> list[Case]:
    """Odd lengths, with and without segments and an initial state; both rules, or both addressings.

    Kernels cut the longer rows in pieces of time.
    """
    return [
        Case(binding, kind == "erase", t, packed, dtype, kind == "positions")
        for kind in ("sum", "erase" if binding == "outer" else "positions")
        for t, packed in ((63, False), (1089, True))
        if packed or kind != "positions"
    ]


def draw(
    case: Case, seed: int, batch: int = 2, heads: int = 2, m: int = 32, d: int = 64
) -> tuple[dict, dict]:
    """Arguments and cotangents as numpy arrays: (differentiated, others with cotangents)."""
    rng = np.random.default_rng(seed)
    m = d if case.binding == "hadamard" else m
    t = case.length

    def rounded(x: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(x, jnp.float32).astype(case.dtype).astype(jnp.float32), np.float64)

    def wide(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32).astype(np.float64)

    sigmoid = lambda x: (1 / (1 + np.exp(-x))).astype(np.float32).astype(np.float64)  # noqa: E731
    gates = sigmoid(wide(batch, t, heads))
    shape = (batch, heads, m, d) if case.binding == "outer" else (batch, heads, d)
    inputs: dict[str, Any] = {
        "write_phases": None if case.positioned else 3 * wide(batch, t, heads, m),
        "read_phases": None if case.positioned else 3 * wide(batch, t, heads, m),
        "values": rounded(wide(batch, t, heads, d)),
        "gates": None if case.positioned else gates,  # the kernel of positions is chosen without
        "erase": gates * sigmoid(wide(batch, t, heads) - 1) if case.erase else None,
        "initial_state": (wide(*shape), wide(*shape)) if case.packed else None,
    }
    starts = rng.random((batch, t)) < 0.02
    starts[1:] = False  # the other rows are one segment each, which crosses every piece
    turns, inside = _positions(rng, starts if case.packed else None, heads, m, t)
    units = (inside[..., None, None] * turns).view(np.int32)  # exact: a turn has 2^32 of them
    others = {
        "positions": (turns, inside) if case.positioned else None,
        "phases": units * (2 * np.pi / 2**32) if case.positioned else None,
        "segment_ids": np.cumsum(starts, 1).astype(np.int32) if case.packed else None,
        "factors": rng.uniform(0.1, 1.0, size=(batch, t)) if case.binding == "hadamard" else None,
        "d_outputs": rounded(wide(batch, t, heads, d)),
        "d_memory": (wide(*shape), wide(*shape)),
    }
    return inputs, others


def _positions(
    rng: np.random.Generator, starts: np.ndarray | None, heads: int, m: int, t: int
) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies, and positions inside segments that go on from a million in the first of a row."""
    turns = rng.integers(2**32, size=(heads, m), dtype=np.uint32)
    at = np.arange(t)[None]
    if starts is None:
        return turns, at.astype(np.uint32)
    begins = np.maximum.accumulate(np.where(starts & (at > 0), at, 0), axis=1)
    return turns, (at - begins + np.where(begins == 0, 10**6, 0)).astype(np.uint32)


def objective(function: Any, case: Case, dtype: Any, inputs: dict, others: dict, **options: Any) -> Any:
    """A scalar whose gradient pulls back the drawn cotangents, with (outputs, memory planes) beside it."""
    wide = dtype if dtype == jnp.float64 else jnp.float32
    state = inputs["initial_state"]
    if state is not None:
        memory = jax.lax.complex(*state)
        batch, heads = memory.shape[:2]
        state = MemoryState(memory, jnp.zeros_like(memory), jnp.ones((batch, heads), wide))
    phases = [inputs[name] if others["phases"] is None else others["phases"] for name in NAMES[:2]]
    outputs, after = function(
        *phases,
        inputs["values"].astype(dtype),
        inputs["gates"],
        inputs["erase"],
        binding=case.binding,
        segment_ids=others["segment_ids"],
        initial_state=state,
        **options,
    )
    if others["factors"] is not None and "factors" not in options:
        outputs = outputs * others["factors"][..., None, None]
    memory = after.memory + after.residue
    total = jnp.sum(outputs.astype(wide) * others["d_outputs"])
    total += jnp.sum(memory.real * others["d_memory"][0]) + jnp.sum(memory.imag * others["d_memory"][1])
    return total, (outputs, jnp.stack([memory.real, memory.imag]))


def reference(case: Case, inputs: dict, others: dict) -> dict[str, np.ndarray]:
    """The definition, in float64, on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        # The dtype is that of the backend: the definition computes in float64 whatever it is.
        return _named(_reference_program(dataclasses.replace(case, dtype="float64"))(inputs, others))


@functools.cache
def _reference_program(case: Case) -> Any:
    def run(inputs: dict, others: dict) -> Any:
        return objective(definition, case, jnp.float64, inputs, others, method="recurrent")

    return jax.jit(jax.value_and_grad(run, has_aux=True))


def _named(found: Any) -> dict[str, np.ndarray]:
    (_, (outputs, memory)), gradients = found
    named = {"outputs": outputs, "memory": memory}
    for name in NAMES:
        if gradients[name] is not None:
            named[f"d_{name}"] = jnp.stack(gradients[name]) if name == "initial_state" else gradients[name]
    return {name: np.asarray(array, np.float64) for name, array in named.items()}


def errors(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative error of every array; not a number counts as infinite."""
    result = {}
    for name, array in wanted.items():
        error = np.linalg.norm(found[name] - array) / np.linalg.norm(array)
        result[name] = float(error) if np.isfinite(error) else float("inf")
    return result


class Gate:
    """Backends (name to bindings) against the definition: compiled when made, judged later.

    float32 inputs test the backends that take them: the kernels of the outer memory have 16-bit values only.
    """

    def __init__(self, backends: dict[str, tuple[str, ...]], *, seed: int, compiler: Compiler) -> None:
        self._tests = []
        plans = [
            (backend, case)
            for backend, bindings in backends.items()
            for binding in bindings
            for dtype in (("bfloat16",) if backend in NARROW else ("float32", "bfloat16"))
            for case in cases(binding, dtype)
            if not (case.erase and backend in SUMS)
        ]
        for number, (backend, case) in enumerate(plans):
            drawn = draw(case, seed + number)
            narrow = jax.tree.map(
                lambda x: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype), drawn
            )
            self._tests.append((backend, case, drawn, narrow, compiler.submit(_job(backend, case, narrow))))

    def judge(self, reporter: Reporter) -> set[tuple[str, str]]:
        """Reports the error of every array; returns the (backend, binding) pairs that passed."""
        pairs, failed = set(), set()
        for backend, case, drawn, narrow, built in self._tests:
            pairs.add((backend, case.binding))
            wanted = reference(case, *drawn)
            if not _judge(reporter, built.result(), narrow, wanted, case):
                failed.add((backend, case.binding))
        for backend, binding in sorted(failed):
            reporter.fail_control(
                f"{backend} {binding} differs from the definition: its speeds are not reported"
            )
        return pairs - failed


def _job(backend: str, case: Case, narrow: Any) -> Job:
    def function(inputs: dict, others: dict) -> Any:
        options = {"backend": backend, "factors": others["factors"]}
        if others["positions"] is not None:
            options["positions"] = kernels.Positions(*others["positions"])
        return objective(kernels.accumulate, case, jnp.dtype(case.dtype), inputs, others, **options)

    return Job(
        {"backend": backend, "case": case.label},
        lambda: jax.jit(jax.value_and_grad(function, has_aux=True)).lower(*narrow),
    )


def _judge(reporter: Reporter, built: Built, narrow: Any, wanted: dict[str, np.ndarray], case: Case) -> bool:
    where = {"part": "gate", **built.job.where}
    if built.program is None:
        reporter.add(absent("relative_error", "failed", detail=built.detail, array="all", **where))
        return False
    try:
        found = errors(_named(built.program(*narrow)), wanted)
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"[:300]
        reporter.add(absent("relative_error", "failed", detail=detail, array="all", **where))
        return False
    passed = True
    for name, error in found.items():
        limit = (ERASE_LIMITS if name == "d_erase" else LIMITS)[case.dtype]
        passed = passed and error <= limit
        if np.isfinite(error):
            reporter.add(exact("relative_error", error, detail=f"limit {limit:g}", array=name, **where))
        else:
            reporter.add(absent("relative_error", "failed", detail="not finite", array=name, **where))
    return passed
