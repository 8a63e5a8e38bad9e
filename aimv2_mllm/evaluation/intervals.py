"""How sure a mean of scores is: 95 % intervals, by formula for shares, else by resampling.

Refuses empty lists. Questions count as independent of each other, those about one picture too.
"""

from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054  # the normal quantile of a two-sided interval of 95 %
RESAMPLES = 2000


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of `right` in `count` (Wilson, 1927)."""
    share, z2 = right / count, Z_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = Z_95 / (1 + z2 / count) * (share * (1 - share) / count + z2 / (4 * count**2)) ** 0.5
    return max(0.0, middle - spread), min(1.0, middle + spread)


def bootstrap_interval(scores: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of `scores`: the quantiles of its value in `RESAMPLES` draws of
    as many of them, with replacement (Efron, 1979)."""
    values, random = np.asarray(scores, dtype=np.float64), np.random.default_rng(seed)
    means = [
        values[random.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean: Wilson's where each score is 0 or 1, else by resampling."""
    if set(scores) <= {0.0, 1.0}:
        return wilson_interval(round(sum(scores)), len(scores))
    return bootstrap_interval(scores)
