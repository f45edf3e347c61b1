"""Intervals by the bootstrap over groups: what belongs together (a place, a subject) is drawn together, on the host, in float64."""

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 2000


def group_interval(
    values: Float[np.ndarray, " rows"], groups: Int[np.ndarray, " rows"], *, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """(low, high) of the mean of `values`: percentiles of its value over `resamples` draws of whole groups with replacement (Efron and
    Tibshirani 1993). None below two groups, of which nothing can be said. Rows of one group depend on each other, so that a
    bootstrap over rows would be too narrow; with few groups (below ten or so) this one is too. The same seed gives the same draws."""
    _, index = np.unique(groups, return_inverse=True)
    number = int(index.max()) + 1 if len(index) else 0
    if number < 2:
        return None
    sums, sizes = np.bincount(index, np.asarray(values, np.float64), number), np.bincount(index, minlength=number)
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        times = np.bincount(draw.integers(0, number, number), minlength=number)
        means[i] = times @ sums / (times @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
