r"""The contract of MaxSim, the score of late interaction.

    queries         (Q, Lq, d)    token embeddings, d at least 1, unit stride along d
    documents       (D, Ld, d)    of the same dtype
    query_mask      (Q, Lq)       bool: the tokens that count
    document_mask   (D, Ld)       bool

With s_ij = <q_i, d_j> in the accumulator's dtype, over the tokens j of document b that count:

    best[a, b, i] = max_j s_ij      arg[a, b, i] = the first j that reaches it      scores[a, b] = sum_i best[a, b, i]

over the tokens i of query a that count.  ``arg`` is -1 where i does not count, and where no j does or every s_ij is
-inf: such a maximum has no gradient.  A document without a token scores -inf against a query that has one; a query
without a token scores 0.  A NaN among the products makes the score NaN.  Masked tokens are never read into a sum: they
may hold anything.

Backward, with g (Q, D) in the accumulator's dtype:

    d_queries[a, i] = sum_b g[a, b] documents[b, arg[a, b, i]]
    d_documents[b, j] = sum over (a, i) with arg[a, b, i] = j of g[a, b] queries[a, i]

in the order of b, and of (a, i): the bits of one run are those of the next.  Nothing of (Q, D, Lq, Ld) is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check(queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor) -> None:
    """What must hold for a launch to stay within its operands.  ValueError or TypeError naming the operand."""
    for name, x in (("queries", queries), ("documents", documents)):
        if x.ndim != 3 or x.shape[2] < 1:
            raise ValueError(f"{name} must be (count, tokens, d), d at least 1; got {tuple(x.shape)}")
        if x.stride(2) != 1 and x.shape[2] > 1:
            raise ValueError(f"{name} must have unit stride along its last dimension; got strides {x.stride()}")
    if documents.shape[2] != queries.shape[2]:
        raise ValueError(f"documents must have queries' d = {queries.shape[2]}; got {tuple(documents.shape)}")
    if queries.dtype != documents.dtype or not queries.is_floating_point():
        raise TypeError(f"queries and documents must have one floating dtype; got {queries.dtype}, {documents.dtype}")
    for name, mask, x in (("query_mask", query_mask, queries), ("document_mask", document_mask, documents)):
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be bool; got {mask.dtype}")
        if mask.shape != x.shape[:2]:
            raise ValueError(f"{name} must be {tuple(x.shape[:2])}; got {tuple(mask.shape)}")
    for x in (documents, query_mask, document_mask):
        if x.device != queries.device:
            raise ValueError(f"operands must be on one device; got {queries.device} and {x.device}")


def check_backward(queries: Tensor, documents: Tensor, arg: Tensor, g: Tensor) -> None:
    """The same of the backward pass's own operands."""
    pairs = (queries.shape[0], documents.shape[0])
    if tuple(g.shape) != pairs or tuple(arg.shape) != (*pairs, queries.shape[1]):
        raise ValueError(f"g and arg must be {pairs} and {(*pairs, queries.shape[1])}; got {g.shape} and {arg.shape}")
    if arg.dtype != torch.int32:
        raise TypeError(f"arg must be int32; got {arg.dtype}")
