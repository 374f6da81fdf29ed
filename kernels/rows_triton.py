r"""Triton row kernels: one program a row, or a row and a block of columns.

Operands, for a tile of N rows and V columns that starts at column ``start`` of the vocabulary:

    Z      (N, V)  raw logits, fp32 / bf16 / fp16 / fp64, any row stride, unit column stride
    T      (N, V)  raw teacher logits, the same
    STATE  (19, N) online state         (contract.STATE)
    COEF   (14, N) gradient scalars     (contract.COEF)
    y      (N,)    int64 labels over the whole vocabulary

fold: with x the running maximum, every block of columns rescales the sums of the blocks before it,

    M' = max(M, max_k z_k),   S'[g] = S[g] e^{M - M'} + sum_k e^{z_k - M'} g_k

once each for z (g in 1, z, e^{z - M'}, t), for the mix m = alpha z + eta t (g in 1, z) and for t
(g in 1, z, t).  A logit is read once.  A row's order of summation depends on V and on the block
size alone, never on N or on the other rows, so statistics are batch invariant.

grad: reads a logit once and writes it once,

    dz_k = p_k (a_k + b z_k + c p_k + e t_k) + d q_k + f T_k + u + g p_k (s_k - jsd_p) + scatter

in the accumulator dtype, rounds once.  ``OUT`` may be ``Z``.  ACC is fp32, or fp64 for gradcheck.
Row offsets are int64; the row index is grid axis 0, which may exceed 65,535.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .contract import COEF_INDEX, STATE_INDEX, RowSpec

BLOCK = 2048  # columns a program holds at once
WARPS = 8

_NEG_INF = tl.constexpr(float("-inf"))


def _constants(index: dict[str, int], prefix: str) -> dict[str, tl.constexpr]:
    return {prefix + name.upper(): tl.constexpr(i) for name, i in index.items()}


globals().update(_constants(STATE_INDEX, "S_"))
globals().update(_constants(COEF_INDEX, "C_"))


@triton.jit
def _tanh(x):
    # libdevice is not available in the interpreter; the sign trick keeps the exponential from overflowing
    e = tl.exp(-2.0 * tl.abs(x))
    r = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -r, r)


@triton.jit
def _transform(raw, inv_temp, SCALE: tl.constexpr, CAP: tl.constexpr, TEMP: tl.constexpr):
    x = raw
    if SCALE != 1.0:
        x = x * SCALE
    if CAP != 0.0:
        x = CAP * _tanh(x / CAP)
    if TEMP:
        x = x * inv_temp
    return x


@triton.jit
def _safe(m):
    # a block may hold only masked entries: exp(-inf - 0) is 0 where exp(-inf - -inf) is NaN
    return tl.where(m == _NEG_INF, 0.0, m)


@triton.jit
def _mix(z, t, ALPHA: tl.constexpr, ETA: tl.constexpr):
    # eta = 0 and alpha = 0 are exact special cases, so that 0 * -inf never appears
    if ETA == 0.0:
        m = z * ALPHA
    elif ALPHA == 0.0:
        m = t * ETA
    else:
        m = z * ALPHA + t * ETA
    return m


@triton.jit
def _log_m(logp, logt, BETA: tl.constexpr):
    # log(beta T + (1 - beta) p) without leaving the log domain
    one: tl.constexpr = 1.0
    hi = tl.maximum(logp, logt)
    safe = _safe(hi)
    return safe + tl.log(BETA * tl.exp(logt - safe) + (one - BETA) * tl.exp(logp - safe))


@triton.jit
def fold_kernel(
    Z, z_stride, T, t_stride, STATE, state_stride, Y, INV, T_INV, start, columns,
    HAS_T: tl.constexpr, MEAN: tl.constexpr, SQUARE: tl.constexpr, UNIFORM: tl.constexpr, OTHER: tl.constexpr,
    MIX: tl.constexpr, FOLD_T: tl.constexpr, CROSS: tl.constexpr, T_ENTROPY: tl.constexpr, T_LABEL: tl.constexpr,
    HIT: tl.constexpr, ALPHA: tl.constexpr, ETA: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    TEMP: tl.constexpr, T_SCALE: tl.constexpr, T_CAP: tl.constexpr, T_TEMP: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    S = STATE + row
    y = tl.load(Y + row) - start
    inv = tl.load(INV + row)
    t_inv = tl.load(T_INV + row)

    z_max = tl.load(S + S_Z_MAX * state_stride)
    z_sum = tl.load(S + S_Z_SUM * state_stride)
    z_label = tl.load(S + S_Z_LABEL * state_stride)
    z_exp = tl.load(S + S_Z_EXP * state_stride)
    p_square = tl.load(S + S_P_SQUARE * state_stride)
    z_total = tl.load(S + S_Z_TOTAL * state_stride)
    z_count = tl.load(S + S_Z_COUNT * state_stride)
    t_exp = tl.load(S + S_T_EXP * state_stride)
    m_max = tl.load(S + S_M_MAX * state_stride)
    m_sum = tl.load(S + S_M_SUM * state_stride)
    m_exp = tl.load(S + S_M_EXP * state_stride)
    t_max = tl.load(S + S_T_MAX * state_stride)
    t_sum = tl.load(S + S_T_SUM * state_stride)
    t_z = tl.load(S + S_T_Z * state_stride)
    t_t = tl.load(S + S_T_T * state_stride)
    t_label = tl.load(S + S_T_LABEL * state_stride)
    argmax = tl.load(S + S_ARGMAX * state_stride)

    for first in tl.range(0, columns, BLOCK):
        cols = first + tl.arange(0, BLOCK)  # [BLOCK]
        inside = cols < columns
        raw = tl.load(Z + row * z_stride + cols, mask=inside, other=_NEG_INF).to(ACC)
        z = _transform(raw, inv, SCALE, CAP, TEMP)
        z = tl.where(inside, z, _NEG_INF)  # tanh(-inf) is finite
        masked = z == _NEG_INF
        zf = tl.where(masked, 0.0, z)  # factor of products whose other factor is 0 there
        at_label = cols == y
        here = (y >= first) & (y < first + BLOCK) & (y < columns)
        z_label = tl.where(here, tl.max(tl.where(at_label, z, _NEG_INF), 0), z_label)

        block_max = tl.max(z, 0)
        if HIT:
            index = tl.min(tl.where((z == block_max) & inside, cols, columns), 0)  # lowest index on ties
            argmax = tl.where(block_max > z_max, tl.where(index == y, 1.0, 0.0), argmax)
        new_max = tl.maximum(z_max, block_max)
        safe = _safe(new_max)
        decay = tl.exp(z_max - safe)
        e = tl.exp(z - safe)
        z_sum = z_sum * decay + tl.sum(e, 0)
        if MEAN:
            z_exp = z_exp * decay + tl.sum(e * zf, 0)
        if SQUARE:
            p_square = p_square * decay * decay + tl.sum(e * e, 0)
        if UNIFORM:
            z_total += tl.sum(zf, 0)
            z_count += tl.sum(tl.where(masked, 0.0, 1.0).to(ACC), 0)
        z_max = new_max

        t = z
        if HAS_T:
            t_raw = tl.load(T + row * t_stride + cols, mask=inside, other=_NEG_INF).to(ACC)
            t = _transform(t_raw, t_inv, T_SCALE, T_CAP, T_TEMP)
            t = tl.where(masked, _NEG_INF, t)  # T lives on the student's support
            tf = tl.where(t == _NEG_INF, 0.0, t)
            if OTHER:
                t_exp = t_exp * decay + tl.sum(e * tf, 0)
            if T_LABEL:
                t_label = tl.where(here, tl.max(tl.where(at_label, t, _NEG_INF), 0), t_label)
            if FOLD_T:
                new_t = tl.maximum(t_max, tl.max(t, 0))
                safe = _safe(new_t)
                t_decay = tl.exp(t_max - safe)
                te = tl.exp(t - safe)
                t_sum = t_sum * t_decay + tl.sum(te, 0)
                if CROSS:
                    t_z = t_z * t_decay + tl.sum(te * zf, 0)
                if T_ENTROPY:
                    t_t = t_t * t_decay + tl.sum(te * tf, 0)
                t_max = new_t
        if MIX:
            m = _mix(z, t, ALPHA, ETA)
            new_m = tl.maximum(m_max, tl.max(m, 0))
            safe = _safe(new_m)
            m_decay = tl.exp(m_max - safe)
            me = tl.exp(m - safe)
            m_sum = m_sum * m_decay + tl.sum(me, 0)
            m_exp = m_exp * m_decay + tl.sum(me * zf, 0)
            m_max = new_m

    tl.store(S + S_Z_MAX * state_stride, z_max)
    tl.store(S + S_Z_SUM * state_stride, z_sum)
    tl.store(S + S_Z_LABEL * state_stride, z_label)
    tl.store(S + S_Z_EXP * state_stride, z_exp)
    tl.store(S + S_P_SQUARE * state_stride, p_square)
    tl.store(S + S_Z_TOTAL * state_stride, z_total)
    tl.store(S + S_Z_COUNT * state_stride, z_count)
    tl.store(S + S_T_EXP * state_stride, t_exp)
    tl.store(S + S_M_MAX * state_stride, m_max)
    tl.store(S + S_M_SUM * state_stride, m_sum)
    tl.store(S + S_M_EXP * state_stride, m_exp)
    tl.store(S + S_T_MAX * state_stride, t_max)
    tl.store(S + S_T_SUM * state_stride, t_sum)
    tl.store(S + S_T_Z * state_stride, t_z)
    tl.store(S + S_T_T * state_stride, t_t)
    tl.store(S + S_T_LABEL * state_stride, t_label)
    tl.store(S + S_ARGMAX * state_stride, argmax)


@triton.jit
def jsd_kernel(
    Z, z_stride, T, t_stride, STATE, state_stride, LSE, T_LSE, INV, T_INV, columns,
    BETA: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEMP: tl.constexpr,
    T_SCALE: tl.constexpr, T_CAP: tl.constexpr, T_TEMP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second pass: sum_k T_k (log T_k - log M_k) and sum_k p_k (log p_k - log M_k)."""
    row = tl.program_id(0).to(tl.int64)
    inv = tl.load(INV + row)
    t_inv = tl.load(T_INV + row)
    lse = tl.load(LSE + row)
    t_lse = tl.load(T_LSE + row)
    sum_t = tl.load(STATE + S_JSD_T * state_stride + row)
    sum_p = tl.load(STATE + S_JSD_P * state_stride + row)
    for first in tl.range(0, columns, BLOCK):
        cols = first + tl.arange(0, BLOCK)  # [BLOCK]
        inside = cols < columns
        raw = tl.load(Z + row * z_stride + cols, mask=inside, other=_NEG_INF).to(ACC)
        z = tl.where(inside, _transform(raw, inv, SCALE, CAP, TEMP), _NEG_INF)
        t_raw = tl.load(T + row * t_stride + cols, mask=inside, other=_NEG_INF).to(ACC)
        t = tl.where(z == _NEG_INF, _NEG_INF, _transform(t_raw, t_inv, T_SCALE, T_CAP, T_TEMP))
        logp = z - lse
        logt = t - t_lse
        log_m = _log_m(logp, logt, BETA)
        sum_t += tl.sum(tl.where(logt == _NEG_INF, 0.0, tl.exp(logt) * (logt - log_m)), 0)
        sum_p += tl.sum(tl.where(logp == _NEG_INF, 0.0, tl.exp(logp) * (logp - log_m)), 0)
    tl.store(STATE + S_JSD_T * state_stride + row, sum_t)
    tl.store(STATE + S_JSD_P * state_stride + row, sum_p)


