"""How the train step scales over devices: tokens a second, memory and bytes sent, along each mesh axis.

The baseline of a case is the same step on one of the devices, in the same process: with the share of one
device (weak, the default), or with the whole problem (strong). Efficiency is the rate over that of the
baseline times the number of devices. What one device computes, several must find again before they are timed:
a weak case gives each the baseline's rows (along ``seq``, its sequences one after the other, as segments), so
that losses and gradient norms of two steps are those of the baseline. A memory carried over the border of two
devices is checked by strong cases along ``seq``.

Communication is given twice: as the time of a step over that of its share on one device, and, from a profile,
as the time of the collectives and the part of it in which a device did nothing else.

With ``at_once`` a weak case is also timed as one device's share on all of them at one time, nothing sent: how
far devices differ, and what power and their host cost all of them, is not what dividing costs.

Cases are compiled a few at a time and written as they come, so that a run that is cut keeps what it had.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from eval import common, scaling_view
from eval.common import Reporter, UsageError
from eval.results import exact
from eval.scaling_cases import Case, counts, parse_case
from eval.scaling_links import measure_links
from eval.speed_parts.models import Size, model_config
from eval.speed_parts.profile import step_times
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
from holo_jax.config import HoloConfig
from holo_jax.exchange import Exchange
from holo_jax.parallel import MESH_AXES
from train.collectives import KINDS, collectives
from train.compilation import compiler_options
from train.loop import build
from train.run_config import MeshConfig, OptimizerConfig
from train.sharding import batch_sharding, make_mesh, put_batch

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
_TOLERANCE = 0.02  # of losses and gradient norms in bfloat16


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
    together: int
    workers: int
    profile: bool
    links: bool
    at_once: bool
    seed: int

    def __post_init__(self) -> None:
        for text in self.cases:
            parse_case(text)
        for name in ("layers", "width", "vocab", "samples", "together", "workers"):
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
    """One program: a case on a number of devices, its step functions and its batch.

    Attributes:
      case, devices: what it is.
      mesh, steps: where it runs, and what.
      init: makes the state of one device, from which that of the mesh is divided.
      rows, length: of the batch.
      pieces: how often the batch holds that of one device, along rows and along time.
      layers: of the model.
    """

    case: Case
    devices: int
    mesh: Any
    steps: Any
    init: Any
    rows: int
    length: int
    pieces: tuple[int, int]
    layers: int

    @property
    def where(self) -> dict[str, Any]:
        """Its settings in results."""
        totals = {"total_rows": self.rows, "total_length": self.length}
        found = self.case._asdict() | {"devices": self.devices} | totals
        del found["between"]
        return found

    @property
    def key(self) -> tuple:
        """What its program depends on; cases may share one, that of one device say."""
        compiled = None if self.devices == 1 else (self.case.overlap, self.case.joined)
        return id(self.steps), self.rows, self.length, compiled

    def job(self, options: dict[str, Any]) -> Job:
        """The train step, to be compiled."""
        ids = jax.ShapeDtypeStruct((1, self.rows, self.length), np.int32)
        batch = {"tokens": ids, "segment_ids": ids}
        case = self.case
        own = compiler_options(self.mesh, case.exchange, overlap=bool(case.overlap), joined=case.joined << 20)
        options = (own or {}) | options
        return Job(self.where, lambda: self.steps.train.lower(self.steps.shapes, batch), options or None)

    def start(self, seed: int) -> Any:
        """A new train state on the mesh; the same on any."""
        key = np.asarray(jax.random.key_data(jax.random.key(seed, impl="threefry2x32")))
        return jax.device_put(self.init(jax.device_put(key, jax.devices()[0])), self.steps.shardings)

    def batch(self, seed: int, vocab: int) -> dict:
        """Random tokens; every row is a document, or one for each piece."""
        along_rows, along_time = self.pieces
        shape = (self.rows // along_rows, self.length // along_time)
        tokens = np.random.default_rng(seed).integers(vocab, size=shape, dtype=np.int32)
        segments = np.repeat(np.arange(1, along_time + 1, dtype=np.int32), shape[1])
        batch = {"tokens": np.tile(tokens, self.pieces), "segment_ids": np.tile(segments, (self.rows, 1))}
        return put_batch(batch, 1, batch_sharding(self.mesh))


def make_plan(case: Case, size: Size, devices: int, largest: int, first: int = 0) -> Plan:
    """The program of ``case`` on ``devices`` devices from number ``first`` on."""
    rows, length = case.shape(devices, largest)
    own = case.shape(1, largest)
    plain = model_config(case.model, size, block_backend=case.block)
    config = plain.replace(remat=case.remat, scan_unroll=min(case.unroll, size.layers))

    def on(count: int, model: HoloConfig, first: int = 0) -> tuple[Any, Any]:
        axes = {axis: count if axis == case.axis else 1 for axis in MESH_AXES}
        mesh = make_mesh(MeshConfig(devices=count, **axes), jax.devices()[first:])
        # What one device does not send is the same program however it would be sent.
        exchange = case.exchange if count > 1 else Exchange()
        return mesh, build(model, _OPTIMIZER, _STEPS, mesh, exchange)[1]

    mesh, steps = on(devices, config, first)
    return Plan(
        case=case,
        devices=devices,
        mesh=mesh,
        steps=steps,
        init=on(1, plain)[1].init,
        rows=rows,
        length=length,
        pieces=(rows // own[0], length // own[1]),
        layers=size.layers,
    )


class Baseline(NamedTuple):
    """What one device did in a case.

    Attributes:
      found: loss and gradient norm of two steps.
      seconds: of one step, the other devices idle.
      at_once: the same while all devices do it; None where that was not asked for.
    """

    found: np.ndarray
    seconds: float
    at_once: float | None = None


def evaluate(settings: Settings, reporter: Reporter) -> None:
    """Every case on one device and on more, in the order that is given."""
    largest = jax.device_count()
    if largest < 2:
        raise UsageError("one device is present; scaling needs at least two")
    if settings.links:
        measure_links(reporter, largest)
    size = Size(settings.layers, settings.width, settings.vocab)
    plans = [
        [make_plan(case, size, devices, largest) for devices in counts(largest, case.between)]
        for case in map(parse_case, settings.cases)
    ]
    # One device's share on each of them: what chips and their power alone make of a step.
    others = {
        id(plans_of): [make_plan(plans_of[0].case, size, 1, largest, first) for first in range(1, largest)]
        for plans_of in plans
        if settings.at_once and not plans_of[0].case.strong
    }
    stages = [plans[i : i + settings.together] for i in range(0, len(plans), settings.together)]
    built: dict[tuple, Built] = {}
    for stage in stages:
        jobs: dict[tuple, Job] = {}
        # The largest first: they take longest to compile.
        every = [plan for case in stage for plan in [*case, *others.get(id(case), ())]]
        for plan in sorted(every, key=lambda plan: -plan.devices):
            if plan.key not in built:
                jobs.setdefault(plan.key, plan.job(settings.compiler_options))
        built.update(zip(jobs, compile_all(list(jobs.values()), settings.workers), strict=True))
        for case in stage:
            baseline = None
            for plan in case:
                found = measure(settings, reporter, plan, built[plan.key], baseline)
                if plan.devices == 1:
                    baseline = found
                    if baseline and (apart := others.get(id(case))):
                        each = [plan, *apart]
                        seconds = measure_at_once(settings, reporter, each, [built[p.key] for p in each])
                        baseline = baseline._replace(at_once=seconds)
                reporter.save()
    for device in jax.local_devices():
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        if peak:
            reporter.add(exact("device_peak_gib", peak / 2**30, device=device.id))


def measure(
    settings: Settings, reporter: Reporter, plan: Plan, step: Built, baseline: Baseline | None
) -> Baseline | None:
    """Checks one program against the baseline and times it; None if it did not run."""
    where = plan.where
    step = dataclasses.replace(step, job=dataclasses.replace(step.job, where=where))
    if step.program is None:
        reporter.add(*missing(METRICS, step, "compilation"))
        return None
    reporter.add(
        exact("peak_gib", program_bytes(step.program) / 2**30, **where),
        exact("compile_seconds", step.seconds, **where),
        *sent(step.program, plan),
    )
    try:
        held = {"state": plan.start(settings.seed)}
        batch = plan.batch(settings.seed, settings.vocab)

        def one() -> Any:
            held["state"], metrics = step.program(held["state"], batch)
            return metrics

        found = np.array([[float(x) for x in (m.loss, m.grad_norm)] for m in (one(), one())])
        if plan.devices > 1:
            if baseline is None:
                reporter.note(f"{_name(plan)}: one device did not run, so nothing is compared with it")
            elif not agrees(reporter, plan, found, baseline):
                return None
        seconds = sample_seconds(one, samples=settings.samples, least_seconds=settings.least_seconds)
        median_seconds = median("milliseconds", seconds, where).value
    except Exception as error:
        status, detail = failure(error)
        reporter.add(*missing(METRICS, dataclasses.replace(step, status=status, detail=detail), "run"))
        return None
    rate = median("tokens_per_second", [plan.rows * plan.length / s for s in seconds], where)
    reporter.add(rate, median("milliseconds", seconds, where, scale=1e3))
    if plan.devices > 1 and baseline is not None:
        share = baseline.seconds / (plan.devices if plan.case.strong else 1)
        reporter.add(
            exact("efficiency", share / median_seconds, **where),
            exact("exposed_milliseconds", 1e3 * (median_seconds - share), by="one device", **where),
        )
        if baseline.at_once is not None:
            reporter.add(exact("efficiency_at_once", baseline.at_once / median_seconds, **where))
    say(f"{_name(plan)}: {rate.value:,.0f} tokens/s, {1e3 * median_seconds:.1f} ms")
    if settings.profile:
        profile(reporter, plan, one)
    return Baseline(found, median_seconds)


def measure_at_once(
    settings: Settings, reporter: Reporter, plans: Sequence[Plan], steps: Sequence[Built]
) -> float | None:
    """Seconds until every device has done a step of its own, nothing sent; None if one did not run.

    What is left of the efficiency beside this is what dividing costs; the rest is the devices' own.
    """
    where = plans[0].where
    if lacking := [step for step in steps if step.program is None]:
        reporter.add(*missing(["milliseconds_at_once"], lacking[0], "compilation"))
        return None
    try:
        states = [plan.start(settings.seed) for plan in plans]
        batches = [plan.batch(settings.seed, settings.vocab) for plan in plans]

        def all_once() -> Any:
            found = []
            for index, (step, batch) in enumerate(zip(steps, batches, strict=True)):
                states[index], metrics = step.program(states[index], batch)
                found.append(metrics)
            return found

        seconds = sample_seconds(all_once, samples=settings.samples, least_seconds=settings.least_seconds)
    except Exception as error:
        reporter.note(f"{_name(plans[0])}: not at once on all: {failure(error)[1]}")
        return None
    value = median("milliseconds_at_once", seconds, where | {"at_once": len(plans)}, scale=1e3)
    reporter.add(value)
    say(f"{_name(plans[0])}: {value.value:.1f} ms where {len(plans)} devices do it at once, each alone")
    return value.value / 1e3


def profile(reporter: Reporter, plan: Plan, one: Callable[[], Any]) -> None:
    """Adds where the devices' time goes: computation, collectives, both, and the largest kernels."""
    where = plan.where
    try:
        found = step_times(one)
    except Exception as error:
        reporter.note(f"{_name(plan)}: no profile: {failure(error)[1]}")
        return
    if found is None:
        return
    reporter.add(
        exact("computing_milliseconds", found.computing, **where),
        exact("idle_milliseconds", found.idle, **where),
    )
    if plan.devices > 1:
        for device, own in enumerate(found.each):
            reporter.add(exact("device_computing_milliseconds", own, device=device, **where))
    for between, milliseconds, times in found.gaps:
        reporter.add(
            exact("gap_milliseconds", milliseconds, detail=f"{times:g} times", between=between, **where)
        )
    for kernel, milliseconds in found.kernels:
        reporter.add(exact("kernel_milliseconds", milliseconds, kernel=kernel, **where))
    if plan.devices > 1:
        reporter.add(
            exact("communication_milliseconds", found.sending, **where),
            exact("exposed_milliseconds", found.alone, by="profile", **where),
        )
    say(
        f"computing {found.computing:.1f} ms, collectives {found.sending:.1f}, "
        f"{found.alone:.1f} of it alone, idle {found.idle:.1f}"
    )


