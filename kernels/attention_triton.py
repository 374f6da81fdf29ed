r"""Triton gathered-key attention: one program a block of queries, or in dK and dV a tile of listed keys.

The maths, the operands and the inverse lists are those of ``attention``.  With BM queries, BN keys and heads of D
elements, padded to BD, the next power of two:

    forward   (ceil(P / BM) F, B Hq)      q [BM, BD] stays; per BN entries of the list: k, v [BN, BD], row by row
    dq        the same                    also writes delta = dout . out - dL/dlse, (B, Hq, L), which dK and dV read
    dkv       (tiles, B Hkv)              k, v, dk, dv [BN, BD] stay; per frame that lists one of the rows: its queries

Scores are kept in base 2: z = s log2(e), and one exponential an entry serves the sum, the product and the entropy.  A
row of k at D = 64 in bf16 is 128 bytes: gathering rows wastes no bandwidth.  Products take their operands in the dtype
of the inputs and accumulate in ACC, fp32 or fp64.  dk and dv are written for listed rows alone, into zeros.
"""

# mypy: ignore-errors
# Triton's language is not Python to a type checker

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .attention import TILE, Inverse, Output, Saved, check, invert
from .launch import LOG2E, accumulator, current, precision, strides

_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(LOG2E)
_NEG_INF = tl.constexpr(float("-inf"))
MAKER = "amd" if torch.version.hip else "nvidia" if torch.version.cuda else "other"
_HUGE = tl.constexpr(1e30)  # finite: -inf less itself is NaN
_STEP = tl.constexpr(16)  # entries of a run at once: more would not fit in the registers