@triton.jit
def grad_kernel(
    Z, z_stride, T, t_stride, OUT, out_stride, COEF, coef_stride, Y, INV, T_INV, IDS, IDS_GRAD, start, columns,
    HAS_T: tl.constexpr, MEAN: tl.constexpr, SQUARE: tl.constexpr, UNIFORM: tl.constexpr, OTHER: tl.constexpr,
    MIX: tl.constexpr, CROSS: tl.constexpr, JSD: tl.constexpr, K: tl.constexpr,
    ALPHA: tl.constexpr, ETA: tl.constexpr, BETA: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    TEMP: tl.constexpr, T_SCALE: tl.constexpr, T_CAP: tl.constexpr, T_TEMP: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = cols < columns
    R = COEF + row
    y = tl.load(Y + row) - start
    inv = tl.load(INV + row)

    raw = tl.load(Z + row * z_stride + cols, mask=inside, other=_NEG_INF).to(ACC)
    z = tl.where(inside, _transform(raw, inv, SCALE, CAP, TEMP), _NEG_INF)
    masked = z == _NEG_INF
    logp = z - tl.load(R + C_LSE * coef_stride)
    p = tl.exp(logp)
    at_label = cols == y
    a = tl.load(R + C_A * coef_stride)
    poly = tl.where(at_label, tl.load(R + C_A_LABEL * coef_stride), a)
    if MEAN:
        poly += tl.load(R + C_B * coef_stride) * tl.where(masked, 0.0, z)
    if SQUARE:
        poly += tl.load(R + C_C * coef_stride) * p
    t = z
    if HAS_T:
        t_raw = tl.load(T + row * t_stride + cols, mask=inside, other=_NEG_INF).to(ACC)
        t = _transform(t_raw, tl.load(T_INV + row), T_SCALE, T_CAP, T_TEMP)
        t = tl.where(masked, _NEG_INF, t)
    if OTHER:
        poly += tl.load(R + C_E * coef_stride) * tl.where(t == _NEG_INF, 0.0, t)
    dz = p * poly
    if MIX:
        dz += tl.load(R + C_D * coef_stride) * tl.exp(_mix(z, t, ALPHA, ETA) - tl.load(R + C_MIX_LSE * coef_stride))
    if CROSS:
        dz += tl.load(R + C_F * coef_stride) * tl.exp(t - tl.load(R + C_TEACHER_LSE * coef_stride))
    if UNIFORM:
        dz += tl.load(R + C_U * coef_stride)
    if JSD:
        log_m = _log_m(logp, t - tl.load(R + C_TEACHER_LSE * coef_stride), BETA)
        ratio = tl.where(masked, 0.0, logp - log_m) - tl.load(R + C_JSD_P * coef_stride)
        dz += tl.load(R + C_G * coef_stride) * p * ratio
    dz += tl.where(at_label, tl.load(R + C_LABEL * coef_stride), 0.0)
    for k in tl.range(0, K):
        column = tl.load(IDS + row * K + k)
        dz += tl.where((cols == column - start) & (column >= 0), tl.load(IDS_GRAD + row * K + k), 0.0)
    dz = tl.where(masked, 0.0, dz)
    if CAP != 0.0:
        th = _tanh(raw * SCALE / CAP)
        dz = dz * (1.0 - th * th)
    if TEMP:
        dz = dz * inv
    if SCALE != 1.0:
        dz = dz * SCALE
    tl.store(OUT + row * out_stride + cols, dz.to(OUT.dtype.element_ty), mask=inside)


def _acc(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def _transforms(spec: RowSpec) -> dict:
    return {
        "SCALE": spec.scale, "CAP": spec.softcap, "TEMP": spec.temperature,
        "T_SCALE": spec.teacher_scale, "T_CAP": spec.teacher_softcap, "T_TEMP": spec.teacher_temperature,
    }  # fmt: skip


def fold_flags(spec: RowSpec) -> dict:
    """Compile-time arguments of ``fold_kernel`` for a spec."""
    return {
        "HAS_T": spec.uses_teacher, "MEAN": spec.has("mean"), "SQUARE": spec.has("square"),
        "UNIFORM": spec.has("uniform"), "OTHER": spec.has("other"), "MIX": spec.has("mix"),
        "FOLD_T": spec.folds_teacher, "CROSS": spec.has("cross"), "T_ENTROPY": spec.has("teacher_entropy"),
        "T_LABEL": spec.has("teacher_logp"), "HIT": spec.has("hit"),
        "ALPHA": spec.alpha, "ETA": spec.eta, **_transforms(spec),
    }  # fmt: skip


def grad_flags(spec: RowSpec, ids: int) -> dict:
    """Compile-time arguments of ``grad_kernel`` for a spec and a number of ids a row."""
    return {
        "HAS_T": spec.uses_teacher, "MEAN": spec.has("mean"), "SQUARE": spec.has("square"),
        "UNIFORM": spec.has("uniform"), "OTHER": spec.has("other"), "MIX": spec.has("mix"),
        "CROSS": spec.has("cross"), "JSD": spec.has("jsd"), "K": ids,
        "ALPHA": spec.alpha, "ETA": spec.eta, "BETA": spec.beta, **_transforms(spec),
    }  # fmt: skip


def _vector(x, state):
    # a placeholder keeps the pointer's dtype, and so the compiled variant, the same
    return x if x is not None else state


def fold(tile, teacher, state, target, spec: RowSpec, *, start=0, inv_temp=None, teacher_inv_temp=None):
    """Merge a tile's columns [start, start + V) into ``state`` (STATE_ROWS, N), in place."""
    rows, columns = tile.shape
    if rows == 0 or columns == 0:
        return
    t = teacher if spec.uses_teacher else tile
    fold_kernel[(rows,)](
        tile, tile.stride(0), t, t.stride(0), state, state.stride(0), target,
        _vector(inv_temp, state), _vector(teacher_inv_temp, state), start, columns,
        **fold_flags(spec), ACC=_acc(state.dtype), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def fold_jsd(tile, teacher, state, lse, teacher_lse, spec: RowSpec, *, inv_temp=None, teacher_inv_temp=None):
    """Second pass for the Jensen-Shannon sums, which need both log-sum-exps first."""
    rows, columns = tile.shape
    if rows == 0 or columns == 0:
        return
    jsd_kernel[(rows,)](
        tile, tile.stride(0), teacher, teacher.stride(0), state, state.stride(0), lse, teacher_lse,
        _vector(inv_temp, state), _vector(teacher_inv_temp, state), columns,
        BETA=spec.beta, **_transforms(spec), ACC=_acc(state.dtype), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def grad(
    tile, teacher, out, coef, target, spec: RowSpec, *, start=0, inv_temp=None, teacher_inv_temp=None,
    ids=None, ids_grad=None,
):  # fmt: skip
    """Write d loss / d raw logits of the tile into ``out`` (N, V), which may be ``tile`` itself."""
    rows, columns = tile.shape
    if rows == 0 or columns == 0:
        return
    t = teacher if spec.uses_teacher else tile
    count = 0 if ids is None else ids.shape[1]
    grad_kernel[(rows, triton.cdiv(columns, BLOCK))](
        tile, tile.stride(0), t, t.stride(0), out, out.stride(0), coef, coef.stride(0), target,
        _vector(inv_temp, coef), _vector(teacher_inv_temp, coef),
        ids if count else target, ids_grad if count else coef, start, columns,
        **grad_flags(spec, count), ACC=_acc(coef.dtype), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
