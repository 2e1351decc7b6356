"""What this process could run a kernel on, and the error of a request that cannot be met."""

from importlib import metadata, util

import jax


class BackendUnavailableError(RuntimeError):
    """A memory backend was asked for by name and cannot run this call; the message says why."""


def target_device() -> jax.Device:
    """The device that a computation traced now will run on: the configured default, or the first."""
    default: jax.Device | str | None = getattr(jax.config, "jax_default_device")  # noqa: B009
    if isinstance(default, jax.Device):
        return default
    return jax.devices(default)[0] if isinstance(default, str) else jax.devices()[0]


def compute_capability() -> tuple[int, int] | None:
    """CUDA compute capability of the target device, or None if it is no CUDA GPU."""
    device = target_device()
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not isinstance(capability, str) or "." not in capability:
        return None
    major, minor = capability.split(".")[:2]
    return int(major), int(minor)


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
    return jax.device_count() > 1
