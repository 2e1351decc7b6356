"""How fast the devices of a machine add up an array: a fixed time, and bytes a second."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from eval.common import Reporter
from eval.results import exact
from eval.speed_parts.timing import failure, median, sample_seconds, say
from holo_jax.parallel import DATA
from train.run_config import MeshConfig
from train.sharding import make_mesh, replicated

_CHAIN = 16
_LINK_BYTES = tuple(2**k for k in (10, 16, 20, 22, 24, 26, 29))


def measure_links(reporter: Reporter, largest: int) -> None:
    """An all-reduce among all devices, small and large: microseconds, and bytes a second in its ring.

    Several follow one another in a program, each waiting for the last, as in a step. A ring of n sends
    2 (n - 1) / n of the bytes from each device.
    """
    mesh = make_mesh(MeshConfig(devices=largest, data=largest, fsdp=1, seq=1, tensor=1))

    def chained(x: jax.Array) -> jax.Array:
        for _ in range(_CHAIN):
            x = jax.lax.psum(x, DATA) * (1.0 / largest)
        return x

    run = jax.jit(jax.shard_map(chained, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    found: list[tuple[float, float]] = []
    for size in _LINK_BYTES:
        held = {"x": jax.device_put(np.ones(size // 4, np.float32), replicated(mesh))}

        def one(held: dict = held) -> jax.Array:
            held["x"] = run(held["x"])
            return held["x"]

        try:
            seconds = sample_seconds(one, samples=5, least_seconds=0.002)
        except Exception as error:
            reporter.note(f"no all-reduce of {size} bytes: {failure(error)[1]}")
            return
        where = {"devices": largest, "bytes": size}
        each = [one / _CHAIN for one in seconds]
        ring = [2 * (largest - 1) / largest * size / one for one in each]
        reporter.add(
            median("all_reduce_microseconds", each, where, scale=1e6),
            median("all_reduce_ring_gb_per_second", ring, where, scale=1e-9),
        )
        found.append((ring[0] * each[0], float(np.median(each))))
        say(f"all-reduce of {size:,} bytes: {1e6 * np.median(each):.1f} us, {np.median(ring) / 1e9:.1f} GB/s")

    fixed, rate = fit_link(*zip(*found, strict=True))
    reporter.add(
        exact("link_fixed_microseconds", 1e6 * fixed, devices=largest),
        exact("link_gb_per_second", 1e-9 * rate, devices=largest),
    )
    say(f"all-reduce: {1e6 * fixed:.1f} us and its bytes at {1e-9 * rate:.1f} GB/s")


def fit_link(sent: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(fixed seconds, bytes a second) of ``seconds = fixed + sent / rate``, by least relative errors."""
    weights = 1 / np.asarray(seconds)
    columns = np.stack([weights, np.asarray(sent) * weights], axis=1)
    fixed, slope = np.linalg.lstsq(columns, np.ones(len(weights)), rcond=None)[0]
    return float(fixed), float(1 / slope)
