"""95% intervals of proportions and of means, as plain functions of numpy arrays."""

import math

import numpy as np

_Z = 1.959963984540054  # two-sided 95% point of the normal distribution


def wilson(successes: int, n: int) -> tuple[float, float, float]:
    """Proportion with Wilson's 95% score interval.

    With p = successes / n and z = 1.96 the interval is
    ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``: unlike the normal one it is not
    empty at p = 0 or p = 1.

    Returns:
      (p, low, high).

    Raises:
      ValueError: if n < 1 or successes is outside 0..n.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if n < 1:
        raise ValueError(f"n is {n}; a proportion needs at least one trial")
    if not 0 <= successes <= n:
        raise ValueError(f"successes is {successes}; it must be within 0..{n}")
    p, z2 = successes / n, _Z * _Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends the formula equals p exactly, up to rounding that must not put p outside.
    return p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


def bootstrap(samples: np.ndarray, *, seed: int = 0, resamples: int = 2000, statistic=np.mean):
    """Statistic of independent samples with its 95% percentile bootstrap interval.

    Args:
      samples: [n, ...]; axis 0 is resampled with replacement, ``statistic(x, axis=0)`` is reported.
      seed: of the resampling.
      resamples: number of bootstrap replicates.
      statistic: a reduction that takes ``axis``.

    Returns:
      (value, low, high), each with the shape of one sample (floats for 1-d input). One sample has no
      spread to measure: its interval has width zero and says nothing.

    Raises:
      ValueError: for no samples or a value that is not finite.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", 1979.
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim == 0 or samples.shape[0] < 1:
        raise ValueError(f"samples has shape {samples.shape}; axis 0 needs at least one sample")
    if not np.isfinite(samples).all():
        raise ValueError("samples holds values that are not finite")
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, samples.shape[0], (resamples, samples.shape[0]))
    replicates = np.stack([statistic(samples[r], axis=0) for r in rows])
    low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
    value = np.asarray(statistic(samples, axis=0))
    low, high = np.minimum(low, value), np.maximum(high, value)
    if value.ndim == 0:
        return float(value), float(low), float(high)
    return value, low, high
