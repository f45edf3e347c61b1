"""Means over seeds, with their intervals. Plain numbers: needs no accelerator."""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit


def interval(values: Sequence[float]) -> dict:
    """mean, interval ([low, high], 95 %, Student's t; None below two values, or where one is not finite) and n of `values`: of one run
    over seeds, or of paired differences by seed."""
    n, mean = len(values), float(sum(values) / len(values))
    if n < 2 or not np.isfinite(values).all():
        return {"mean": mean, "interval": None, "n": n}
    half = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(n))
    return {"mean": mean, "interval": [mean - half, mean + half], "n": n}
