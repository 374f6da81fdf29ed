"""Problems for MaxSim, and what the reference makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from burnish.kernels.launch import accumulator
from burnish.reference.maxsim import maxsim as reference

#: Q, Lq, D, Ld, d
SHAPES = [(1, 1, 1, 1, 1), (2, 5, 3, 7, 8), (3, 17, 2, 37, 20), (2, 35, 3, 41, 70), (5, 3, 1, 100, 4)]
EDGES = [(0, 3, 2, 4, 5), (2, 3, 0, 4, 5), (2, 0, 3, 4, 5), (2, 3, 3, 0, 5)]


@dataclass
class Problem:
    queries: Tensor
    documents: Tensor
    query_mask: Tensor
    document_mask: Tensor
    upstream: Tensor

    @property
    def operands(self) -> tuple:
        return self.queries, self.documents, self.query_mask, self.document_mask

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(
            self, queries=self.queries.to(dtype), documents=self.documents.to(dtype),
            upstream=self.upstream.to(accumulator(dtype)),
        )  # fmt: skip


def problem(shape, *, masks: bool = True, poisoned: bool = True, seed: int = 0, device="cpu") -> Problem:
    """In fp64.  Masks with holes and padding; of several queries and documents the last has no token at all; masked
    tokens hold NaN."""
    q, lq, n, ld, d = shape
    g = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    def mask(count, length):
        m = torch.ones(count, length, dtype=torch.bool)
        if masks:
            m = torch.rand(count, length, generator=g) < 0.8
            m[:, length - length // 4 :] = False
            m[:, :1] = True
            if count > 1:
                m[-1] = False
        return m

    queries, documents, qm, dm = rand(q, lq, d), rand(n, ld, d), mask(q, lq), mask(n, ld)
    if poisoned:
        queries[~qm], documents[~dm] = torch.nan, torch.nan
    upstream = rand(q, n)
    return Problem(*(x.to(device) for x in (queries, documents, qm, dm, upstream)))


def expected(p: Problem) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Scores and gradients of the reference, in the problem's dtype."""
    leaves = [x.detach().clone().requires_grad_() for x in (p.queries, p.documents)]
    scores = reference(*leaves, p.query_mask, p.document_mask)
    some = p.query_mask.any(1)[:, None] & p.document_mask.any(1)
    loss = (torch.where(some, scores, 0) * p.upstream).sum()
    grads = torch.autograd.grad(loss, leaves) if loss.requires_grad else [torch.zeros_like(x) for x in leaves]
    return scores.detach(), tuple(grads)


def run(kernels, p: Problem) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    scores, arg = kernels.forward(*p.operands, keep=True)
    return scores, kernels.backward(p.queries, p.documents, arg, p.upstream, wanted=(True, True))
