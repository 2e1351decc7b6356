"""The accumulation alone, forward and with backward, beside the floor of its bytes and operations."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from eval.common import Reporter
from eval.results import exact
from eval.speed_parts.floors import Ceilings
from eval.speed_parts.timing import Built, Job, compile_all, failure, median, missing, sample_seconds
from holo_jax import kernels
from holo_jax.functional import phases_at
from holo_jax.kernels import Positions
from holo_jax.kernels.call import Call
from holo_jax.kernels.hadamard import backend as triton
from holo_jax.kernels.hadamard import positions as triton_positions
from holo_jax.kernels.hadamard.program import Tiling
from holo_jax.kernels.hopper import backend as hopper

_SETS = 3  # input sets in rotation, so that no run finds its inputs in the cache


@dataclasses.dataclass(frozen=True)
class Op:
    """One accumulation to time.

    ``rule`` names a variant of a kernel (of ``triton`` the fields of its ``Tiling``, joined by "x"),
    ``chunk`` a chunk of the portable form.
    """

    binding: str
    erase: bool
    backend: str
    batch: int
    length: int
    heads: int
    m: int
    d: int
    addressing: str = "content"
    chunk: int = 0
    rule: str = ""

    @property
    def where(self) -> dict[str, Any]:
        """Its settings in results."""
        return {"part": "memory_op", **dataclasses.asdict(self)}

    @property
    def gates(self) -> int:
        """Gates a head and token: positions address without, as in the ``seed`` preset."""
        return 1 + self.erase if self.addressing == "content" else 0

    def forward_bytes(self) -> int:
        """Inputs read once, outputs written once; phases float32, gates float32, values and outputs bf16."""
        tokens = self.batch * self.length * self.heads
        phases = 2 * 4 * self.m if self.addressing == "content" else 0
        return tokens * (phases + 4 * self.d + 4 * self.gates)

    def backward_bytes(self) -> int:
        """The inputs and the output's cotangent read once, the gradients written once."""
        tokens = self.batch * self.length * self.heads
        phases = 2 * 4 * self.m if self.addressing == "content" else 0
        return tokens * (2 * phases + 6 * self.d + 2 * 4 * self.gates)

    def forward_flops(self) -> int:
        """Multiply-adds of the recurrence: a write and a read (and a read of the key) of the state."""
        width = 2 * self.m * self.d if self.binding == "outer" else 2 * self.d
        return 2 * (2 + self.erase) * width * self.batch * self.length * self.heads


def draw(op: Op, key: jax.Array) -> dict[str, jax.Array]:
    """Random inputs on the device."""
    keys = jax.random.split(key, 6)
    tokens = (op.batch, op.length, op.heads)
    gates = jax.nn.sigmoid(jax.random.normal(keys[3], tokens))
    inputs = {"values": jax.random.normal(keys[2], (*tokens, op.d), jnp.bfloat16)}
    if op.gates:
        inputs["gates"] = gates
    if op.addressing == "content":
        inputs["write"] = 3 * jax.random.normal(keys[0], (*tokens, op.m))
        inputs["read"] = 3 * jax.random.normal(keys[1], (*tokens, op.m))
    if op.erase:
        inputs["erase"] = gates * jax.nn.sigmoid(jax.random.normal(keys[4], tokens) - 2)
    return inputs


def apply(op: Op, inputs: dict[str, jax.Array]) -> jax.Array:
    """The op, its output in bfloat16 as the next layer reads it."""
    positions = None
    if op.addressing == "content":
        write, read = inputs["write"], inputs["read"]
    else:
        turns = jax.random.bits(jax.random.key(1), (op.heads, op.m), jnp.uint32)
        positions = Positions(turns, jnp.arange(op.length, dtype=jnp.uint32)[None])
        write = read = phases_at(*positions)
    arguments = (write, read, inputs["values"], inputs.get("gates"), inputs.get("erase"))
    if op.rule and op.backend == "triton":
        tiling = Tiling(*map(int, op.rule.split("x")))
        call = Call(*arguments, op.binding)
        if positions is not None:
            outputs, _ = triton_positions.accumulate(call, positions, tiling=tiling)
        else:
            outputs, _ = triton.accumulate(call, plain=tiling, turning=tiling)
    elif op.rule:
        outputs, _ = hopper.accumulate(Call(*arguments, op.binding), rule=op.rule)
    else:
        outputs, _ = kernels.accumulate(
            *arguments,
            binding=op.binding,
            backend=op.backend,
            chunk_size=op.chunk or None,
            positions=positions,
        )
    return outputs.astype(jnp.bfloat16)


