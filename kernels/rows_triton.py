r"""Triton row kernels: one program a row, or a row and a block of columns.

Operands, for a tile of N rows and V columns that starts at column ``start`` of the vocabulary:

    Z      (N, V)  raw logits, fp32 / bf16 / fp16 / fp64, any row stride, unit column stride
    T      (N, V)  raw teacher logits, the same
    STATE  (19, N) online state         (contract.STATE)
    COEF   (17, N) gradient scalars     (contract.COEF)
    y      (N,)    int64 labels over the whole vocabulary

fold: one program a row.  A block of columns is seen as [LANES, WIDTH], WIDTH being one 128-bit load, and
every lane runs its own online sums: with x its running maximum,

    M' = max(M, max_k z_k),   S'[g] = S[g] e^{M - M'} + sum_k e^{z_k - M'} g_k

once each for z (g in 1, z, e^{z - M'}, t), for the mix m = alpha z + eta t (g in 1, z) and for t
(g in 1, z, t).  A lane lies within a thread, so the loop has no shuffle, no shared memory and no barrier,
at 1 + 1/WIDTH exponentials an entry; lanes meet each other and the state once, at the end.  A logit is
read once, and the label's once more.  A row's order of summation depends on V, on the tile's dtype and
alignment and on BLOCK, never on N or on the other rows, so statistics are batch invariant.

grad: one program a row and block; reads a logit once and writes it once,

    dz_k = p_k (a_k + b z_k + c p_k + e t_k) + d q_k + f T_k + u + g p_k (s_k - jsd_p) + scatter

in the accumulator dtype, rounds once.  ``OUT`` may be ``Z``.  ACC is fp32, or fp64 for gradcheck.
Row offsets are int64; the row index is grid axis 0, which may exceed 65,535.  Loads and stores are 128 bits
wide where row stride and V are divisible by 16; one that is not costs narrower accesses, not correctness.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .contract import COEF_INDEX, STATE_INDEX, RowSpec
from .launch import current

BLOCK = 2048  # columns a program holds at once
THREADS = 256
WARPS = THREADS // (64 if torch.version.hip else 32)

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
def _sech2(x):
    # 1 - tanh(x)^2 without the cancellation
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _safe(m):
    # a block may hold only masked entries: exp(-inf - 0) is 0 where exp(-inf - -inf) is NaN
    return tl.where(m == _NEG_INF, 0.0, m)


@triton.jit
def _finite(x):
    # factor of products whose other factor is exactly 0 where x is -inf
    return tl.where(x == _NEG_INF, 0.0, x)


@triton.jit
def _mix(z, t, ALPHA: tl.constexpr, ETA: tl.constexpr):
    # masked entries are put back by hand: alpha may be 0 (0 * -inf is NaN) or negative
    m = _finite(z) * ALPHA
    if ETA != 0.0:
        m += t * ETA
    return tl.where(z == _NEG_INF, _NEG_INF, m)


@triton.jit
def _log_mean(logp, logt, BETA: tl.constexpr):
    """log(beta T + (1 - beta) p), in the log domain."""
    safe = _safe(tl.maximum(logp, logt))
    # one exponential is 1, so for 0 < beta < 1 the sum is at least min(beta, 1 - beta)
    return safe + tl.log(BETA * tl.exp(logt - safe) + (1.0 - BETA) * tl.exp(logp - safe))


@triton.jit
def _log_ratio(logx, log_m):
    """log x - log m; 0 where it only meets a zero factor."""
    return tl.where((logx == _NEG_INF) | (log_m == _NEG_INF), 0.0, logx - log_m)


@triton.jit
def _step(run, x):
    """Running maxima [LANES] and x [LANES, WIDTH] -> new maxima, decay of the old sums, e^{x - maxima}."""
    new = tl.maximum(run, tl.max(x, 1))
    safe = _safe(new)
    return new, tl.exp(run - safe), tl.exp(x - safe[:, None])


@triton.jit
def _meet(run, old):
    """Lanes' maxima [LANES] and the state's -> maximum of all, weight of each lane, weight of the state."""
    new = tl.maximum(old, tl.max(run, 0))
    safe = _safe(new)
    return new, tl.exp(run - safe), tl.exp(old - safe)


@triton.jit
def _add(S, weight_old, lanes):
    # One sum of the state: decayed, plus the lanes'.  The load comes first: every warp loads the scalar and
    # one stores it, and the barriers of tl.sum in between are what orders the two.
    old = tl.load(S)
    tl.store(S, old * weight_old + tl.sum(lanes, 0))


@triton.jit(do_not_specialize=["state_stride", "start"])
def fold_kernel(
    Z, z_stride, T, t_stride, STATE, state_stride, Y, INV, T_INV, start, columns,
    HAS_T: tl.constexpr, MEAN: tl.constexpr, SQUARE: tl.constexpr, UNIFORM: tl.constexpr, OTHER: tl.constexpr,
    MIX: tl.constexpr, MIX_MEAN: tl.constexpr, FOLD_T: tl.constexpr, CROSS: tl.constexpr, T_ENTROPY: tl.constexpr,
    T_LABEL: tl.constexpr, HIT: tl.constexpr, ALPHA: tl.constexpr, ETA: tl.constexpr, SCALE: tl.constexpr,
    CAP: tl.constexpr, TEMP: tl.constexpr, T_SCALE: tl.constexpr, T_CAP: tl.constexpr, T_TEMP: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Merge one row of the tile into the state.  Every value of N runs the same binary."""
    LANES: tl.constexpr = BLOCK // WIDTH
    row = tl.program_id(0).to(tl.int64)
    Z_ROW = Z + row * z_stride
    T_ROW = T + row * t_stride
    y = tl.load(Y + row) - start
    inv = tl.load(INV + row)
    t_inv = tl.load(T_INV + row)
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [LANES, WIDTH]

    # every lane's maxima and sums, [LANES]; those that no flag asks for are never touched and cost nothing
    zero = tl.zeros([LANES], ACC)
    low = zero + _NEG_INF
    z_max, z_sum, z_exp, p_square, z_total, z_count, t_exp = low, zero, zero, zero, zero, zero, zero
    m_max, m_sum, m_exp = low, zero, zero
    t_max, t_sum, t_z, t_t = low, zero, zero, zero
    index = tl.zeros([LANES], tl.int32)

    for first in tl.range(0, columns, BLOCK):
        cols = first + tile
        inside = cols < columns
        raw = tl.load(Z_ROW + cols, mask=inside, other=_NEG_INF).to(ACC)
        z = _transform(raw, inv, SCALE, CAP, TEMP)
        z = tl.where(inside, z, _NEG_INF)  # tanh(-inf) is finite
        masked = z == _NEG_INF
        zf = _finite(z)
        if HIT:
            top = tl.max(z, 1)
            here = tl.min(tl.where(z == top[:, None], cols, columns), 1)  # lowest column on ties
            index = tl.where(top > z_max, here, index)
        z_max, decay, e = _step(z_max, z)
        z_sum = z_sum * decay + tl.sum(e, 1)
        if MEAN:
            z_exp = z_exp * decay + tl.sum(e * zf, 1)
        if SQUARE:
            p_square = p_square * decay * decay + tl.sum(e * e, 1)
        if UNIFORM:
            z_total += tl.sum(zf, 1)
            z_count += tl.sum(tl.where(masked, 0.0, 1.0).to(ACC), 1)
        t = z
        if HAS_T:
            t_raw = tl.load(T_ROW + cols, mask=inside, other=_NEG_INF).to(ACC)
            t = _transform(t_raw, t_inv, T_SCALE, T_CAP, T_TEMP)
            t = tl.where(masked, _NEG_INF, t)  # T lives on the student's support
            tf = _finite(t)
            if OTHER:
                t_exp = t_exp * decay + tl.sum(e * tf, 1)
            if FOLD_T:
                t_max, t_decay, te = _step(t_max, t)
                t_sum = t_sum * t_decay + tl.sum(te, 1)
                if CROSS:
                    t_z = t_z * t_decay + tl.sum(te * zf, 1)
                if T_ENTROPY:
                    t_t = t_t * t_decay + tl.sum(te * tf, 1)
        if MIX:
            m_max, m_decay, me = _step(m_max, _mix(z, t, ALPHA, ETA))
            m_sum = m_sum * m_decay + tl.sum(me, 1)
            if MIX_MEAN:
                m_exp = m_exp * m_decay + tl.sum(me * zf, 1)

    S = STATE + row
    has_label = (y >= 0) & (y < columns)
    z_label = _transform(tl.load(Z_ROW + y, mask=has_label, other=0.0).to(ACC), inv, SCALE, CAP, TEMP)
    tl.store(S + S_Z_LABEL * state_stride, z_label, mask=has_label)
    if T_LABEL:
        t_label = _transform(tl.load(T_ROW + y, mask=has_label, other=0.0).to(ACC), t_inv, T_SCALE, T_CAP, T_TEMP)
        t_label = tl.where(z_label == _NEG_INF, _NEG_INF, t_label)
        tl.store(S + S_T_LABEL * state_stride, t_label, mask=has_label)

    old = tl.load(S + S_Z_MAX * state_stride)
    new, lane, decay = _meet(z_max, old)
    if HIT:
        old_hit = tl.load(S + S_ARGMAX * state_stride)
        top = tl.max(z_max, 0)
        argmax = tl.min(tl.where(z_max == top, index, columns), 0)
        # a later tile wins only if strictly larger: lowest column on ties
        hit = tl.where(top > old, tl.where(argmax == y, 1.0, 0.0), old_hit)
        tl.store(S + S_ARGMAX * state_stride, hit)
    tl.store(S + S_Z_MAX * state_stride, new)
    _add(S + S_Z_SUM * state_stride, decay, z_sum * lane)
    if MEAN:
        _add(S + S_Z_EXP * state_stride, decay, z_exp * lane)
    if SQUARE:
        _add(S + S_P_SQUARE * state_stride, decay * decay, p_square * lane * lane)
    if OTHER:
        _add(S + S_T_EXP * state_stride, decay, t_exp * lane)
    if UNIFORM:
        _add(S + S_Z_TOTAL * state_stride, 1.0, z_total)
        _add(S + S_Z_COUNT * state_stride, 1.0, z_count)
    if MIX:
        new, lane, decay = _meet(m_max, tl.load(S + S_M_MAX * state_stride))
        tl.store(S + S_M_MAX * state_stride, new)
        _add(S + S_M_SUM * state_stride, decay, m_sum * lane)
        if MIX_MEAN:
            _add(S + S_M_EXP * state_stride, decay, m_exp * lane)
    if FOLD_T:
        new, lane, decay = _meet(t_max, tl.load(S + S_T_MAX * state_stride))
        tl.store(S + S_T_MAX * state_stride, new)
        _add(S + S_T_SUM * state_stride, decay, t_sum * lane)
        if CROSS:
            _add(S + S_T_Z * state_stride, decay, t_z * lane)
        if T_ENTROPY:
            _add(S + S_T_T * state_stride, decay, t_t * lane)


