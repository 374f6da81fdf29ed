r"""The contract of the attention probe: statistics of a few queries over all keys, which are read once.

    q    (B, H, Q, D)       sampled queries, D at most 128
    k    (B, Hkv, Lk, D)    Hkv divides H; Lk = S n: split i has the keys [i n, (i + 1) n), the last one fewer

For each split, with s_j = scale q . k_j over its keys (B, H, Q, S), in fp32 or fp64:

    top = max s        total = sum e^{s - top}        spread = sum e^{s - top} (s - top)

``merge`` joins splits, on the device: with M = max top and w = e^{top - M},

    L = sum w total       T = sum w (spread + (top - M) total)
    lse = M + log L       entropy = log L - T / L       top1 = max p = 1 / L       mass = w total / L  a split
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attention import HEAD_DIM
from .launch import accumulator


class Partial(NamedTuple):
    """top, total and spread of each split, each (B, H, Q, S)."""

    top: Tensor
    total: Tensor
    spread: Tensor


def check(q: Tensor, k: Tensor, split: int) -> None:
    """What must hold for a launch to stay within its operands.  ValueError or TypeError naming the operand."""
    if q.ndim != 4 or k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q and k must be (B, heads, length, D); got {tuple(q.shape)} and {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k must have heads that divide {q.shape[1]}; got {k.shape[1]}")
    if not 1 <= q.shape[3] <= HEAD_DIM:
        raise ValueError(f"the head dimension must be in [1, {HEAD_DIM}]; got {q.shape[3]}")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise TypeError(f"q and k must have one floating dtype; got {q.dtype} and {k.dtype}")
    if q.device != k.device:
        raise ValueError(f"q and k must be on one device; got {q.device} and {k.device}")
    if k.shape[2] == 0 or split < 1:
        raise ValueError(f"k must have keys, in splits of at least 1; got {k.shape[2]} in splits of {split}")
    for name, x in (("q", q), ("k", k)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} must have unit stride along its last dimension; got strides {x.stride()}")


def new_partial(q: Tensor, splits: int) -> Partial:
    shape, dtype = (*q.shape[:3], splits), accumulator(q.dtype)
    return Partial(*(torch.empty(shape, dtype=dtype, device=q.device) for _ in range(3)))


def merge(parts: Partial, dims: int = 1) -> tuple[Partial, Tensor]:
    """Joins each ``dims`` splits: (..., S) -> (..., S / dims); and the mass of each of them."""
    top, total, spread = (x.unflatten(-1, (-1, dims)) for x in parts)
    most = top.amax(-1, keepdim=True)
    w = (top - most).exp()
    joined = w * total
    whole = joined.sum(-1)
    t = (w * (spread + (top - most) * total)).sum(-1)
    return Partial(most[..., 0], whole, t), joined / whole[..., None]
