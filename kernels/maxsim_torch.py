r"""The torch twin of MaxSim, and its form on the CPU; the contract is in ``maxsim``.

One product gives the scores of a block of queries against a block of documents, folded at once to maxima and places.
Backward gathers and adds rows: no product.  A block's scores, and a block's gathered rows, take ``BLOCK_BYTES``, and
the order of the blocks is a function of the shapes alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import accumulator
from .maxsim import check, check_backward

#: Bytes of scores, or of gathered rows, that are held at once.
BLOCK_BYTES = 4 << 20


def _blocks(queries: Tensor, documents: Tensor, each: int):
    """Slices of queries and documents, a pair of which takes ``each`` bytes; documents inside queries."""
    pairs = max(1, BLOCK_BYTES // max(each, 1))
    # a product reads its operands best when the block is wide both ways
    most = max(1, min(documents.shape[0], int(pairs**0.5)))
    wide = max(1, min(queries.shape[0], pairs // most))
    most = max(1, min(documents.shape[0], pairs // wide))
    for a in range(0, queries.shape[0], wide):
        for b in range(0, documents.shape[0], most):
            yield slice(a, min(a + wide, queries.shape[0])), slice(b, min(b + most, documents.shape[0]))


def forward(queries, documents, query_mask, document_mask, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """scores (Q, D) in the accumulator's dtype, and arg (Q, D, Lq) int32 where it is to be kept; see the contract."""
    check(queries, documents, query_mask, document_mask)
    acc = accumulator(queries.dtype)
    (q, lq, d), (n, ld) = queries.shape, documents.shape[:2]
    scores = torch.empty(q, n, dtype=acc, device=queries.device)
    arg = torch.empty(q, n, lq, dtype=torch.int32, device=queries.device) if keep else None
    if lq == 0 or ld == 0:
        nothing = torch.full((q, lq), -torch.inf, dtype=acc, device=queries.device).masked_fill(~query_mask, 0)
        scores.copy_(nothing.sum(1, keepdim=True).expand(q, n))
        return scores, None if arg is None else arg.fill_(-1)
    for a, b in _blocks(queries, documents, lq * ld * acc.itemsize):
        rows, columns = queries[a].to(acc).reshape(-1, d), documents[b].to(acc).reshape(-1, d)
        s = (rows @ columns.t()).view(len(rows), -1, ld)
        hidden = ~document_mask[b]
        if hidden.device.type != "cpu" or hidden.any():
            s.masked_fill_(hidden, -torch.inf)
        if arg is None:
            best = s.amax(-1)
        else:
            best, place = s.max(-1)  # the first of equals; a NaN is the largest
            place = torch.where(query_mask[a].reshape(-1, 1) & (best != -torch.inf), place, -1)
            arg[a, b] = place.view(-1, lq, best.shape[1]).transpose(1, 2).to(torch.int32)
        best = best.masked_fill(~query_mask[a].reshape(-1, 1), 0)
        scores[a, b] = best.view(-1, lq, best.shape[1]).sum(1)
    return scores, arg


def backward(queries, documents, arg, g, *, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of queries and documents in their dtype, None where not wanted; see the contract."""
    check_backward(queries, documents, arg, g)
    acc = accumulator(queries.dtype)
    (_, lq, d), (n, ld) = queries.shape, documents.shape[:2]
    dq = torch.zeros(queries.shape, dtype=acc, device=queries.device) if wanted[0] else None
    # a row past the last takes what has no place
    dd = torch.zeros(n * ld + 1, d, dtype=acc, device=queries.device) if wanted[1] else None
    for a, b in _blocks(queries, documents, lq * d * acc.itemsize) if lq and ld else ():
        place, weight = arg[a, b].long(), g[a, b, None, None].to(acc)
        there = place >= 0
        row = place + torch.arange(b.start, b.stop, device=place.device)[:, None] * ld
        if dq is not None:
            got = documents.reshape(n * ld, d)[torch.where(there, row, 0)].to(acc)
            dq[a] += got.mul_(weight).masked_fill_(~there[..., None], 0).sum(1)
        if dd is not None:
            part = queries[a, None].to(acc) * weight  # (a, b, Lq, d)
            _add(dd, torch.where(there, row, n * ld).reshape(-1), part.reshape(-1, d))
    return (
        None if dq is None else dq.to(queries.dtype),
        None if dd is None else dd[:-1].view(n, ld, d).to(documents.dtype),
    )


def _add(out: Tensor, row: Tensor, part: Tensor) -> None:
    """out[row] += part in order: on a GPU index_add_ would be a race, and this sorts."""
    if out.device.type == "cpu":
        out.index_add_(0, row, part)
    else:
        out.index_put_((row,), part, accumulate=True)
