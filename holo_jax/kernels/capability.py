"""What this process could run a kernel on, or plans for, and the error of a request that cannot be met."""

import contextlib
import importlib
import types
from collections.abc import Iterator
from importlib import metadata, util
from typing import Any

import jax

from holo_jax.target import TOLD, Card, told


class BackendUnavailableError(RuntimeError):
    """A memory backend was asked for by name and cannot run this call; the message says why."""


@contextlib.contextmanager
def planned_for(card: Card) -> Iterator[None]:
    """Inside, programs are traced as on ``card``, whatever is present: with its kernels, not to be run here.

    Kernels of packages that are not installed are not among them. jax-linear-attention asks for the device
    once a process and remembers the answer; inside it remembers the card, in every thread.
    """
    with TOLD(card), _remembered(card):
        yield


@contextlib.contextmanager
def _remembered(card: Card) -> Iterator[None]:
    if util.find_spec("jla") is None:
        yield
        return
    module: Any = importlib.import_module("jla.ops.mosaic_gpu._common")
    major, minor = card.compute_capability
    device = types.SimpleNamespace(
        platform="gpu", compute_capability=f"{major}.{minor}", core_count=card.multiprocessors
    )
    asked = (module.is_hopper, module.num_sms)
    real = module.jax
    for question in asked:
        question.cache_clear()
    module.jax = types.SimpleNamespace(devices=lambda: [device])
    try:
        for question in asked:
            question()
    finally:
        module.jax = real
    try:
        yield
    finally:
        for question in asked:
            question.cache_clear()


def target_device() -> jax.Device:
    """The device that a computation traced now will run on: the configured default, or the first."""
    default: jax.Device | str | None = getattr(jax.config, "jax_default_device")  # noqa: B009
    if isinstance(default, jax.Device):
        return default
    return jax.devices(default)[0] if isinstance(default, str) else jax.devices()[0]


def compute_capability() -> tuple[int, int] | None:
    """CUDA compute capability of the told card or the target device, or None if it is no CUDA GPU."""
    card = told()
    if card is not None:
        return card.compute_capability
    device = target_device()
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not isinstance(capability, str) or "." not in capability:
        return None
    major, minor = capability.split(".")[:2]
    return int(major), int(minor)


def triton_missing() -> str | None:
    """Why no kernel that Triton compiles can run here, or None."""
    capability = compute_capability()
    if capability is None or capability < (8, 0):
        return "its kernels need an NVIDIA GPU of compute capability 8.0 or higher"
    return None


def multiprocessors() -> int:
    """Of the device that a computation traced now will run on; 0 where it does not say."""
    card = told()
    return int(getattr(target_device(), "core_count", 0) or 0) if card is None else card.multiprocessors


def installed_version(module: str, distribution: str) -> str | None:
    """Version of an importable distribution, or None."""
    if util.find_spec(module) is None:
        return None
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def partitioned() -> bool:
    """Whether the compiler may split this computation over devices, which a custom call does not survive.

    A kernel is opaque to the partitioner: it would gather the whole batch on every device. Inside
    ``jax.shard_map`` over every axis each device runs its own kernel, so that is fine.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        manual = jax.sharding.AxisType.Manual
        return any(
            kind != manual for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True) if size > 1
        )
    return told() is None and jax.device_count() > 1
