"""The command line of the planner: what a run would need and take, before any device is used. Writes nothing.

python -m train.plan --config=configs/slimpajama.py --devices=8 --hbm=80 [--config.mesh.fsdp=8] [--json]

Exit codes: 0 the run fits into the memory of the devices; 1 it does not; 2 bad usage.
"""

import dataclasses
import gc
import json
import sys

from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from train.errors import EXIT_FAILED, TrainError, UsageError
from train.planning.estimate import RUN_TOKENS, Plan, advise, make_plan
from train.planning.hardware import H100
from train.run_config import RunConfig

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration; fields by --config.FIELD=VALUE.")
_DEVICES = flags.DEFINE_integer("devices", 0, "Devices; 0: those present in this process.")
_HBM = flags.DEFINE_float("hbm", H100.hbm_gb, "Memory of a device in 10^9 bytes.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")


def _parse(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
        # ml_collections nests the text of one KeyError in another, which quotes it twice.
        raise UsageError(str(error).replace("\\n", ": ").translate({92: None, 39: None})) from error


def _config(rest: list[str]) -> RunConfig:
    if rest:
        raise UsageError(f"{rest[0]} is not expected; every argument is a --flag=value")
    if _CONFIG.value is None:
        raise UsageError("give --config=configs/NAME.py [--devices=N] [--hbm=GB] [--json]")
    if _DEVICES.value < 0:
        raise UsageError(f"--devices is {_DEVICES.value}; it must be zero or positive")
    if not 0 < _HBM.value < float("inf"):
        raise UsageError(f"--hbm is {_HBM.value}; it must be positive and finite")
    try:
        return RunConfig.from_dict(_CONFIG.value.to_dict())
    except OSError as error:  # ml_collections reports a missing file at the first use
        raise UsageError(error) from error


def main(arguments: list[str]) -> None:
    """Prints the plan and exits with 0 if it fits, 1 if not."""
    gc.set_threshold(100_000, 50, 50)  # tracing makes many objects and little garbage: a seventh of its time
    config = _config(arguments[1:])
    hardware = dataclasses.replace(H100, hbm_gb=_HBM.value)
    devices = _DEVICES.value or _present()
    plan = make_plan(config, devices, hardware)
    advice = () if plan.fits else advise(config, devices, hardware)
    if _JSON.value:
        print(json.dumps(plan.to_dict() | {"hardware": hardware.name, "change": advice}))
    else:
        _show(Console(highlight=False, soft_wrap=True), config, plan, advice, hardware.name)
    sys.exit(0 if plan.fits else EXIT_FAILED)


def _present() -> int:
    import jax

    return jax.device_count()


def _show(console: Console, config: RunConfig, plan: Plan, advice: tuple[str, ...], device: str) -> None:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    console.print(f"{config.name}: {plan.parameters:,} parameters, {plan.devices} x {device}, {mesh}")
    memory = Table("on each device", "GiB", box=None, pad_edge=False)
    memory.columns[1].justify = "right"
    m = plan.memory
    parts = {
        "parameters": m.params,
        "optimizer": m.optimizer,
        "batch and counters": m.other,
        "gradients": m.gradients,
        "activations kept": m.kept,
        "activations of one block": m.working,
        "weights of one block, gathered": m.gathered,
        "logits": m.logits,
        "optimizer, while it updates": m.update,
    }
    for name, size in parts.items():
        memory.add_row(name, f"{size / 2**30:.3f}")
    for name, size in m.phases.items():
        memory.add_row(f"in all, {name}", f"{size / 2**30:.3f}")
    console.print(memory)
    if plan.exchanges:
        exchanged = Table(
            "sent by each device in a step", "axis", "GB", "hops", "ms", "network", box=None, pad_edge=False
        )
        for one in plan.exchanges:
            row = (f"{one.bytes / 1e9:.3f}", str(one.hops), f"{one.seconds * 1e3:.2f}", one.link.name)
            exchanged.add_row(one.what, one.axis, *row)
        console.print(exchanged)
    basis = "measured share" if plan.measured else "share of the nearest form measured, not of this one"
    compute, sent = (1e3 * s for s in (plan.compute_seconds, plan.communication_seconds))
    console.print(
        f"a step of {plan.tokens_per_step:,} tokens: {compute:.1f} ms of computation ({basis}), "
        f"{sent:.1f} ms of communication"
    )
    if plan.missing is not None:
        console.print(
            f"memory is that of training with what is installed here: {plan.missing}; "
            "the speed was measured with those kernels",
            markup=False,
        )
    rates = plan.tokens_per_second
    hours = [RUN_TOKENS / rate / 3600 for rate in rates]
    if plan.exchanges:
        console.print(
            f"{rates[0]:,.0f} tok/s with all communication hidden, {rates[1]:,.0f} with none; "
            f"6B tokens in {hours[0]:.2f} to {hours[1]:.2f} h"
        )
    else:
        console.print(f"{rates[0]:,.0f} tok/s; 6B tokens in {hours[0]:.2f} h")
    need = f"{m.peak / 2**30:.2f} of {plan.capacity / 2**30:.2f} GiB"
    if plan.fits:
        console.print(f"fits: {need} on each device")
    elif advice:
        console.print(f"does not fit: {need} on each device; it would with {', '.join(advice)}")
    else:
        console.print(
            f"does not fit: {need} on each device, nor with smaller parts, remat or fsdp; more devices?"
        )


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=_parse)
    except TrainError as failure:
        print(f"train.plan: {' '.join(str(failure).split())}", file=sys.stderr)
        sys.exit(failure.exit_code)
