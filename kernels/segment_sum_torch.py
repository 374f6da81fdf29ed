"""The torch twin of the segmented row sum, and its form on the CPU; the contract is in ``segment_sum``."""

from __future__ import annotations

import torch

from .segment_sum import by_token, check


def segment_sum(grad, tokens, start: int, stop: int, padding_idx: int | None, out) -> None:
    """Write into ``out`` the sum of the rows of ``grad`` at each token of [start, stop)."""
    check(grad, tokens, start, stop, padding_idx, out)
    (_in_order if grad.device.type == "cpu" else _sorted)(grad, tokens, start, stop, padding_idx, out)


def _in_order(grad, tokens, start, stop, padding_idx, out):
    """Only the rows that count are touched; elsewhere choosing them would be a sync, and index_add_ a race."""
    keep = (tokens >= start) & (tokens < stop)
    if padding_idx is not None:
        keep &= tokens != padding_idx
    out.zero_().index_add_(0, tokens[keep] - start, grad[keep].to(out.dtype))


def _sorted(grad, tokens, start, stop, padding_idx, out):
    positions, offsets = by_token(tokens, start, stop)
    rows = grad[positions].to(out.dtype)
    # unsafe: the check of the offsets would be a sync, and would not have them leave rows out
    out.copy_(torch.segment_reduce(rows, "sum", offsets=offsets, axis=0, initial=0, unsafe=True))
    if padding_idx is not None and start <= padding_idx < stop:
        out[padding_idx - start].zero_()
