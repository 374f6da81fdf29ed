"""``farthest_frames``: the frames that cover a scene best, by greedy K-center; and how well they do."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import dispatch
from .inputs import check_float


def cosine_distances(descriptors: Tensor) -> Tensor:
    """1 - cosine of descriptors (..., N, D), as (..., N, N); in fp64 and at least 0, so that equals stay equal."""
    x = descriptors.to(torch.float64)
    x = x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    distances = (1 - x @ x.transpose(-1, -2)).clamp_(min=0)
    distances.diagonal(dim1=-2, dim2=-1).zero_()
    return distances


@torch.no_grad()
def farthest_frames(
    descriptors: Tensor | None, count: int, *, start: int = 0, distances: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    r"""Frames chosen by farthest-point sampling over cosine distance, in ascending order.

        first ``start``; then, count - 1 times, the frame whose distance to the nearest chosen one is largest

    Ties go to the lowest index, so equal frames are taken only when nothing else is left.  The choice of fewer frames
    is contained in that of more.  Nothing waits for the device.  Greedy K-center is within twice the best possible
    covering radius where the distance is a metric; cosine distance is none, but orders as the chord does, which is.

    Args:
        descriptors: (N, D) or (B, N, D), one a frame, any length but 0; or None with ``distances``.
        count: frames to choose; all of them if there are no more.
        start: the first one.  The paper draws it at random; its code takes 0, which the model may treat as reference.
        distances: (N, N) or (B, N, N) instead, of any kind: only their order counts.

    Returns: int64 (count,) or (B, count).
    Raises: TypeError or ValueError naming the argument.
    Source: arXiv 2605.23892, equations 1 and 2 and algorithm A.
    """
    distances = _distances(descriptors, distances)
    n = distances.shape[-1]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count must be a positive int; got {count!r}")
    if not 0 <= start < n:
        raise ValueError(f"start must be a frame, in [0, {n}); got {start}")
    kernels = dispatch.without_host("farthest", backend, distances.device)
    batched = distances if distances.ndim == 3 else distances[None]
    chosen = kernels.farthest(batched, min(count, n), start).sort(-1).values
    return chosen if distances.ndim == 3 else chosen[0]


@torch.no_grad()
def coverage_radius(descriptors: Tensor | None, frames: Tensor, *, distances: Tensor | None = None) -> Tensor:
    r"""max_i min_{j in frames} d(i, j): how far the worst frame is from its nearest chosen one, () or (B,).

    descriptors (N, D) or (B, N, D), by cosine distance, or ``distances`` (N, N) or (B, N, N); frames (K,) or (B, K).
    Source: arXiv 2605.23892, equation 2.
    """
    distances = _distances(descriptors, distances)
    if frames.ndim != distances.ndim - 1 or frames.shape[-1] == 0:
        raise ValueError(f"frames must hold at least one frame a scene; got {tuple(frames.shape)}")
    rows = frames.long()[..., None].expand(*frames.shape, distances.shape[-1])
    return distances.gather(-2, rows).amin(-2).amax(-1)


def _distances(descriptors: Tensor | None, distances: Tensor | None) -> Tensor:
    if (descriptors is None) == (distances is None):
        raise ValueError("exactly one of descriptors and distances must be given")
    if descriptors is not None:
        check_float("descriptors", descriptors)
        if descriptors.ndim not in (2, 3) or 0 in descriptors.shape:
            raise ValueError(f"descriptors must be (N, D) or (B, N, D), not empty; got {tuple(descriptors.shape)}")
        return cosine_distances(descriptors)
    assert distances is not None
    check_float("distances", distances)
    if distances.ndim not in (2, 3) or distances.shape[-1] != distances.shape[-2] or distances.shape[-1] == 0:
        raise ValueError(f"distances must be (N, N) or (B, N, N); got {tuple(distances.shape)}")
    return distances if distances.dtype in (torch.float32, torch.float64) else distances.float()
