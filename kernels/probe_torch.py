"""The torch twin of the attention probe, and its form on the CPU; the contract is in ``probe``."""

from __future__ import annotations

import torch

from .launch import accumulator
from .probe import Partial, check, new_partial


def probe(q, k, scale: float, split: int) -> Partial:
    """Statistics of each split of the keys; see the contract."""
    check(q, k, split)
    dtype = accumulator(q.dtype)
    b, heads, queries, _ = q.shape
    keys = k.shape[2]
    out = new_partial(q, -(-keys // split))
    # (B, Hkv, R Q, D): the query heads of a key head are more queries
    rows = (q.to(dtype) * scale).reshape(b, k.shape[1], -1, q.shape[3])
    for i, start in enumerate(range(0, keys, split)):
        s = (rows @ k[:, :, start : start + split].to(dtype).transpose(-1, -2)).view(b, heads, queries, -1)
        top = s.amax(-1, keepdim=True)
        s -= top
        p = s.exp()
        out.top[..., i], out.total[..., i] = top[..., 0], p.sum(-1)
        out.spread[..., i] = torch.where(p > 0, p.mul_(s), torch.where(p.isnan(), p, 0)).sum(-1)
    return out
