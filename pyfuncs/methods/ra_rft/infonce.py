"""Multi-positive InfoNCE: Eq. 2 of RA-RFT, from a matrix of scores; and gathering rows over processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def infonce(
    scores: Tensor, positives: Tensor, *, temperature: float = 0.05, over_positives: str = "sum",
    mask_other_positives: bool = False, reduction: str = "sum",
) -> Tensor:  # fmt: skip
    r"""InfoNCE over every positive of every query.

        L_i = -\sum_{c+ in P_i} log( e^{s_{i c+} / tau} / \sum_{c in C_i} e^{s_{ic} / tau} )

    C_i is row i: a positive's denominator has the other positives in it, so that with n of them the least loss is
    n log n, not 0.

    Args:
        scores: (Q, C) floating point, cosines or mean MaxSim.  -inf leaves a document out of its row.
        positives: (Q, C) bool.  A row without any adds 0.
        temperature: tau.
        over_positives: "sum", as the paper prints it, or "mean", which gives every query the same weight.
        mask_other_positives: leave the other positives out of the denominator (not in the paper's equation).
        reduction: "sum" over queries, "mean" over those with a positive, or "none", (Q,).

    In fp32 at least.  Raises ValueError or TypeError naming the argument.  A positive that scores -inf is an infinite
    loss, as it should be.  Source: arXiv 2606.13680, Eq. 2.
    """
    if scores.ndim != 2 or positives.shape != scores.shape:
        raise ValueError(f"scores and positives must be (Q, C); got {tuple(scores.shape)}, {tuple(positives.shape)}")
    if positives.dtype != torch.bool:
        raise TypeError(f"positives must be bool; got {positives.dtype}")
    check_options(temperature, over_positives, reduction)
    s = scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature
    if mask_other_positives:
        others = s.masked_fill(positives, -torch.inf).logsumexp(-1, keepdim=True)
        log_z = torch.logaddexp(torch.where(positives, s, 0), others)  # of each positive's own denominator
    else:
        log_z = s.logsumexp(-1, keepdim=True)
    # not a product with the mask: a document that is left out has -inf here
    loss = torch.where(positives, log_z - s, 0).sum(-1)
    count = positives.sum(-1)
    if over_positives == "mean":
        loss = loss / count.clamp(min=1)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (count > 0).sum().clamp(min=1)


def check_options(temperature: float, over_positives: str, reduction: str) -> None:
    """ValueError naming an option that cannot be."""
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0; got {temperature}")
    if over_positives not in ("sum", "mean"):
        raise ValueError(f"over_positives must be 'sum' or 'mean'; got {over_positives!r}")
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction must be 'sum', 'mean' or 'none'; got {reduction!r}")


def gather(x: Tensor) -> Tensor:
    """Rows of every process, in the order of ranks, with gradients to the process they came from.

    Processes may have different numbers of rows, and of tokens along dimension 1: both are padded for the way (tokens
    with 0 for good).  Without a process group x itself.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    from torch.distributed.nn.functional import all_gather

    sizes = [torch.zeros(x.ndim, dtype=torch.int64, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(x.shape, device=x.device))
    most = torch.stack(sizes).amax(0).tolist()
    padding = [n for have, want in zip(reversed(x.shape), reversed(most), strict=True) for n in (0, want - have)]
    padded = torch.nn.functional.pad(x, padding).contiguous()
    if x.requires_grad:
        parts = all_gather(padded)
    else:
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
    return torch.cat([part[: int(size[0])] for part, size in zip(parts, sizes, strict=True)])
