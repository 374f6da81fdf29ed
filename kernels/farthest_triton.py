r"""Triton farthest-point sampling: one program a scene.  The contract is in ``farthest``.

    nearest [BLOCK]   distance of each frame to the nearest chosen one, -inf where chosen; stays in registers

A step reads one row of the distances and finds the largest, twice: its value, then the lowest place that has it.
"""

# mypy: ignore-errors
# Triton's language is not Python to a type checker

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import farthest_torch
from .farthest import check
from .launch import current

MOST = 4096  # frames that a program's registers hold
WARPS = 8
_NEG_INF = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["start"])
def farthest_kernel(DISTANCES, CHOSEN, batch_stride, row_stride, frames, count, start, BLOCK: tl.constexpr):
    """Choose ``count`` frames of one scene, from ``start``."""
    DISTANCES += tl.program_id(0).to(tl.int64) * batch_stride
    CHOSEN += tl.program_id(0).to(tl.int64) * count
    at = tl.arange(0, BLOCK)
    inside = at < frames
    last = start
    nearest = tl.load(DISTANCES + last.to(tl.int64) * row_stride + at, mask=inside, other=_NEG_INF)
    for i in tl.range(0, count):
        tl.store(CHOSEN + i, last.to(tl.int64))
        row = tl.load(DISTANCES + last.to(tl.int64) * row_stride + at, mask=inside, other=_NEG_INF)
        nearest = tl.where(at == last, _NEG_INF, tl.minimum(nearest, row))
        best = tl.max(nearest, 0)
        # NaN equals nothing: then the last frame, not one beyond it
        last = tl.minimum(tl.min(tl.where(nearest == best, at, BLOCK), 0), frames - 1)


def farthest(distances: torch.Tensor, count: int, start: int) -> torch.Tensor:
    """Indices (B, count) in the order of choice."""
    check(distances, count, start)
    b, n = distances.shape[:2]
    if n > MOST:
        return farthest_torch.farthest(distances, count, start)
    chosen = torch.empty(b, count, dtype=torch.int64, device=distances.device)
    distances = distances if distances.stride(2) == 1 else distances.contiguous()
    if b:
        with current(distances.device):
            farthest_kernel[(b,)](
                distances, chosen, distances.stride(0), distances.stride(1), n, count, start,
                BLOCK=max(32, triton.next_power_of_2(n)), num_warps=WARPS,
            )  # fmt: skip
    return chosen
