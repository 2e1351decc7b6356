"""How the train step scales over devices: tokens a second, memory and bytes sent, along each mesh axis.

The baseline of a case is the same step on one of the devices, in the same process: with the share of one
device (weak, the default), or with the whole problem (strong). Efficiency is the rate over that of the
baseline times the number of devices. Nothing is timed unless a small model gives the same losses on all
devices as on one.
"""

import dataclasses
import re
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from eval import common, plots
from eval.common import Reporter, UsageError, cell, markdown_table
from eval.results import Results, exact
from eval.speed_parts.models import Size, model_config
from eval.speed_parts.timing import (
    Built,
    Job,
    compile_all,
    failure,
    median,
    missing,
    program_bytes,
    sample_seconds,
    say,
)
from holo_jax.parallel import BATCH_AXES, MESH_AXES, SEQ
from train.collectives import KINDS, collectives
from train.loop import build
from train.run_config import MeshConfig, OptimizerConfig
from train.sharding import batch_sharding, make_mesh, put_batch, replicated

METRICS = ("tokens_per_second", "milliseconds")
_OPTIMIZER = OptimizerConfig(
    learning_rate=3e-4,
    warmup_steps=10,
    final_ratio=0.1,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
)
_STEPS = 1000
_CONTROL = "seq@512 rows=4"
_CONTROL_VOCAB = 512
_TOLERANCE = 0.02  # of losses and gradient norms in bfloat16


class Case(NamedTuple):
    """``AXIS@LENGTH[ key=value ...]``: what is measured on one device and on all.

    Attributes:
      axis: the mesh axis that the devices lie on.
      length: tokens in a sequence, of all devices together along ``seq``.
      rows: sequences of one device; of all together if ``strong``, and along ``seq``.
      strong: 1 keeps the whole problem the same on one device, 0 the share of a device.
      remat, unroll, model: of the model.
    """

    axis: str
    length: int
    rows: int = 1
    strong: int = 0
    remat: str = "dots"
    unroll: int = 1
    model: str = "holo"

    def shape(self, devices: int, largest: int) -> tuple[int, int]:
        """Rows and tokens of the batch on ``devices`` devices, of at most ``largest``.

        Raises:
          UsageError: if they do not divide.
        """
        rows, length = self.rows, self.length
        if not self.strong and self.axis == SEQ:
            length = length * devices // largest
        elif not self.strong and self.axis in BATCH_AXES:
            rows = rows * devices
        for name, size, over in (("rows", rows, BATCH_AXES), ("length", length, (SEQ,))):
            if self.axis in over and size % devices:
                raise UsageError(f"case {self}: {name} {size} must be a multiple of {devices} devices")
        return rows, length


def parse_case(text: str) -> Case:
    """The case written as ``text``.

    Raises:
      ValueError: for another form, an unknown axis or key.
    """
    match = re.fullmatch(r"(\w+)@(\d+)((?:\s+\w+=\w+)*)", text.strip())
    if not match or match[1] not in MESH_AXES:
        raise ValueError(f"case is {text!r}; it must look like seq@65536 rows=1 strong=1, with a mesh axis")
    kinds = Case.__annotations__
    options: dict[str, Any] = {}
    for pair in match[3].split():
        key, value = pair.split("=")
        if key not in kinds or key in ("axis", "length"):
            raise ValueError(f"case {text!r} has the unknown key {key!r}")
        options[key] = int(value) if kinds[key] is int else value
    return Case(match[1], int(match[2]), **options)


@dataclasses.dataclass(frozen=True)
class Settings:
    """See configs/eval/scaling.py."""

    layers: int
    width: int
    vocab: int
    cases: tuple[str, ...]
    options: tuple[str, ...]
    samples: int
    least_seconds: float
    workers: int
    seed: int

    def __post_init__(self) -> None:
        for text in self.cases:
            parse_case(text)
        for name in ("layers", "width", "vocab", "samples", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for text in self.options:
            if "=" not in text:
                raise ValueError(f"options names {text!r}; it must be NAME=VALUE")

    @property
    def compiler_options(self) -> dict[str, str]:
        """``options`` by name."""
        return dict(text.split("=", 1) for text in self.options)


class Plan(NamedTuple):
    """One program: a case on a number of devices, its step functions and its batch."""

    where: dict[str, Any]
    mesh: Any
    steps: Any
    rows: int
    length: int
    layers: int

    def jobs(self, options: dict[str, str]) -> list[Job]:
        """The train step and the initialisation, to be compiled."""
        batch = jax.ShapeDtypeStruct((1, self.rows, self.length), np.int32)
        batches = {"tokens": batch, "segment_ids": batch}
        return [
            Job(self.where, lambda: self.steps.train.lower(self.steps.shapes, batches), options or None),
            Job({"init": str(self.mesh.shape)}, lambda: self.steps.init.lower(_key(0))),
        ]

    @property
    def keys(self) -> tuple[tuple, tuple]:
        """What the programs of ``jobs`` depend on."""
        return (id(self.steps), self.rows, self.length), (id(self.steps),)

    def start(self, init: Any, seed: int) -> Any:
        """A new train state on the mesh."""
        return init(jax.device_put(_key(seed), replicated(self.mesh)))

    def batch(self, seed: int, vocab: int) -> dict:
        """Random tokens; rows are whole documents."""
        shape = (self.rows, self.length)
        tokens = np.random.default_rng(seed).integers(vocab, size=shape, dtype=np.int32)
        batch = {"tokens": tokens, "segment_ids": np.ones(shape, np.int32)}
        return put_batch(batch, 1, batch_sharding(self.mesh))


def _key(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(seed, impl="threefry2x32")))