@triton.jit
def _entries(LIST, BIAS, bias_l, start, count, keys, HAS_BIAS: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    """Of BN entries of a list: the rows, which can be followed, and what is added to their scores.

    That is the bias in base 2, -1e30 where an entry does not count, and NaN where it points beyond the keys.  All by
    arithmetic: a mask a column is a pair of scalar registers on AMD, of which there are not enough.
    """
    slots = start + tl.arange(0, BN)
    row = tl.load(LIST + tl.minimum(slots, count - 1))  # no mask, but a place that exists
    outside = tl.minimum(count - 1 - slots, 0) + tl.minimum(row, 0)
    beyond = tl.log2(tl.maximum(tl.minimum(keys - row, 1), 0).to(ACC))  # 0, or -inf, which less itself is NaN
    added = tl.maximum(outside, -1).to(ACC) * _HUGE + (beyond - beyond)
    valid = (slots < count) & (row >= 0) & (row < keys)
    row = tl.maximum(tl.minimum(row, keys - 1), 0).to(tl.int64)
    if HAS_BIAS:
        bias = tl.load(BIAS + row * bias_l).to(ACC) * _LOG2E
        added += tl.maximum(bias, -_HUGE, propagate_nan=tl.PropagateNan.ALL)
    return row, valid, added


@triton.jit
def _place(heads, queries, BM: tl.constexpr):
    """Batch, query head, frame, and BM rows of q with which of them are the frame's, of a program of forward or dq."""
    blocks = tl.cdiv(queries, BM)
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    return batch, head, frame, frame * queries + at, at < queries


@triton.jit
def forward_kernel(
    Q, K, V, LISTS, COUNTS, BIAS, OUT, LSE, ENTROPY,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, list_b, list_f, list_h, count_b, count_f, count_h,
    bias_b, bias_h, bias_l, heads, queries, frames, keys, scale,
    GROUP: tl.constexpr, LISTED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out, lse and entropy of BM queries of a frame.  GROUP query heads a key head, LISTED a list."""
    batch, head, frame, rows, there = _place(heads, queries, BM)
    cols = tl.arange(0, BD)
    wide = cols < D
    inner = there[:, None] & wide[None, :]
    q = tl.load(Q + batch * q_b + head * q_h + rows[:, None] * q_l + cols[None, :], mask=inner, other=0.0)
    K += batch * k_b + (head // GROUP) * k_h
    V += batch * v_b + (head // GROUP) * v_h
    LISTS += batch * list_b + frame * list_f + (head // LISTED) * list_h
    count = tl.load(COUNTS + batch * count_b + frame * count_f + (head // LISTED) * count_h)
    if HAS_BIAS:
        BIAS += batch * bias_b + (head // GROUP) * bias_h

    top = tl.full([BM], -0.1 * _HUGE, ACC)  # above what does not count
    total = tl.zeros([BM], ACC)
    spread = tl.zeros([BM], ACC)
    out = tl.zeros([BM, BD], ACC)
    for start in tl.range(0, count, BN):
        row, valid, bias = _entries(LISTS, BIAS, bias_l, start, count, keys, HAS_BIAS, BN, ACC)
        inside = valid[:, None] & wide[None, :]
        k = tl.load(K + row[:, None] * k_l + cols[None, :], mask=inside, other=0.0)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale + bias[None, :]  # [BM, BN]
        higher = tl.maximum(top, tl.max(z, 1))
        shifted = z - higher[:, None]
        p = tl.exp2(shifted)
        fade = tl.exp2(top - higher)
        if HAS_ENTROPY:
            spread = fade * (spread + (top - higher) * total) + tl.sum(p * shifted, 1)
        total = fade * total + tl.sum(p, 1)
        top = higher
        v = tl.load(V + row[:, None] * v_l + cols[None, :], mask=inside, other=0.0)
        out = tl.dot(p.to(v.dtype), v, acc=out * fade[:, None], input_precision=PRECISION, out_dtype=ACC)

    empty = total == 0
    safe = tl.where(empty, 1.0, total)
    out = out / safe[:, None]
    lines = (batch * heads + head) * (frames * queries) + rows
    tl.store(OUT + lines[:, None] * D + cols[None, :], out.to(OUT.dtype.element_ty), mask=inner)
    tl.store(LSE + lines, tl.where(empty, _NEG_INF, (top + tl.log2(safe)) * _LN2), mask=there)
    if HAS_ENTROPY:
        entropy = (tl.log2(safe) - spread / safe) * _LN2
        tl.store(ENTROPY + lines, tl.where(entropy < 0, 0.0, entropy), mask=there)


@triton.jit
def _slopes(z, dp, lse, delta, d_entropy, entropy, HAS_ENTROPY: tl.constexpr):
    """p and ds from scores and dout . v, all one shape; lse and entropy in base 2, as z."""
    shifted = z - lse
    p = tl.exp2(shifted)
    ds = dp - delta
    if HAS_ENTROPY:
        ds -= d_entropy * (shifted + entropy) * _LN2
    return p, p * ds


@triton.jit
def dq_kernel(
    Q, K, V, LISTS, COUNTS, BIAS, OUT, LSE, ENTROPY, D_OUT, D_LSE, D_ENTROPY, DELTA, DQ,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l,
    list_b, list_f, list_h, count_b, count_f, count_h, bias_b, bias_h, bias_l, heads, queries, frames, keys, scale,
    GROUP: tl.constexpr, LISTED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """delta and dq of BM queries of a frame."""
    batch, head, frame, rows, there = _place(heads, queries, BM)
    cols = tl.arange(0, BD)
    wide = cols < D
    inner = there[:, None] & wide[None, :]
    lines = (batch * heads + head) * (frames * queries) + rows
    q = tl.load(Q + batch * q_b + head * q_h + rows[:, None] * q_l + cols[None, :], mask=inner, other=0.0)
    do = tl.load(D_OUT + batch * do_b + head * do_h + rows[:, None] * do_l + cols[None, :], mask=inner, other=0.0)
    out = tl.load(OUT + lines[:, None] * D + cols[None, :], mask=inner, other=0.0)
    delta = tl.sum(do.to(ACC) * out.to(ACC), 1)
    if HAS_LSE:
        delta -= tl.load(D_LSE + lines, mask=there, other=0.0)
    tl.store(DELTA + lines, delta, mask=there)
    lse = tl.load(LSE + lines, mask=there, other=0.0) * _LOG2E
    lse = tl.where(lse == _NEG_INF, _HUGE, lse)  # no entry: p is 0
    d_entropy = tl.zeros([BM], ACC)
    entropy = tl.zeros([BM], ACC)
    if HAS_ENTROPY:
        d_entropy = tl.load(D_ENTROPY + lines, mask=there, other=0.0)
        entropy = tl.load(ENTROPY + lines, mask=there, other=0.0) * _LOG2E
    K += batch * k_b + (head // GROUP) * k_h
    V += batch * v_b + (head // GROUP) * v_h
    LISTS += batch * list_b + frame * list_f + (head // LISTED) * list_h
    count = tl.load(COUNTS + batch * count_b + frame * count_f + (head // LISTED) * count_h)
    if HAS_BIAS:
        BIAS += batch * bias_b + (head // GROUP) * bias_h

    dq = tl.zeros([BM, BD], ACC)
    for start in tl.range(0, count, BN):
        row, valid, bias = _entries(LISTS, BIAS, bias_l, start, count, keys, HAS_BIAS, BN, ACC)
        inside = valid[:, None] & wide[None, :]
        k = tl.load(K + row[:, None] * k_l + cols[None, :], mask=inside, other=0.0)
        v = tl.load(V + row[:, None] * v_l + cols[None, :], mask=inside, other=0.0)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale + bias[None, :]  # [BM, BN]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        _, ds = _slopes(z, dp, lse[:, None], delta[:, None], d_entropy[:, None], entropy[:, None], HAS_ENTROPY)
        dq = tl.dot(ds.to(k.dtype), k, acc=dq, input_precision=PRECISION, out_dtype=ACC)
    tl.store(DQ + lines[:, None] * D + cols[None, :], (dq * (scale * _LN2)).to(DQ.dtype.element_ty), mask=inner)


@triton.jit
def dkv_kernel(
    Q, K, V, BIAS, LSE, ENTROPY, D_OUT, D_ENTROPY, DELTA, DK, DV, D_BIAS, ROWS, TILES, GROUPS, RUNS, SLOTS,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, bias_b, bias_h, bias_l,
    rows_x, tiles_x, entries_x, list_b, list_h, key_heads, queries, frames, keys, rows_most, scale,
    GROUP: tl.constexpr, LISTED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk, dv and dbias of a tile of BN listed rows of a key head.

    LISTED: query heads to a list of the key head's, GROUP where the key head has one.  list_b, list_h: how far the
    inverse moves with the batch and with the key head, 0 where it is shared.
    """
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // key_heads).to(tl.int64)
    key_head = (tl.program_id(1) % key_heads).to(tl.int64)
    x = batch * list_b + key_head * list_h
    cols = tl.arange(0, BD)
    wide = cols < D
    places = tile * BN + tl.arange(0, BN)
    row = tl.load(ROWS + x * rows_x + places, mask=places < rows_most, other=-1).to(tl.int64)
    valid = row >= 0
    inside = valid[:, None] & wide[None, :]
    k = tl.load(K + batch * k_b + key_head * k_h + row[:, None] * k_l + cols[None, :], mask=inside, other=0.0)
    v = tl.load(V + batch * v_b + key_head * v_h + row[:, None] * v_l + cols[None, :], mask=inside, other=0.0)
    bias = tl.zeros([BN], ACC)
    if HAS_BIAS:
        bias = tl.load(BIAS + batch * bias_b + key_head * bias_h + row * bias_l, mask=valid, other=0.0).to(ACC) * _LOG2E
        bias = tl.maximum(bias, -_HUGE, propagate_nan=tl.PropagateNan.ALL)
    dk = tl.zeros([BN, BD], ACC)
    dv = tl.zeros([BN, BD], ACC)
    db = tl.zeros([BN], ACC)
    heads = key_heads * GROUP
    first = tl.load(TILES + x * tiles_x + tile)
    last = tl.load(TILES + x * tiles_x + tile + 1)
    for run in tl.range(first, last):
        group = tl.load(GROUPS + x * entries_x + run)
        begin = tl.load(RUNS + x * (entries_x + 1) + run)
        end = tl.load(RUNS + x * (entries_x + 1) + run + 1)
        # how often this list has each row of the tile
        times = tl.zeros([BN], ACC)
        for start in tl.range(begin, end, _STEP):
            entry = start + tl.arange(0, _STEP)
            slot = tl.load(SLOTS + x * entries_x + entry, mask=entry < end, other=-1)
            times += tl.sum((slot[None, :] == places[:, None]).to(ACC), 1)
        added = bias + (tl.minimum(times, 1.0) - 1.0) * _HUGE
        frame = (group // (GROUP // LISTED)).to(tl.int64)
        head = key_head * GROUP + (group % (GROUP // LISTED)) * LISTED
        for at in tl.range(0, LISTED * tl.cdiv(queries, BM)):
            h = head + at // tl.cdiv(queries, BM)
            m = (at % tl.cdiv(queries, BM)) * BM + tl.arange(0, BM)
            there = m < queries
            rows = frame * queries + m
            inner = there[:, None] & wide[None, :]
            # scalars of a query that is not there are the last one's, without a mask; its lse makes p 0
            lines = (batch * heads + h) * (frames * queries) + frame * queries + tl.minimum(m, queries - 1)
            q = tl.load(Q + batch * q_b + h * q_h + rows[:, None] * q_l + cols[None, :], mask=inner, other=0.0)
            do = tl.load(D_OUT + batch * do_b + h * do_h + rows[:, None] * do_l + cols[None, :], mask=inner, other=0.0)
            lse = tl.load(LSE + lines) * _LOG2E
            lse = tl.where(lse == _NEG_INF, _HUGE, lse) + tl.minimum(tl.maximum(m - queries + 1, 0), 1).to(ACC) * _HUGE
            delta = tl.load(DELTA + lines)
            d_entropy = tl.zeros([BM], ACC)
            entropy = tl.zeros([BM], ACC)
            if HAS_ENTROPY:
                d_entropy = tl.load(D_ENTROPY + lines)
                entropy = tl.load(ENTROPY + lines) * _LOG2E
            z = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * scale + added[:, None]  # [BN, BM]
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=ACC)
            p, ds = _slopes(z, dp, lse[None, :], delta[None, :], d_entropy[None, :], entropy[None, :], HAS_ENTROPY)
            p *= times[:, None]
            ds *= times[:, None]
            dv = tl.dot(p.to(do.dtype), do, acc=dv, input_precision=PRECISION, out_dtype=ACC)
            dk = tl.dot(ds.to(q.dtype), q, acc=dk, input_precision=PRECISION, out_dtype=ACC)
            if HAS_BIAS:
                db += tl.sum(ds, 1)
    lines = ((batch * key_heads + key_head) * keys + row)[:, None] * D + cols[None, :]
    tl.store(DK + lines, (dk * (scale * _LN2)).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + lines, dv.to(DV.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        tl.store(D_BIAS + (batch * key_heads + key_head) * keys + row, db, mask=valid)


class Shape:
    """Blocks and launch options, by dtype, head dimension and maker alone: what compiles without a spill."""

    def __init__(self, dtype: torch.dtype, d: int, *, maker: str = MAKER):
        self.bd = max(16, triton.next_power_of_2(d))
        wide, full = self.bd > 64, dtype.itemsize > 2  # full: no matrix instruction takes these as they are
        self.forward = {"BM": 32 if full else 128 if not wide else 64, "BN": 32 if full else 64}
        self.dq = {"BM": 64 if not full else 16 if wide else 32, "BN": 32}
        self.dkv = {"BM": 16 if full or (wide and maker == "amd") else 32, "BN": TILE}
        self.options: dict[str, int] = {"num_warps": 4 if maker == "amd" else 8}  # 256 threads
        if maker == "nvidia":
            self.options["maxnreg"] = 255  # else ptxas spills a little to make room for blocks that do not come
        self.dkv_options = self.options | ({"num_stages": 2} if wide and not full else {})

    def flags(self, d: int, dtype: torch.dtype) -> dict:
        acc = tl.float64 if dtype == torch.float64 else tl.float32
        return {"D": d, "BD": self.bd, "PRECISION": precision(dtype), "ACC": acc}


def _common(q, k, lists, bias) -> dict:
    heads, frames = q.shape[1], lists.shape[1]
    return {
        "heads": heads, "queries": q.shape[2] // frames, "frames": frames, "keys": k.shape[2],
        "GROUP": heads // k.shape[1], "LISTED": heads // lists.shape[2], "HAS_BIAS": bias is not None,
    }  # fmt: skip


def _operands(q, k, v, lists, counts, bias) -> dict:
    found = strides(q, "bhl", "q") | strides(k, "bhl", "k") | strides(v, "bhl", "v")
    found |= strides(lists, "bfh", "list") | strides(counts, "bfh", "count")
    none = dict.fromkeys(("bias_b", "bias_h", "bias_l"), 0)
    return found | (none if bias is None else strides(bias, "bhl", "bias"))


def forward(q, k, v, lists, counts, bias, scale: float, *, entropy: bool) -> Output:
    """Attention over the lists; see the contract."""
    check(q, k, v, lists, counts, bias)
    b, heads, _, d = q.shape
    acc = accumulator(q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=acc, device=q.device)
    spread = torch.empty_like(lse) if entropy else None
    if q.numel():
        shape, common = Shape(q.dtype, d), _common(q, k, lists, bias)
        grid = (triton.cdiv(common["queries"], shape.forward["BM"]) * common["frames"], b * heads)
        with current(q.device):
            forward_kernel[grid](
                q, k, v, lists, counts, lse if bias is None else bias, out, lse, lse if spread is None else spread,
                **_operands(q, k, v, lists, counts, bias), **common, scale=scale * LOG2E, HAS_ENTROPY=entropy,
                **shape.flags(d, q.dtype), **shape.forward, **shape.options,
            )  # fmt: skip
    return Output(out, lse, spread)


def backward(q, k, v, lists, counts, bias, scale: float, saved: Saved, inverse: Inverse | None = None):
    """dq, dk, dv as the inputs and dbias in the accumulator's dtype, None without a bias."""
    check(q, k, v, lists, counts, bias)
    b, heads, _, d = q.shape
    key_heads, keys = k.shape[1:3]
    shape, common, acc = Shape(q.dtype, d), _common(q, k, lists, bias), accumulator(q.dtype)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(k.shape, dtype=k.dtype, device=q.device) for _ in range(2))
    d_bias = None if bias is None else torch.zeros(bias.shape, dtype=acc, device=q.device)
    if not q.numel():
        return dq, dk, dv, d_bias
    lse, d_out = saved.lse, saved.d_out if saved.d_out.stride(-1) == 1 else saved.d_out.contiguous()
    delta = torch.empty_like(lse)
    with_entropy = saved.d_entropy is not None
    entropy, d_entropy = (saved.entropy, saved.d_entropy.contiguous()) if with_entropy else (lse, lse)
    d_lse = lse if saved.d_lse is None else saved.d_lse.contiguous()
    operands = _operands(q, k, v, lists, counts, bias) | strides(d_out, "bhl", "do")
    some_bias = lse if bias is None else bias
    fixed = {**shape.flags(d, q.dtype), "HAS_ENTROPY": with_entropy, "scale": scale * LOG2E}
    with current(q.device):
        grid = (triton.cdiv(common["queries"], shape.dq["BM"]) * common["frames"], b * heads)
        dq_kernel[grid](
            q, k, v, lists, counts, some_bias, saved.out, lse, entropy, d_out, d_lse, d_entropy, delta, dq,
            **operands, **common, **fixed, **shape.dq, **shape.options, HAS_LSE=saved.d_lse is not None,
        )  # fmt: skip
        inverse = invert(lists, counts, keys, key_heads, TILE) if inverse is None else inverse
        tiles = inverse.tiles.shape[1] - 1
        if tiles == 0:
            return dq, dk, dv, d_bias
        told_apart = min(lists.shape[2], key_heads)
        keyed = {n: s for n, s in operands.items() if not n.startswith(("list", "count"))}
        del common["heads"]
        common["LISTED"] = min(common["LISTED"], common["GROUP"])
        dkv_kernel[(tiles, b * key_heads)](
            q, k, v, some_bias, lse, entropy, d_out, d_entropy, delta, dk, dv, lse if d_bias is None else d_bias,
            inverse.rows, inverse.tiles, inverse.groups, inverse.runs, inverse.slots,
            **keyed, **common, **fixed, **shape.dkv, **shape.dkv_options,
            rows_x=inverse.rows.shape[1], tiles_x=tiles + 1, entries_x=inverse.groups.shape[1],
            list_b=told_apart if lists.shape[0] > 1 else 0, list_h=1 if told_apart > 1 else 0, key_heads=key_heads,
            rows_most=inverse.rows.shape[1],
        )  # fmt: skip
    return dq, dk, dv, d_bias
