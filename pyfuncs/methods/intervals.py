"""Confidence intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

#: Student's t, two-sided 95%, for 1, 2, ... degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093,
)  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval by Student's t; NaN for one value."""
    n = len(values)
    if n < 2:
        return values[0], math.nan
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)
