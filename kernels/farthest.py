r"""The contract of farthest-point sampling, the greedy form of K-center.

    distances  (B, N, N)   fp32 or fp64, any row stride; need not be a metric, only order counts
    chosen     (B, K)      int64, in the order of choice

    chosen_0 = start;    chosen_i = argmax over n not yet chosen of  min_{j < i} distances[chosen_j, n]

ties going to the lowest n.  One choice depends on the last: K steps of N reads, none of which the host waits for.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check(distances: Tensor, count: int, start: int) -> None:
    """What must hold for a launch to stay within its operands.  ValueError or TypeError naming the operand."""
    if distances.ndim != 3 or distances.shape[1] != distances.shape[2]:
        raise ValueError(f"distances must be (B, N, N); got {tuple(distances.shape)}")
    if distances.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"distances must be float32 or float64; got {distances.dtype}")
    n = distances.shape[1]
    if not 1 <= count <= n:
        raise ValueError(f"count must be in [1, {n}]; got {count}")
    if not 0 <= start < n:
        raise ValueError(f"start must be in [0, {n}); got {start}")
