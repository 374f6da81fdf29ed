r"""Triton MaxSim: one program a query and document; gradients without atomics.  The contract is in ``maxsim``.

    forward       q [BM, BK] and doc [BN, BK] a step over d, scores [BM, BN] of a tile, folded to best and place [BM]
    d_queries     out [BM, BK] of a query's tokens: a gathered row of each document, in order
    d_documents   out [BN, BK] of a document's tokens: the products of a 0-1 matrix [BN, BM], which says which token of
                  a query chose which row, with the query's tokens [BM, BK], query after query

Loops end with the last token that counts: padding on the right costs nothing.  The 0-1 matrix is exact in any dtype and
its product is scaled by g afterwards, so that rounding is that of the sum alone.
"""

# mypy: ignore-errors
# Triton's language is not Python to a type checker

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import accumulator, current, precision, strides
from .maxsim import check, check_backward

WARPS = 4
MAKER = "amd" if torch.version.hip else "nvidia" if torch.version.cuda else "other"
_NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def forward_kernel(
    QUERIES, DOCUMENTS, QUERY_MASK, DOCUMENT_MASK, QUERY_ENDS, DOCUMENT_ENDS, SCORES, ARG,
    q_a, q_i, d_b, d_j, documents, query_tokens, document_tokens, width,
    KEEP: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The score of one pair, and which row each token of the query chose."""
    pair = tl.program_id(0).to(tl.int64)
    a, b = pair // documents, pair % documents
    QUERIES += a * q_a
    DOCUMENTS += b * d_b
    last_j = tl.load(DOCUMENT_ENDS + b)
    score = tl.zeros([BM], ACC)
    for first in tl.range(0, tl.load(QUERY_ENDS + a), BM):
        i = first + tl.arange(0, BM)
        # a token's scores are its own: rows that do not count need no mask, only an address within the operand
        q_row = tl.minimum(i, query_tokens - 1)
        asks = (tl.load(QUERY_MASK + a * query_tokens + q_row) != 0) & (i < query_tokens)
        best = tl.full([BM], _NEG_INF, ACC)
        place = tl.full([BM], -1, tl.int32)
        bad = tl.zeros([BM], tl.int32)
        for start in tl.range(0, last_j, BN):
            j = start + tl.arange(0, BN)
            counts = tl.load(DOCUMENT_MASK + b * document_tokens + tl.minimum(j, last_j - 1)) != 0
            # the last token that counts stands in for those that do not: no maximum changes, and nothing is masked
            d_row = tl.where(counts & (j < last_j), j, last_j - 1)
            s = tl.zeros([BM, BN], ACC)
            for k in tl.range(0, width, BK):
                col = k + tl.arange(0, BK)
                q_at = QUERIES + q_row[:, None] * q_i + col[None, :]
                d_at = DOCUMENTS + d_row[:, None] * d_j + col[None, :]
                if EVEN:
                    q = tl.load(q_at)
                    d = tl.load(d_at)
                else:
                    q = tl.load(q_at, mask=(col < width)[None, :], other=0.0)
                    d = tl.load(d_at, mask=(col < width)[None, :], other=0.0)
                s = tl.dot(q, tl.trans(d), acc=s, input_precision=PRECISION, out_dtype=ACC)
            bad = tl.maximum(bad, tl.max((s != s).to(tl.int32), 1))  # comparisons pass over a NaN
            top = tl.max(s, 1)
            here = tl.min(tl.where(s == top[:, None], d_row[None, :], document_tokens), 1)
            place = tl.where(top > best, here, place)
            best = tl.maximum(best, top)
        best = tl.where(bad != 0, float("nan"), best)
        score += tl.where(asks, best, 0.0)
        if KEEP:
            tl.store(ARG + pair * query_tokens + i, tl.where(asks, place, -1), mask=i < query_tokens)
    tl.store(SCORES + pair, tl.sum(score, 0))


@triton.jit
def d_queries_kernel(
    DOCUMENTS, ARG, G, OUT, d_b, d_j, documents, query_tokens, width,
    BM: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BM tokens and BK columns of the gradient of a query."""
    a = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    col = tl.program_id(2) * BK + tl.arange(0, BK)
    there = i < query_tokens
    wide = col < width
    out = tl.zeros([BM, BK], ACC)
    ARG += a * documents * query_tokens
    G += a * documents
    for _ in tl.range(0, documents):  # pointers move along: their offsets outgrow int32
        place = tl.load(ARG + i, mask=there, other=-1)
        rows = DOCUMENTS + place.to(tl.int64)[:, None] * d_j + col[None, :]
        row = tl.load(rows, mask=(place >= 0)[:, None] & wide[None, :], other=0.0).to(ACC)
        out += tl.where((place >= 0)[:, None], tl.load(G) * row, 0.0)
        DOCUMENTS += d_b
        ARG += query_tokens
        G += 1
    at = (a * query_tokens + i)[:, None] * width + col[None, :]
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=there[:, None] & wide[None, :])


