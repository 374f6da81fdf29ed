"""What MaxSim means: every product of a query's and a document's tokens, a maximum, a sum."""

from __future__ import annotations

import torch
from torch import Tensor


def maxsim(
    queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor, *, reduction: str = "sum"
) -> Tensor:
    """Scores (Q, D), differentiable by autograd; forms (Q, D, Lq, Ld)."""
    # masked tokens may hold anything, and a last column of -inf stands for a document without a token
    queries = queries.where(query_mask[..., None], 0)
    documents = documents.where(document_mask[..., None], 0)
    s = torch.einsum("aid,bjd->abij", queries, documents).masked_fill(~document_mask[None, :, None], -torch.inf)
    s = torch.cat([s, s.new_full((*s.shape[:3], 1), -torch.inf)], -1)
    total = torch.where(query_mask[:, None], s.max(-1).values, 0).sum(-1)
    return total if reduction == "sum" else total / query_mask.sum(-1).clamp(min=1)[:, None]