def make_plan(case: Case, size: Size, devices: int, largest: int) -> Plan:
    """The program of ``case`` on the first ``devices`` devices."""
    rows, length = case.shape(devices, largest)
    axes = {axis: devices if axis == case.axis else 1 for axis in MESH_AXES}
    mesh = make_mesh(MeshConfig(devices=devices, **axes))
    config = model_config(case.model, size, remat=case.remat, scan_unroll=min(case.unroll, size.layers))
    _, steps = build(config, _OPTIMIZER, _STEPS, mesh)
    where = case._asdict() | {"devices": devices, "total_rows": rows, "total_length": length}
    return Plan(where, mesh, steps, rows, length, size.layers)


def counts(largest: int) -> list[int]:
    """Numbers of devices that are measured: powers of two, and all."""
    return sorted({2**k for k in range(largest.bit_length()) if 2**k <= largest} | {largest})


def make_controls(settings: Settings, largest: int) -> list[Plan]:
    """A small model on one device, and on all along each axis that is measured."""
    size, control = Size(2, 256, _CONTROL_VOCAB), parse_case(_CONTROL)._replace(rows=4 * largest, strong=1)
    axes = dict.fromkeys(parse_case(text).axis for text in settings.cases)
    return [
        make_plan(control._replace(axis=axis), size, devices, largest)
        for axis, devices in ((SEQ, 1), *((axis, largest) for axis in axes))
    ]


def check_equal(plans: list[Plan], programs: list[tuple[Built, Built]], reporter: Reporter) -> bool:
    """Two steps of the first plan, on one device, and of the others: do they agree?"""
    seen: list[np.ndarray] = []
    sound = True
    for plan, (built, init) in zip(plans, programs, strict=True):
        if built.program is None or init.program is None:
            reporter.fail_control(f"{plan.where['axis']} did not compile: {built.detail}{init.detail}")
            return False
        state, found = plan.start(init.program, 0), []
        for step in range(2):
            state, metrics = built.program(state, plan.batch(step, _CONTROL_VOCAB))
            found.append((float(metrics.loss), float(metrics.grad_norm)))
        seen.append(np.array(found))
        off = float(np.max(np.abs(seen[-1] / seen[0] - 1)))
        axis, devices = plan.where["axis"], plan.where["devices"]
        reporter.add(exact("relative_error", off, axis=axis, devices=devices))
        if not off < _TOLERANCE:
            sound = False
            reporter.fail_control(f"{axis} on {devices} devices is off by {off:.3g} from one device")
    return sound


def evaluate(settings: Settings, reporter: Reporter) -> None:
    """The control, then every case on one device and on more."""
    largest = jax.device_count()
    if largest < 2:
        raise UsageError("one device is present; scaling needs at least two")
    size = Size(settings.layers, settings.width, settings.vocab)
    controls = make_controls(settings, largest)
    plans = [
        make_plan(parse_case(text), size, devices, largest)
        for text in settings.cases
        for devices in counts(largest)
    ]
    # Cases may share programs: their step on one device, say.
    jobs: dict[tuple, Job] = {}
    for plan in (*controls, *plans):
        for key, job in zip(plan.keys, plan.jobs(settings.compiler_options), strict=True):
            jobs.setdefault(key, job)
    built = dict(zip(jobs, compile_all(list(jobs.values()), settings.workers), strict=True))
    programs = [(built[plan.keys[0]], built[plan.keys[1]]) for plan in (*controls, *plans)]
    if not check_equal(controls, programs[: len(controls)], reporter):
        return
    say("all devices agree with one")
    rates: dict[tuple, float] = {}
    for plan, (step, init) in zip(plans, programs[len(controls) :], strict=True):
        measure(settings, reporter, plan, step, init, rates)
        reporter.save()


