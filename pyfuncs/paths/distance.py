"""How far a point of a path has gone: points of two paths at equal t are not at equal distance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .blend import blocks
from .layers import Stack, find_stack
from .path import Point, WeightPath


@dataclass(frozen=True)
class Distance:
    """||theta(t) - theta(0)||_F / ||theta(1) - theta(0)||_F.

    total: over all that moves.
    layers: of each decoder layer, and at None of the tensors of no layer; those where nothing moves are left out.
    length: ||theta(1) - theta(0)||_F, in the weights' own units.
    """

    total: float
    layers: Mapping[int | None, float]
    length: float


def distance(path: WeightPath, t: Point) -> Distance:
    """The share of the way from theta(0) to theta(1) that theta(t) is from theta(0), in Frobenius norm.

    On ``Additive`` and ``LoRAScale`` it is t.  On ``OFTGenerator`` with power 1/2 it is sqrt(t) for small rotations and
    more for large ones: at t = 0.3 from 0.55 to 0.72 (arXiv 2605.28819 compares its paths at equal t).

    Two tensors are held at a time; sums are fp64.  Buffers of whole numbers do not count.  ValueError where nothing
    moves, or as ``path.tensor`` for t.
    """
    stack = find_stack(path.template, path._count) or Stack("?")
    sums: dict[int | None, list[float]] = {}
    for name in path.selector:
        if not path.template.dtype(name).is_floating_point:
            continue
        here, whole = sums.setdefault(stack.layer(name), [0.0, 0.0]), 0.0
        if not path.kept(name, 0.0) or not path.kept(name, 1.0):
            whole = _moved(path, name, 1.0)
            here[1] += whole
        if whole:
            here[0] += _moved(path, name, t)
        else:
            path._at(name, t)  # a wrong t is an error even where nothing moves
    length = sum(whole for _, whole in sums.values())
    if not length > 0:
        raise ValueError("nothing moves on this path: theta(1) is theta(0)")
    layers = {layer: math.sqrt(part / whole) for layer, (part, whole) in sums.items() if whole > 0}
    return Distance(math.sqrt(sum(part for part, _ in sums.values()) / length), layers, math.sqrt(length))


def _moved(path: WeightPath, name: str, t: Point) -> float:
    """||theta(t) - theta(0)||^2 of one tensor."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in blocks(path.tensor(name, t), path.tensor(name, 0.0)):
        total += x.double().sub_(y.double()).square_().sum()
    return float(total)
