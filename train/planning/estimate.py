"""A run on a mesh of so many devices: memory, speed and duration, and what to change if it does not fit."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from holo_jax.kernels.capability import planned_for
from holo_jax.kernels.hopper import backend as hopper
from holo_jax.model import count_parameters
from holo_jax.parallel import TENSOR
from train.model_functions import model_functions
from train.planning.communication import Exchange, exchanges
from train.planning.hardware import GB, Hardware, step_share
from train.planning.memory import Memory, estimate_memory
from train.planning.operations import operations_per_token, product_parameters
from train.run_config import RunConfig
from train.sharding import MESH_AXES, mesh_sizes

RUN_TOKENS = 6e9


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the planner found.

    Attributes:
      devices, mesh: how many, and the size of each axis.
      parameters: numbers in the model.
      memory: bytes on a device.
      capacity: bytes that a device has.
      compute_seconds: of a step, without communication.
      measured: whether the share of the product rate behind it was measured for these mixers.
      exchanges: communication of a step.
      tokens_per_step: tokens of a step.
      missing: why kernels that training can use are not in the program that was traced, or None.
    """

    devices: int
    mesh: dict[str, int]
    parameters: int
    memory: Memory
    capacity: float
    compute_seconds: float
    measured: bool
    exchanges: list[Exchange]
    tokens_per_step: int
    missing: str | None

    @property
    def fits(self) -> bool:
        """Whether the largest moment of a step fits into a device."""
        return self.memory.peak <= self.capacity

    @property
    def communication_seconds(self) -> float:
        """All exchanges one after the other."""
        return sum(exchange.seconds for exchange in self.exchanges)

    @property
    def step_seconds(self) -> tuple[float, float]:
        """With communication hidden behind computation as far as possible, and not at all."""
        compute, sent = self.compute_seconds, self.communication_seconds
        return max(compute, sent), compute + sent

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Best and worst, as ``step_seconds``."""
        best, worst = self.step_seconds
        return self.tokens_per_step / best, self.tokens_per_step / worst

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of a step that is computation, best and worst."""
        best, worst = self.step_seconds
        return self.compute_seconds / best, self.compute_seconds / worst

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: bytes, seconds, tokens."""
        best, worst = self.tokens_per_second
        sent = [
            (one.axis, one.what, one.bytes, one.hops, one.link.name, one.seconds) for one in self.exchanges
        ]
        names = ("axis", "what", "bytes", "hops", "link", "seconds")
        return {
            "devices": self.devices,
            "mesh": self.mesh,
            "parameters": self.parameters,
            "memory_bytes": self.memory._asdict(),
            "phase_bytes": self.memory.phases,
            "peak_bytes": self.memory.peak,
            "capacity_bytes": self.capacity,
            "fits": self.fits,
            "compute_seconds": self.compute_seconds,
            "speed_measured": self.measured,
            "exchanges": [dict(zip(names, one, strict=True)) for one in sent],
            "kernels_missing": self.missing,
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_second": {"best": best, "worst": worst},
            "seconds_for_6b_tokens": {"best": RUN_TOKENS / best, "worst": RUN_TOKENS / worst},
        }


def make_plan(config: RunConfig, devices: int, hardware: Hardware, *, parts: bool = True) -> Plan:
    """The plan of ``config`` on ``devices`` devices; ``parts`` as for ``estimate_memory``.

    Raises:
      MeshError: if mesh, batch or parameters do not divide.
    """
    # mesh.devices says how many of those present a run uses; here all that are asked for are present.
    sizes = mesh_sizes(config.mesh, devices)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    memory = estimate_memory(config, mesh, hardware.card, parts=parts)
    functions = model_functions(config.model)
    used = math.prod(sizes)
    share, measured = step_share(config.model, mesh.shape[TENSOR])
    products = product_parameters(functions, config.model)
    operations = operations_per_token(config.model, products, config.context_length)
    rate = share * hardware.product_flops * used
    return Plan(
        devices=used,
        mesh=dict(zip(MESH_AXES, sizes, strict=True)),
        parameters=count_parameters(functions.shapes),
        memory=memory,
        capacity=hardware.hbm_gb * GB,
        compute_seconds=config.tokens_per_step * operations / rate,
        measured=measured,
        exchanges=exchanges(config, mesh, hardware),
        tokens_per_step=config.tokens_per_step,
        missing=_missing(hardware),
    )


def _missing(hardware: Hardware) -> str | None:
    with planned_for(hardware.card):
        return hopper.missing()


def advise(config: RunConfig, devices: int, hardware: Hardware) -> tuple[str, ...]:
    """Fields to change, as ``name=value``, so that it fits; empty if nothing tried does.

    In order: more parts of a batch, more of the blocks computed again, weights divided over more devices;
    each alone and with the largest change of the kinds before.
    """
    for changes in _changes(config, devices):
        changed = _with(config, changes)
        if make_plan(changed, devices, hardware, parts=False).fits:
            return tuple(f"{name}={value}" for name, value in changes.items())
    return ()


def _changes(config: RunConfig, devices: int) -> Iterator[dict[str, Any]]:
    sizes = dict(zip(MESH_AXES, mesh_sizes(config.mesh, devices), strict=True))
    rows = config.global_batch_size // (sizes["data"] * sizes["fsdp"])
    parts = [p for p in range(config.accumulation_steps + 1, rows + 1) if rows % p == 0]
    yield from ({"accumulation_steps": p} for p in parts)
    most: dict[str, Any] = {"accumulation_steps": parts[-1]} if parts else {}
    policies = ("none", "dots", "full")
    for policy in policies[policies.index(config.model.remat) + 1 :]:
        yield {"model.remat": policy}
        if most:
            yield {**most, "model.remat": policy}
    most["model.remat"] = "full"
    fsdp = sizes["fsdp"] * 2
    while fsdp <= sizes["data"] * sizes["fsdp"]:
        if (sizes["data"] * sizes["fsdp"]) % fsdp == 0 and config.model.hidden_size % fsdp == 0:
            yield {"mesh.fsdp": fsdp, "mesh.data": -1}
            yield {**most, "mesh.fsdp": fsdp, "mesh.data": -1}
        fsdp *= 2


def _with(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {}
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        if not section:
            values[field] = value
        elif section == "model":
            values["model"] = config.model.replace(**{field: value})
        else:
            values["mesh"] = dataclasses.replace(values.get("mesh", config.mesh), **{field: value})
    return dataclasses.replace(config, **values)
