"""Correlations over runs."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; NaN below two points, or where one side does not vary."""
    n = len(x)
    if n != len(y):
        raise ValueError(f"x and y must have the same length; got {n} and {len(y)}")
    if n < 2:
        return math.nan
    mx, my = math.fsum(x) / n, math.fsum(y) / n
    xx = math.fsum((a - mx) ** 2 for a in x)
    yy = math.fsum((b - my) ** 2 for b in y)
    xy = math.fsum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else math.nan


def ranks(x: Sequence[float]) -> list[float]:
    """Rank of each value from 1; equal ones share the mean of theirs."""
    order = sorted(range(len(x)), key=lambda i: x[i])
    out = [0.0] * len(x)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and x[order[end]] == x[order[start]]:
            end += 1
        for i in order[start:end]:
            out[i] = (start + end + 1) / 2
        start = end
    return out


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, ties sharing ranks."""
    return pearson(ranks(x), ranks(y))
