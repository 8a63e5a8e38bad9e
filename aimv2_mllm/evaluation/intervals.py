"""How sure a mean of scores is: 95 % intervals, by formula for shares, else by resampling.

Scores of one group, such as the questions about one picture, stay together: they are not
independent of each other. Refuses empty lists.
"""

from collections.abc import Hashable, Sequence

import numpy as np

Z_95 = 1.959963984540054  # the normal quantile of a two-sided interval of 95 %
RESAMPLES = 2000
ROUNDING = 1e-12  # of sums of equal numbers
UNSEEN = 3.0  # what did not happen in n draws has a share of less than 3 / n, 95 % sure


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of `right` in `count` (Wilson, 1927)."""
    share, z2 = right / count, Z_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = Z_95 / (1 + z2 / count) * (share * (1 - share) / count + z2 / (4 * count**2)) ** 0.5
    return max(0.0, middle - spread), min(1.0, middle + spread)


def bootstrap_interval(
    scores: Sequence[float], *, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the mean of `scores`: the quantiles of its value in `RESAMPLES` draws of
    as many whole `groups` (None: each score is its own), with replacement (Efron, 1979).

    Where all groups are alike, draws tell nothing: a share of 3 / n of them may still be off by 1.
    """
    sums, counts = _by_group(scores, groups)
    count, random = len(sums), np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        drawn = random.integers(count, size=count)
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = map(float, np.quantile(means, (0.025, 0.975)))
    unseen = min(UNSEEN / count, 1.0) if high - low < ROUNDING else 0.0
    return low - unseen, high + unseen


def interval(
    scores: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    are_shares: bool = True,
) -> tuple[float, float]:
    """The 95 % interval of the mean of scores from 0 on, of which `groups` stay together.

    Wilson's where they `are_shares`, each is 0 or 1, and no group has several of them, or all are
    alike: then it is that of as many draws as there are groups. Else by resampling.
    """
    count = len(scores) if groups is None else len(set(groups))
    found = set(scores)
    if are_shares and found <= {0.0, 1.0} and (count == len(scores) or len(found) == 1):
        return wilson_interval(round(sum(scores) / len(scores) * count), count)
    low, high = bootstrap_interval(scores, groups=groups)
    return max(low, 0.0), high


def _by_group(
    scores: Sequence[float], groups: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Of each group the sum of its scores, and how many they are: (G,) each."""
    values = np.asarray(scores, dtype=np.float64)
    if groups is None:
        return values, np.ones(len(values))
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    places = [numbers[group] for group in groups]
    return np.bincount(places, weights=values), np.bincount(places).astype(np.float64)
