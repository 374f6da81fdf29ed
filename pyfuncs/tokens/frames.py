r"""Which frames are keys: sets of frames from one descriptor a frame (arXiv 2605.23892, section 3.2).

    d(i, j) = 1 - <f_i, f_j> / (|f_i| |f_j|)                      eq. 1
    S       = argmin over |S| = K of max_i min_{j in S} d(i, j)    eq. 2, by greedy farthest point sampling

The paper has one S for all queries, seeded at frame 0 (where VGGT has its reference tokens), and shows that sets of a
query's own lose to it (table 1); those are here to be compared, and for models that differ.

Descriptors: the paper takes MegaLoc's (8448-d, a place-recognition network of its own).  ``pooled`` is ours:
mean-pooled patch tokens of the model's own encoder, on the frames given.  Whether it selects as well is not measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.farthest_frames import cosine_distances, farthest_frames

#: Strategies that have one list for all queries, and those with one for each query frame.
SHARED = ("diversity", "heads")
OWN = ("diverse_self", "nearest")


def pooled(tokens: Tensor) -> Tensor:
    """Descriptors of frames from their patch tokens: (B, N, p, C) -> fp32 (B, N, C), mean over p, then L2-normalised.

    No gradient: a choice of frames has none.
    """
    return F.normalize(tokens.detach().mean(-2, dtype=torch.float32), dim=-1)


def check_descriptors(given: Tensor, batch: int, frames: int, device: torch.device) -> Tensor:
    """fp32 (B, N, D) on ``device`` of descriptors (N, D), for every scene of the batch, or (B, N, D)."""
    if not isinstance(given, Tensor) or not given.is_floating_point():
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"descriptors must be a floating-point tensor; got {got}")
    if given.ndim not in (2, 3) or given.shape[-2] != frames or (given.ndim == 3 and given.shape[0] != batch):
        raise ValueError(
            f"descriptors must be ({frames}, D) or ({batch}, {frames}, D), one a frame given to the model; "
            f"got {tuple(given.shape)}"
        )
    return given.detach().to(device, torch.float32).expand(batch, frames, given.shape[-1])


def shared_set(descriptors: Tensor, count: int, start: int = 0) -> Tensor:
    """S of each scene: descriptors (B, N, D) -> int64 (B, min(K, N)), ascending.

    ``start``: the seed; the paper draws it, its code has frame 0.  Source: algorithm A of the paper.
    """
    return farthest_frames(descriptors, min(count, descriptors.shape[-2]), start=start)


def seeded_sets(descriptors: Tensor, count: int) -> Tensor:
    """For each query frame a set seeded by that frame: (B, N, D) -> int64 (B, N, min(K, N)), ascending.

    "diverse_self" of the published code, which has no published numbers.
    All N runs go on side by side, K steps over an N x N matrix.  Ties go to the lowest index.
    """
    far = cosine_distances(descriptors)
    b, n, _ = far.shape
    seed = torch.arange(n, device=far.device).expand(b, n)
    near = far.clone()  # [B, N, N]: row f, how far each frame is from the set of query frame f
    sets = [seed]
    near.scatter_(-1, seed[..., None], -torch.inf)
    for _ in range(min(count, n) - 1):
        new = near.argmax(-1)  # the first of equals
        sets.append(new)
        near = torch.minimum(near, far.gather(1, new[..., None].expand(b, n, n)))
        near.scatter_(-1, new[..., None], -torch.inf)
    return torch.stack(sets, -1).sort(-1).values


def nearest_sets(descriptors: Tensor, count: int) -> Tensor:
    """For each query frame itself and those most like it: (B, N, D) -> int64 (B, N, min(K, N)), ascending.

    Ties go to the lowest index.  The paper's table 1 has it as the worst choice.
    """
    far = cosine_distances(descriptors)
    far.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)  # itself, whatever rounding and duplicates say
    order = far.argsort(dim=-1, stable=True)
    return order[..., : min(count, far.shape[-1])].sort(-1).values