@triton.jit
def d_documents_kernel(
    QUERIES, ARG, G, QUERY_ENDS, OUT, q_a, q_i, queries, documents, query_tokens, document_tokens, width, arg_step,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BN tokens and BK columns of the gradient of a document."""
    b = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    col = tl.program_id(2) * BK + tl.arange(0, BK)
    wide = col < width
    out = tl.zeros([BN, BK], ACC)
    ARG += b * query_tokens
    G += b
    for _ in tl.range(0, queries):
        part = tl.zeros([BN, BK], ACC)
        for first in tl.range(0, tl.load(QUERY_ENDS), BM):
            i = first + tl.arange(0, BM)
            place = tl.load(ARG + i, mask=i < query_tokens, other=-1)
            rows = QUERIES + i[:, None] * q_i + col[None, :]
            q = tl.load(rows, mask=(place >= 0)[:, None] & wide[None, :], other=0.0)
            chosen = (place[None, :] == j[:, None]).to(q.dtype)  # [BN, BM]
            part = tl.dot(chosen, q, acc=part, input_precision=PRECISION, out_dtype=ACC)
        out += tl.load(G) * part
        QUERIES += q_a
        QUERY_ENDS += 1
        ARG += arg_step
        G += documents
    at = (b * document_tokens + j)[:, None] * width + col[None, :]
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=(j < document_tokens)[:, None] & wide[None, :])


def blocks(dtype: torch.dtype, d: int, query_tokens: int, *, maker: str = MAKER) -> dict[str, int]:
    """BM, BN and BK, by dtype, shapes and maker alone: what compiles without a spill."""
    low = dtype.itemsize <= 2
    bm = min(64 if low else 32, max(16, triton.next_power_of_2(max(query_tokens, 1))))
    bn = 64 if low and maker != "amd" else 32
    return {"BM": bm, "BN": bn, "BK": min(64 if low else 32, max(16, triton.next_power_of_2(d)))}


def options(maker: str = MAKER) -> dict[str, int]:
    """Of a launch; without the bound ptxas spills a little to make room for blocks that do not come."""
    return {"num_warps": WARPS} | ({"maxnreg": 255} if maker == "nvidia" else {})


def flags(dtype: torch.dtype) -> dict:
    """Compile-time arguments that every kernel takes some of."""
    acc = tl.float64 if accumulator(dtype) == torch.float64 else tl.float32
    return {"PRECISION": precision(dtype), "ACC": acc}


def _ends(mask: torch.Tensor) -> torch.Tensor:
    """One past the last token that counts, int32; never known to the host."""
    places = torch.arange(1, mask.shape[1] + 1, dtype=torch.int32, device=mask.device)
    return torch.where(mask, places, 0).amax(1) if mask.shape[1] else mask.new_zeros(len(mask), dtype=torch.int32)


def forward(queries, documents, query_mask, document_mask, *, keep: bool):
    """scores (Q, D) in the accumulator's dtype, and arg (Q, D, Lq) int32 where it is to be kept; see the contract."""
    check(queries, documents, query_mask, document_mask)
    (q, lq, d), (n, ld) = queries.shape, documents.shape[:2]
    scores = torch.empty(q, n, dtype=accumulator(queries.dtype), device=queries.device)
    # what lies past a query's last token no program writes
    arg = torch.full((q, n, lq), -1, dtype=torch.int32, device=queries.device) if keep else None
    if q and n:
        cut = blocks(queries.dtype, d, lq)
        with current(queries.device):
            forward_kernel[(q * n,)](
                queries, documents, query_mask.contiguous().view(torch.uint8),
                document_mask.contiguous().view(torch.uint8), _ends(query_mask), _ends(document_mask), scores,
                scores if arg is None else arg, **strides(queries, "ai", "q"), **strides(documents, "bj", "d"),
                documents=n, query_tokens=lq, document_tokens=ld, width=d, KEEP=keep, EVEN=d % cut["BK"] == 0, **cut,
                **flags(queries.dtype), **options(),
            )  # fmt: skip
    return scores, arg


def backward(queries, documents, arg, g, *, wanted: tuple[bool, bool]):
    """Gradients of queries and documents in their dtype, None where not wanted; see the contract."""
    check_backward(queries, documents, arg, g)
    (q, lq, d), (n, ld) = queries.shape, documents.shape[:2]
    cut, common = blocks(queries.dtype, d, lq), flags(queries.dtype)
    g = g.to(accumulator(queries.dtype)).contiguous()
    columns = triton.cdiv(d, cut["BK"])
    dq = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device) if wanted[0] else None
    dd = torch.empty(documents.shape, dtype=documents.dtype, device=documents.device) if wanted[1] else None
    with current(queries.device):
        if dq is not None and dq.numel():
            d_queries_kernel[(q, triton.cdiv(lq, cut["BM"]), columns)](
                documents, arg, g, dq, **strides(documents, "bj", "d"), documents=n, query_tokens=lq,
                width=d, BM=cut["BM"], BK=cut["BK"], ACC=common["ACC"], **options(),
            )  # fmt: skip
        if dd is not None and dd.numel():
            d_documents_kernel[(n, triton.cdiv(ld, cut["BN"]), columns)](
                queries, arg, g, _ends((arg >= 0).any(1)), dd, **strides(queries, "ai", "q"), queries=q,
                documents=n, query_tokens=lq, document_tokens=ld, arg_step=n * lq, width=d, **cut, **common,
                **options(),
            )  # fmt: skip
    return dq, dd
