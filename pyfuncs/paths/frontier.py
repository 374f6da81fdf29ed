"""Two axes, target and retention: the Pareto front, hypervolume, and rules that choose a point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Scored:
    """One model: how well it does what it was trained for, and what it was able to do before.  Higher is better."""

    target: float
    retention: float
    t: Any = None
    name: str = ""


Rule = Callable[[Sequence[Scored]], Scored]


def dominates(a: Scored, b: Scored) -> bool:
    """Whether a is nowhere worse than b and somewhere better."""
    return a.target >= b.target and a.retention >= b.retention and (a.target, a.retention) != (b.target, b.retention)


def pareto_front(points: Iterable[Scored]) -> list[Scored]:
    """The points that no other dominates, by rising target.  Equal points are all kept.  ValueError for a NaN."""
    points = _checked(points)
    front: list[Scored] = []
    best = float("-inf")
    for p in sorted(points, key=lambda p: (-p.target, -p.retention)):
        tied = front and (p.target, p.retention) == (front[-1].target, front[-1].retention)
        if p.retention > best or tied:
            front.append(p)
            best = max(best, p.retention)
    return front[::-1]


def hypervolume(points: Iterable[Scored], reference: tuple[float, float] = (0.0, 0.0)) -> float:
    """Area that the points dominate above ``reference`` = (target, retention).

    PEFT-Arena has no scalar of its own; (the base model's target, 0) counts only what was learned.
    """
    area, floor = 0.0, reference[1]
    for p in reversed(pareto_front(points)):
        if p.target > reference[0] and p.retention > floor:
            area += (p.target - reference[0]) * (p.retention - floor)
            floor = p.retention
    return area


def best_target(budget: float, base: float) -> Rule:
    """The highest target among points that forget at most ``budget``: retention >= base - budget."""

    def rule(points: Sequence[Scored]) -> Scored:
        return max(_within(points, budget, base), key=lambda p: (p.target, p.retention))

    return rule


def furthest(budget: float, base: float) -> Rule:
    """The point with the largest t among those that forget at most ``budget``."""
    return lambda points: max(_within(points, budget, base), key=lambda p: p.t)


def best_sum(weight: float = 1.0) -> Rule:
    """The highest target + weight * retention."""
    return lambda points: max(_checked(points), key=lambda p: p.target + weight * p.retention)


def retention_at(points: Iterable[Scored], target: float) -> float | None:
    """Retention at a target, between the points of the front in a straight line; None outside their targets.

    Methods are compared at matched target with it.
    """
    front = pareto_front(points)
    for low, high in pairwise(front):
        if low.target <= target <= high.target:
            if high.target == low.target:
                return max(low.retention, high.retention)
            part = (target - low.target) / (high.target - low.target)
            return low.retention + part * (high.retention - low.retention)
    return front[0].retention if front and front[0].target == target else None


def _within(points: Sequence[Scored], budget: float, base: float) -> list[Scored]:
    kept = [p for p in _checked(points) if p.retention >= base - budget]
    if not kept:
        best = max(p.retention for p in points)
        raise ValueError(f"no point forgets at most {budget}: the best retention is {best} of {base}")
    return kept


def _checked(points: Iterable[Scored]) -> list[Scored]:
    points = list(points)
    if not points:
        raise ValueError("no points")
    for p in points:
        if p.target != p.target or p.retention != p.retention:
            raise ValueError(f"a score is NaN: {p}")
    return points
