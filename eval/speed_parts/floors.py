"""The two ceilings of this device, measured in this process: copy bandwidth and matrix rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from eval.common import Reporter
from eval.speed_parts.timing import Job, compile_all, median, sample_seconds


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Bytes read plus written per second of a large copy; operations per second of a large bf16 product."""

    bytes_per_second: float
    flops_per_second: float

    def floor_seconds(self, nbytes: float, flops: float) -> float:
        """No program with these bytes and operations runs faster."""
        return max(nbytes / self.bytes_per_second, flops / self.flops_per_second)


def measure(
    reporter: Reporter, *, copy_bytes: int, matrix: int, samples: int, least_seconds: float
) -> Ceilings:
    """Measures both and reports them."""
    key = jax.random.key(0)
    source = jax.random.bits(key, (copy_bytes // 4,), jnp.uint32)
    left, right = (jax.random.normal(k, (matrix, matrix), jnp.bfloat16) for k in jax.random.split(key))
    copy, product = compile_all(
        [
            # A bit flip, so that the compiler cannot alias the output with the input.
            Job({}, lambda: jax.jit(lambda x: x ^ jnp.uint32(1)).lower(source)),
            Job({}, lambda: jax.jit(lambda x, y: x @ y).lower(left, right)),
        ],
        2,
    )
    copied = sample_seconds(lambda: copy.program(source), samples=samples, least_seconds=least_seconds)
    multiplied = sample_seconds(
        lambda: product.program(left, right), samples=samples, least_seconds=least_seconds
    )
    rates = Ceilings(2 * source.nbytes / np.median(copied), 2 * matrix**3 / np.median(multiplied))
    reporter.add(
        median("copy_tb_per_s", [2 * source.nbytes / s for s in copied], {"part": "floors"}, scale=1e-12),
        median(
            "product_tflop_per_s", [2 * matrix**3 / s for s in multiplied], {"part": "floors"}, scale=1e-12
        ),
    )
    return rates