@triton.jit(do_not_specialize=["state_stride"])
def jsd_kernel(
    Z, z_stride, T, t_stride, STATE, state_stride, INV, T_INV, columns,
    BETA: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEMP: tl.constexpr,
    T_SCALE: tl.constexpr, T_CAP: tl.constexpr, T_TEMP: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Second pass: sum_k T_k (log T_k - log M_k) and sum_k p_k (log p_k - log M_k)."""
    LANES: tl.constexpr = BLOCK // WIDTH
    row = tl.program_id(0).to(tl.int64)
    inv = tl.load(INV + row)
    t_inv = tl.load(T_INV + row)
    S = STATE + row
    z_max = tl.load(S + S_Z_MAX * state_stride)
    z_log = tl.log(tl.load(S + S_Z_SUM * state_stride))
    t_max = tl.load(S + S_T_MAX * state_stride)
    t_log = tl.log(tl.load(S + S_T_SUM * state_stride))
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [LANES, WIDTH]
    sum_t = tl.zeros([LANES], ACC)
    sum_p = tl.zeros([LANES], ACC)
    for first in tl.range(0, columns, BLOCK):
        cols = first + tile
        inside = cols < columns
        raw = tl.load(Z + row * z_stride + cols, mask=inside, other=_NEG_INF).to(ACC)
        z = tl.where(inside, _transform(raw, inv, SCALE, CAP, TEMP), _NEG_INF)
        t_raw = tl.load(T + row * t_stride + cols, mask=inside, other=_NEG_INF).to(ACC)
        t = tl.where(z == _NEG_INF, _NEG_INF, _transform(t_raw, t_inv, T_SCALE, T_CAP, T_TEMP))
        logp = z - z_max - z_log
        logt = t - t_max - t_log
        log_m = _log_mean(logp, logt, BETA)
        sum_t += tl.sum(tl.exp(logt) * _log_ratio(logt, log_m), 1)
        sum_p += tl.sum(tl.exp(logp) * _log_ratio(logp, log_m), 1)
    _add(S + S_JSD_T * state_stride, 1.0, sum_t)
    _add(S + S_JSD_P * state_stride, 1.0, sum_p)


@triton.jit(do_not_specialize=["coef_stride", "start"])
def grad_kernel(
    Z, z_stride, T, t_stride, OUT, out_stride, COEF, coef_stride, Y, INV, T_INV, IDS, IDS_GRAD, start, columns,
    HAS_T: tl.constexpr, MEAN: tl.constexpr, SQUARE: tl.constexpr, UNIFORM: tl.constexpr, OTHER: tl.constexpr,
    MIX: tl.constexpr, CROSS: tl.constexpr, JSD: tl.constexpr, K: tl.constexpr,
    ALPHA: tl.constexpr, ETA: tl.constexpr, BETA: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    TEMP: tl.constexpr, T_SCALE: tl.constexpr, T_CAP: tl.constexpr, T_TEMP: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write d loss / d raw of one row's block of columns."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = cols < columns
    R = COEF + row
    y = tl.load(Y + row) - start
    inv = tl.load(INV + row)

    raw = tl.load(Z + row * z_stride + cols, mask=inside, other=_NEG_INF).to(ACC)
    z = tl.where(inside, _transform(raw, inv, SCALE, CAP, TEMP), _NEG_INF)
    masked = z == _NEG_INF
    logp = z - tl.load(R + C_Z_MAX * coef_stride) - tl.load(R + C_Z_LOG * coef_stride)
    p = tl.exp(logp)
    at_label = cols == y
    a = tl.load(R + C_A * coef_stride)
    poly = tl.where(at_label, tl.load(R + C_A_LABEL * coef_stride), a)
    if MEAN:
        poly += tl.load(R + C_B * coef_stride) * _finite(z)
    if SQUARE:
        poly += tl.load(R + C_C * coef_stride) * p
    t = z
    if HAS_T:
        t_raw = tl.load(T + row * t_stride + cols, mask=inside, other=_NEG_INF).to(ACC)
        t = _transform(t_raw, tl.load(T_INV + row), T_SCALE, T_CAP, T_TEMP)
        t = tl.where(masked, _NEG_INF, t)
    if OTHER:
        poly += tl.load(R + C_E * coef_stride) * _finite(t)
    dz = p * poly
    if MIX:
        logq = _mix(z, t, ALPHA, ETA) - tl.load(R + C_M_MAX * coef_stride) - tl.load(R + C_M_LOG * coef_stride)
        dz += tl.load(R + C_D * coef_stride) * tl.exp(logq)
    if CROSS:
        logt = t - tl.load(R + C_T_MAX * coef_stride) - tl.load(R + C_T_LOG * coef_stride)
        dz += tl.load(R + C_F * coef_stride) * tl.exp(logt)
    if UNIFORM:
        dz += tl.load(R + C_U * coef_stride)
    if JSD:
        logt = t - tl.load(R + C_T_MAX * coef_stride) - tl.load(R + C_T_LOG * coef_stride)
        ratio = _log_ratio(logp, _log_mean(logp, logt, BETA))
        ratio -= tl.load(R + C_JSD_P * coef_stride)
        dz += tl.load(R + C_G * coef_stride) * p * ratio
    dz += tl.where(at_label, tl.load(R + C_LABEL * coef_stride), 0.0)
    for k in tl.range(0, K):
        column = tl.load(IDS + row * K + k)
        # padding, -1, is no column of any tile
        dz += tl.where(cols == column - start, tl.load(IDS_GRAD + row * K + k), 0.0)
    dz = tl.where(masked, 0.0, dz)
    if CAP != 0.0:
        dz = dz * _sech2(raw * SCALE / CAP)
    if TEMP:
        dz = dz * inv
    if SCALE != 1.0:
        dz = dz * SCALE
    tl.store(OUT + row * out_stride + cols, dz.to(OUT.dtype.element_ty), mask=inside)


def _acc(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def _width(tile: torch.Tensor) -> int:
    return min(BLOCK, max(1, 16 // tile.element_size()))  # one 128-bit load


def _transforms(spec: RowSpec) -> dict:
    return {
        "SCALE": spec.scale, "CAP": spec.softcap, "TEMP": spec.temperature,
        "T_SCALE": spec.teacher_scale, "T_CAP": spec.teacher_softcap, "T_TEMP": spec.teacher_temperature,
    }  # fmt: skip


def fold_flags(spec: RowSpec) -> dict:
    """Compile-time arguments of ``fold_kernel`` for a spec."""
    return {
        "HAS_T": spec.uses_teacher, "MEAN": spec.has("mean"), "SQUARE": spec.has("square"),
        "UNIFORM": spec.has("uniform"), "OTHER": spec.has("other"), "MIX": spec.folds_mix, "MIX_MEAN": spec.has("mix"),
        "FOLD_T": spec.folds_teacher, "CROSS": spec.has("cross"), "T_ENTROPY": spec.has("teacher_entropy"),
        "T_LABEL": spec.has("teacher_logp"), "HIT": spec.has("hit"),
        "ALPHA": spec.alpha, "ETA": spec.eta, **_transforms(spec),
    }  # fmt: skip


def reads_teacher(spec: RowSpec) -> bool:
    """Whether ``grad`` needs the teacher's logits; a constant such as teacher_logp does not."""
    return spec.mix_teacher or spec.has("cross", "other", "jsd")


def grad_flags(spec: RowSpec, ids: int) -> dict:
    """Compile-time arguments of ``grad_kernel`` for a spec and a number of ids a row."""
    return {
        "HAS_T": reads_teacher(spec), "MEAN": spec.has("mean"), "SQUARE": spec.has("square"),
        "UNIFORM": spec.has("uniform"), "OTHER": spec.has("other"), "MIX": spec.folds_mix,
        "CROSS": spec.has("cross"), "JSD": spec.has("jsd"), "K": ids,
        "ALPHA": spec.alpha, "ETA": spec.eta, "BETA": spec.beta, **_transforms(spec),
    }  # fmt: skip


def _vector(x, state):
    # a placeholder keeps the pointer's dtype, and so the compiled variant, the same
    return x if x is not None else state


def _unit(name: str, x: torch.Tensor) -> torch.Tensor:
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} must have unit stride along its last dimension; got strides {x.stride()}")
    return x


