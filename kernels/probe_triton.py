r"""Triton attention probe: one program a split of the keys, a head and BM queries.  The contract is in ``probe``.

    q [BM, BD] stays; k [BN, BD] a step, each key read once a block of queries; top, total and spread [BM]

Few queries and many keys: what fills the device is the splits, which lie along grid axis 0.
"""

# mypy: ignore-errors
# Triton's language is not Python to a type checker

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .launch import LOG2E, accumulator, current, precision, strides
from .probe import Partial, check, new_partial

BN = 64
WARPS = 4
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def probe_kernel(
    Q, K, TOP, TOTAL, SPREAD, q_b, q_h, q_l, k_b, k_h, k_l, heads, queries, keys, split, splits, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """top, total and spread of BM queries over one split."""
    part = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(2) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BD)
    there = rows < queries
    wide = cols < D
    inner = there[:, None] & wide[None, :]
    q = tl.load(Q + batch * q_b + head * q_h + rows[:, None] * q_l + cols[None, :], mask=inner, other=0.0)
    K += batch * k_b + (head // GROUP) * k_h
    top = tl.full([BM], -1e30, ACC)  # finite: -inf less itself is NaN
    total = tl.zeros([BM], ACC)
    spread = tl.zeros([BM], ACC)
    first = part * split
    last = tl.minimum(first + split, keys)
    for start in tl.range(first, last, BN):
        row = (start + tl.arange(0, BN)).to(tl.int64)
        valid = row < last
        k = tl.load(K + row[:, None] * k_l + cols[None, :], mask=valid[:, None] & wide[None, :], other=0.0)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale
        z = tl.where(valid[None, :], z, -1e30)
        higher = tl.maximum(top, tl.max(z, 1))
        shifted = z - higher[:, None]
        p = tl.where(valid[None, :], tl.exp2(shifted), 0.0)
        fade = tl.exp2(top - higher)
        spread = fade * (spread + (top - higher) * total) + tl.sum(p * shifted, 1)
        total = fade * total + tl.sum(p, 1)
        top = higher
    lines = ((batch * heads + head) * queries + rows) * splits + part
    tl.store(TOP + lines, top * _LN2, mask=there)
    tl.store(TOTAL + lines, total, mask=there)
    tl.store(SPREAD + lines, spread * _LN2, mask=there)


def flags(dtype: torch.dtype, d: int, queries: int) -> dict:
    """Compile-time arguments of ``probe_kernel``."""
    most = 64 if dtype.itemsize <= 2 else 32
    return {
        "D": d, "BD": max(16, triton.next_power_of_2(d)), "BM": min(most, max(16, triton.next_power_of_2(queries))),
        "BN": BN if dtype.itemsize <= 2 else 32, "PRECISION": precision(dtype),
        "ACC": tl.float64 if accumulator(dtype) == torch.float64 else tl.float32,
    }  # fmt: skip


def probe(q, k, scale: float, split: int) -> Partial:
    """Statistics of each split of the keys; see the contract."""
    check(q, k, split)
    b, heads, queries, d = q.shape
    splits = -(-k.shape[2] // split)
    out = new_partial(q, splits)
    if q.numel():
        chosen = flags(q.dtype, d, queries)
        with current(q.device):
            probe_kernel[(splits, b * heads, triton.cdiv(queries, chosen["BM"]))](
                q, k, *out, **strides(q, "bhl", "q"), **strides(k, "bhl", "k"), heads=heads, queries=queries,
                keys=k.shape[2], split=split, splits=splits, scale=scale * LOG2E, GROUP=heads // k.shape[1], **chosen,
                num_warps=WARPS,
            )  # fmt: skip
    return out
