"""Percentile bootstrap intervals, paired where two contenders answered the same questions.

N units (windows or queries), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 4000
Interval = tuple[float, float]


def resampled_sums(values: Sequence[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """Sums over N units drawn with replacement, the same draw for every array: each [R]; NaN when
    there is one unit, of which nothing can be said."""
    count = len(values[0])
    if count < 2:
        return [np.full(RESAMPLES, np.nan) for _ in values]
    generator = np.random.default_rng(seed)
    weights_RN = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return [weights_RN @ np.asarray(column, dtype=np.float64) for column in values]


def interval95(samples: np.ndarray) -> Interval | None:
    """The middle 95 % of resampled figures; None when some are not finite."""
    if not len(samples) or not np.isfinite(samples).all():
        return None
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def ratio(over: float, under: float) -> float | None:
    """`over` ÷ `under`, None where that is no finite number."""
    if not under:
        return None
    value = over / under
    return value if math.isfinite(value) else None


def ratio_interval95(over: np.ndarray, under: np.ndarray) -> Interval | None:
    """Interval of a ratio of resampled figures; None when the divisor can be zero."""
    return interval95(over / under) if np.all(under > 0) else None
