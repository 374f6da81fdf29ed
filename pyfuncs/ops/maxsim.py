"""``maxsim``: the score of late interaction, forward and backward, without the tensor of all products."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels import maxsim as contract
from ..kernels.launch import accumulator
from .core import without_autocast
from .inputs import check_float


def maxsim(
    queries: Tensor, documents: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None, *,
    reduction: str = "sum", backend: str = "auto",
) -> Tensor:  # fmt: skip
    r"""Score of every query against every document: for each token of the query the best token of the document.

        scores[a, b] = \sum_i max_j <queries[a, i], documents[b, j]>

    over the tokens that count; with reduction "mean", divided by the number of the query's tokens that count.  Neither
    pass forms anything of (Q, D, Lq, Ld).  Where a gradient is wanted forward keeps the places of the maxima, int32
    (Q, D, Lq); backward adds rows in a fixed order: two runs have the same bits.

    Args:
        queries: (Q, Lq, d), fp32, bf16, fp16 or fp64.  Not normalised here.
        documents: (D, Ld, d) of queries' dtype.
        query_mask, document_mask: (Q, Lq) and (D, Ld), bool or whole numbers as a tokenizer's attention_mask: tokens
            that count where not 0.  None: all.  What masked tokens hold is never used, be it NaN.
        reduction: "sum" or "mean" over the query's tokens.
        backend: "triton", "torch" or "auto".

    Returns (Q, D) in fp32, fp64 for fp64.  Ties go to the first token, and so does their gradient.  A document without
    a token scores -inf, so that it is retrieved last and a softmax over documents leaves it out; its gradient is 0, and
    so is that of the queries through it.  A query without a token scores 0.

    Raises: TypeError or ValueError naming the argument.

    Source: arXiv 2004.12832 (ColBERT), section 3.3.  RA-RFT's retriever is trained on it (arXiv 2606.13680, Eq. 2).
    """
    for name, x in (("queries", queries), ("documents", documents)):
        check_float(name, x)
        if x.ndim != 3:
            raise ValueError(f"{name} must be (count, tokens, d); got {tuple(x.shape)}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean'; got {reduction!r}")
    query_mask, document_mask = (
        _mask(name, mask, x)
        for name, mask, x in (("query_mask", query_mask, queries), ("document_mask", document_mask, documents))
    )
    queries, documents = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (queries, documents))
    contract.check(queries, documents, query_mask, document_mask)
    keep = torch.is_grad_enabled() and (queries.requires_grad or documents.requires_grad)
    scores, _ = _maxsim(queries, documents, query_mask, document_mask, keep, backend)
    return scores if reduction == "sum" else scores / query_mask.sum(1, keepdim=True).clamp(min=1)


def _mask(name: str, mask: Tensor | None, x: Tensor) -> Tensor:
    if mask is None:
        return x.new_ones(x.shape[:2], dtype=torch.bool)
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor or None; got {type(mask).__name__}")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{name} must be bool or whole numbers; got {mask.dtype}")
    return mask != 0


@torch.library.custom_op("burnish::maxsim", mutates_args=())
@without_autocast
def _maxsim(
    queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor, keep: bool, backend: str
) -> tuple[Tensor, Tensor]:
    kernels = dispatch.without_host("maxsim", backend, queries.device)
    scores, arg = kernels.forward(queries, documents, query_mask, document_mask, keep=keep)
    return scores, scores.new_empty(0, dtype=torch.int32) if arg is None else arg


@_maxsim.register_fake
def _(queries, documents, query_mask, document_mask, keep, backend):
    pairs = (queries.shape[0], documents.shape[0])
    shape = (*pairs, queries.shape[1]) if keep else (0,)
    return queries.new_empty(pairs, dtype=accumulator(queries.dtype)), queries.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("burnish::maxsim_backward", mutates_args=())
@without_autocast
def _maxsim_backward(
    queries: Tensor, documents: Tensor, arg: Tensor, g: Tensor, of_queries: bool, of_documents: bool, backend: str
) -> tuple[Tensor, Tensor]:
    kernels = dispatch.without_host("maxsim", backend, queries.device)
    dq, dd = kernels.backward(queries, documents, arg, g, wanted=(of_queries, of_documents))
    return tuple(x.new_empty(0) if y is None else y for x, y in ((queries, dq), (documents, dd)))  # type: ignore[return-value]


@_maxsim_backward.register_fake
def _(queries, documents, arg, g, of_queries, of_documents, backend):
    wanted = ((queries, of_queries), (documents, of_documents))
    return tuple(x.new_empty(x.shape) if asked else x.new_empty(0) for x, asked in wanted)


def _keep(ctx, inputs, output):
    queries, documents, query_mask, document_mask, ctx.kept, ctx.backend = inputs
    # an upstream gradient of a pair without a token on either side, be it NaN, goes nowhere
    some = query_mask.any(1)[:, None] & document_mask.any(1)
    ctx.save_for_backward(queries, documents, output[1], some)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, g, _):
    queries, documents, arg, some = ctx.saved_tensors
    asked = ctx.needs_input_grad[:2]
    if g is None or not any(asked):
        return (None,) * 6
    dq, dd = _maxsim_backward(queries, documents, arg, torch.where(some, g, 0), *asked, ctx.backend)
    return dq if asked[0] else None, dd if asked[1] else None, None, None, None, None


_maxsim.register_autograd(_gradients, setup_context=_keep)