def jobs_of(op: Op, sets: Sequence[dict], cotangents: Sequence[jax.Array]) -> list[Job]:
    """Forward, and forward with backward, each over all input sets in one program."""

    def forward(sets: Any) -> Any:
        return [apply(op, inputs) for inputs in sets]

    def both(sets: Any, cotangents: Any) -> Any:
        results = []
        for inputs, cotangent in zip(sets, cotangents, strict=True):
            outputs, pull = jax.vjp(lambda x: apply(op, x), inputs)
            results.append((outputs, pull(cotangent)[0]))
        return results

    return [
        Job({**op.where, "direction": "forward"}, lambda: jax.jit(forward).lower(sets)),
        Job({**op.where, "direction": "both"}, lambda: jax.jit(both).lower(sets, cotangents)),
    ]


def run(
    reporter: Reporter,
    ops: Sequence[Op],
    passed: set[tuple[str, str]],
    ceilings: Ceilings,
    *,
    seed: int,
    workers: int,
    samples: int,
    least_seconds: float,
) -> None:
    """Times the ops whose backend passed the gate."""
    ops = [op for op in ops if (op.backend, op.binding) in passed]
    data: dict[int, tuple[list, list]] = {}
    jobs = []
    for number, op in enumerate(ops):
        shapes = jax.eval_shape(lambda op=op: draw(op, jax.random.key(0)))
        cotangent = jax.ShapeDtypeStruct(shapes["values"].shape, jnp.bfloat16)
        jobs += [(number, job) for job in jobs_of(op, [shapes] * _SETS, [cotangent] * _SETS)]
    built = compile_all([job for _, job in jobs], workers)
    for (number, _), program in zip(jobs, built, strict=True):
        if number not in data:
            data.clear()  # one op's inputs at a time
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), _SETS)
            sets = [jax.jit(draw, static_argnums=0)(ops[number], key) for key in keys]
            data[number] = (
                sets,
                [
                    jax.random.normal(k, s["values"].shape, jnp.bfloat16)
                    for k, s in zip(keys, sets, strict=True)
                ],
            )
        _time(reporter, ops[number], program, data[number], ceilings, samples, least_seconds)


def _time(
    reporter: Reporter,
    op: Op,
    built: Built,
    data: tuple[list, list],
    ceilings: Ceilings,
    samples: int,
    least_seconds: float,
) -> None:
    where = built.job.where
    if built.program is None:
        reporter.add(*missing(["milliseconds"], built, "compilation"))
        return
    arguments = data if where["direction"] == "both" else data[:1]
    try:
        seconds = sample_seconds(
            lambda: built.program(*arguments), samples=samples, least_seconds=least_seconds
        )
    except Exception as error:
        status, detail = failure(error)
        reporter.add(
            *missing(["milliseconds"], dataclasses.replace(built, status=status, detail=detail), "run")
        )
        return
    both = where["direction"] == "both"
    nbytes = op.forward_bytes() + (op.backward_bytes() if both else 0)
    floor = ceilings.floor_seconds(nbytes, op.forward_flops() * (3 if both else 1))
    value = median("milliseconds", [s / _SETS for s in seconds], where, scale=1e3)
    reporter.add(
        value,
        exact("floor_milliseconds", floor * 1e3, detail=f"{nbytes} bytes", **where),
        exact("share_of_floor", floor * 1e3 / value.value, **where),
        exact("compile_seconds", built.seconds, **where),
    )
