"""Scoring the points of a path, and choosing one on held-out sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from .frontier import Rule, Scored
from .path import Point, WeightPath

#: model -> score, higher is better.
Evaluator = Callable[[torch.nn.Module], float]


def score(path: WeightPath, t: Point, model: torch.nn.Module, target: Evaluator, retention: Evaluator) -> Scored:
    """Load theta(t) into the model and score it on both axes.  The model keeps those weights."""
    path.load_into(model, t)
    return Scored(float(target(model)), float(retention(model)), t)


def sweep(
    path: WeightPath, grid: Iterable[Point], model: torch.nn.Module, target: Evaluator, retention: Evaluator
) -> list[Scored]:
    """Score each point of a grid.  The model is left with the weights that it came with."""
    before = {name: x.detach().clone() for name, x in model.state_dict().items()}
    try:
        return [score(path, t, model, target, retention) for t in grid]
    finally:
        model.load_state_dict(before)


@dataclass(frozen=True)
class Choice:
    """A point chosen on held-out sets.

    chosen: its scores there; test: its scores on the test sets; points: all of the grid, on the held-out sets.
    """

    chosen: Scored
    test: Scored
    points: list[Scored]


def choose(
    path: WeightPath, grid: Iterable[Point], model: torch.nn.Module, rule: Rule, *,
    held_out: tuple[Evaluator, Evaluator], test: tuple[Evaluator, Evaluator],
) -> Choice:  # fmt: skip
    """Choose a point by ``rule`` on held-out (target, retention) sets and score that one alone on the test sets.

    A point chosen on the test sets themselves is the best of several noisy numbers and reads too well; published
    rewinding results are of that kind.  The model is left with the weights that it came with.
    """
    points = sweep(path, grid, model, *held_out)
    chosen = rule(points)
    (tested,) = sweep(path, [chosen.t], model, *test)
    return Choice(chosen, replace(tested, name="test"), points)
