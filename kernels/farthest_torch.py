"""The torch twin of farthest-point sampling, and its form on the CPU; the contract is in ``farthest``."""

from __future__ import annotations

import torch
from torch import Tensor

from .farthest import check


def farthest(distances: Tensor, count: int, start: int) -> Tensor:
    """Indices (B, count) in the order of choice."""
    check(distances, count, start)
    batch = torch.arange(distances.shape[0], device=distances.device)
    chosen = torch.empty(distances.shape[0], count, dtype=torch.int64, device=distances.device)
    last = torch.full_like(batch, start)
    nearest = torch.full_like(distances[:, 0], torch.inf)
    taken = torch.zeros_like(nearest, dtype=torch.bool)
    for i in range(count):
        chosen[:, i] = last
        taken.scatter_(1, last[:, None], True)
        nearest = torch.minimum(nearest, distances[batch, last])
        last = torch.where(taken, -torch.inf, nearest).argmax(1)  # the first of equals
    return chosen