def agrees(reporter: Reporter, plan: Plan, found: np.ndarray, baseline: Baseline) -> bool:
    """Whether two steps have the losses and gradient norms of the baseline."""
    off = float(np.max(np.abs(found / baseline.found - 1)))
    reporter.add(exact("relative_error", off, **plan.where))
    if off < _TOLERANCE:
        return True
    reporter.fail_control(f"{_name(plan)}: losses or gradients are off by {off:.3g} from one device")
    return False


def _name(plan: Plan) -> str:
    return " ".join(f"{key}={value}" for key, value in plan.where.items())


def sent(program: Any, plan: Plan) -> list:
    """MiB that one device receives in a step, by kind; what is in a loop counts once for each run."""
    total = dict.fromkeys(KINDS, 0.0)
    turns = plan.layers // min(plan.case.unroll, plan.layers)
    for one in collectives(program.as_text()):
        total[one.kind] += one.bytes * (turns if one.in_loop else 1)
    return [exact("sent_mib", size / 2**20, kind=kind, **plan.where) for kind, size in total.items() if size]


table, figures = scaling_view.table, scaling_view.figures


def main(argv: list[str] | None = None) -> int:
    """Runs the evaluation; returns the exit code."""
    return common.run("scaling", Settings, evaluate, figures=figures, table=table, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
