"""What gathered-key attention means: a dense softmax in which a key counts as often as the query's list has it."""

from __future__ import annotations

import torch
from torch import Tensor


def multiplicity(lists: Tensor, counts: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """How often each query's list has each key, (B, Hq, L, Lk); lists (B', F, H', M), counts (B', F, H')."""
    b, heads, length, _ = q.shape
    keys = k.shape[2]
    inside = (torch.arange(lists.shape[3], device=q.device) < counts[..., None]) & (lists >= 0)
    # one column past the last for entries that do not count
    times = torch.zeros(*lists.shape[:3], keys + 1, dtype=q.dtype, device=q.device)
    times.scatter_add_(3, torch.where(inside, lists, keys).long(), torch.ones_like(lists, dtype=q.dtype))
    times = times[..., :keys].transpose(1, 2)  # (B', H', F, Lk)
    times = times.repeat_interleave(heads // times.shape[1], 1).repeat_interleave(length // times.shape[2], 2)
    return times.expand(b, -1, -1, -1)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, counts: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and entropy, differentiable by autograd; operands in the normal form of ``kernels.attention``."""
    times = multiplicity(lists, counts, q, k)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = scale * q @ k.transpose(-1, -2)
    if bias is not None:
        s = s + bias.repeat_interleave(group, 1)[:, :, None]
    s = s + times.log()
    some = (s > -torch.inf).any(-1)
    # a row without a key has no softmax: its place is taken by a constant
    s = torch.where(some[..., None], s, 0)
    lse = torch.where(some, s.logsumexp(-1), -torch.inf)
    p = torch.where(some[..., None], s.softmax(-1), 0)
    # copies of a key share its weight: each of m has p / m
    log_p = torch.where(p > 0, torch.where(p > 0, p, 1).log() - torch.where(times > 0, times, 1).log(), 0)
    return p @ v, lse, -(p * log_p).sum(-1)