def fold(tile, teacher, state, target, spec: RowSpec, *, start=0, inv_temp=None, teacher_inv_temp=None):
    """Merge a tile's columns [start, start + V) into ``state`` (STATE_ROWS, N), in place."""
    rows, columns = tile.shape
    if rows == 0 or columns == 0:
        return
    t = teacher if spec.uses_teacher else tile
    with current(tile.device):
        fold_kernel[(rows,)](
            _unit("tile", tile), tile.stride(0), _unit("teacher", t), t.stride(0), _unit("state", state),
            state.stride(0), target, _vector(inv_temp, state), _vector(teacher_inv_temp, state), start, columns,
            **fold_flags(spec), ACC=_acc(state.dtype), BLOCK=BLOCK, WIDTH=_width(tile), num_warps=WARPS,
        )  # fmt: skip


def fold_jsd(tile, teacher, state, spec: RowSpec, *, inv_temp=None, teacher_inv_temp=None):
    """Second pass for the Jensen-Shannon sums, which need both log-sum-exps first."""
    rows, columns = tile.shape
    if rows == 0 or columns == 0:
        return
    with current(tile.device):
        jsd_kernel[(rows,)](
            _unit("tile", tile), tile.stride(0), _unit("teacher", teacher), teacher.stride(0), _unit("state", state),
            state.stride(0), _vector(inv_temp, state), _vector(teacher_inv_temp, state), columns,
            BETA=spec.beta, **_transforms(spec), ACC=_acc(state.dtype), BLOCK=BLOCK, WIDTH=_width(tile),
            num_warps=WARPS,
        )  # fmt: skip


def grad(
    tile, teacher, out, coef, target, spec: RowSpec, *, start=0, inv_temp=None, teacher_inv_temp=None,
    ids=None, ids_grad=None,
):  # fmt: skip
    """Write d loss / d raw logits of the tile into ``out`` (N, V), which may be ``tile`` itself."""
    rows, columns = tile.shape
    if rows == 0 or columns == 0:
        return
    t = teacher if reads_teacher(spec) else tile
    count = 0 if ids is None else ids.shape[1]
    with current(tile.device):
        grad_kernel[(rows, triton.cdiv(columns, BLOCK))](
            _unit("tile", tile), tile.stride(0), _unit("teacher", t), t.stride(0), _unit("out", out), out.stride(0),
            _unit("coef", coef), coef.stride(0), target, _vector(inv_temp, coef), _vector(teacher_inv_temp, coef),
            ids.contiguous() if count else target, ids_grad.contiguous() if count else coef, start, columns,
            **grad_flags(spec, count), ACC=_acc(coef.dtype), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