def measure(
    settings: Settings, reporter: Reporter, plan: Plan, step: Built, init: Built, rates: dict[tuple, float]
) -> None:
    """Times one program; ``rates`` holds those of one device by case."""
    where = plan.where
    step = dataclasses.replace(step, job=dataclasses.replace(step.job, where=where))
    if step.program is None or init.program is None:
        reporter.add(*missing(METRICS, step, "compilation"))
        return
    reporter.add(
        exact("peak_gib", program_bytes(step.program) / 2**30, **where),
        exact("compile_seconds", step.seconds, **where),
        *sent(step.program, plan),
    )
    try:
        held = {"state": plan.start(init.program, settings.seed)}
        batch = plan.batch(settings.seed, settings.vocab)

        def one() -> Any:
            held["state"], metrics = step.program(held["state"], batch)
            return metrics.loss

        seconds = sample_seconds(one, samples=settings.samples, least_seconds=settings.least_seconds)
    except Exception as error:
        status, detail = failure(error)
        reporter.add(*missing(METRICS, dataclasses.replace(step, status=status, detail=detail), "run"))
        return
    rate = median("tokens_per_second", [plan.rows * plan.length / s for s in seconds], where)
    reporter.add(rate, median("milliseconds", seconds, where, scale=1e3))
    case = tuple(where[name] for name in Case._fields)
    if where["devices"] == 1:
        rates[case] = rate.value
    elif case in rates:
        reporter.add(exact("efficiency", rate.value / (where["devices"] * rates[case]), **where))
    say(f"{' '.join(str(v) for v in where.values())}: {rate.value:,.0f} tokens/s")


def sent(program: Any, plan: Plan) -> list:
    """MiB that one device receives in a step, by kind; what is in a loop counts once for each run."""
    total = dict.fromkeys(KINDS, 0.0)
    unroll = max(1, plan.where["unroll"])
    for one in collectives(program.as_text()):
        total[one.kind] += one.bytes * (plan.layers // min(unroll, plan.layers) if one.in_loop else 1)
    return [exact("sent_mib", size / 2**20, kind=kind, **plan.where) for kind, size in total.items() if size]


def table(results: Results) -> str:
    """One line a program."""
    rows = []
    for value in results.select("tokens_per_second"):
        where = value.where
        found = [results.select(name, **where) for name in ("efficiency", "peak_gib", "compile_seconds")]
        sends = ", ".join(f"{v.where['kind']} {v.value:,.1f}" for v in results.select("sent_mib", **where))
        kind = "strong" if where["strong"] else "weak"
        name = f"{where['axis']} {kind}, {where['total_rows']} x {where['total_length']:,}"
        options = f"remat {where['remat']}, unroll {where['unroll']}"
        cells = (cell(one[0]) if one else "" for one in found)
        rows.append((name, options, where["devices"], cell(value, 0), *cells, sends))
    head = ("case", "model", "devices", "tokens/s", "efficiency", "peak GiB", "compile s", "MiB sent a step")
    return markdown_table(head, rows)


def figures(results: Results, theme: str) -> dict:
    """Efficiency over devices, a line a case."""
    found = results.select("efficiency")
    if not found:
        return {}
    with plots.style(theme):
        figure, axes = plots.grid(title="Train step over devices")
        axis = axes[0][0]
        names = list(dict.fromkeys(tuple(v.where[name] for name in Case._fields) for v in found))
        for index, case in enumerate(names):
            values = [v for v in found if tuple(v.where[name] for name in Case._fields) == case]
            own = Case(*case)
            label = f"{own.axis} {own.length:,} {'strong' if own.strong else 'weak'}, unroll {own.unroll}"
            plots.line(
                axis,
                values,
                "devices",
                label=label,
                colour=plots.colour("", index),
                marker=plots.MARKERS[index % 8],
            )
        plots.log_ticks(axis, "x", [v.where["devices"] for v in found])
        axis.set_ylim(0, 1.1)
        axis.set_xlabel("devices")
        axis.set_ylabel("tokens/s over devices x one device")
        axis.legend()
    return {"scaling": figure}


def main(argv: list[str] | None = None) -> int:
    """Runs the evaluation; returns the exit code."""
    return common.run(
        "scaling",
        Settings,
        evaluate,
        figures=figures,
        table=table,
        seeds=lambda settings: (settings.seed,),
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
