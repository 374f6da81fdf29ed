"""The torch twin of the row kernels: any device, any floating dtype.

Works through the tile in blocks of rows small enough for a core's cache, so that the several
passes torch needs over a row cost one pass over memory, and scratch stays a few MiB whatever the
tile.  See ``contract`` for the mathematics and the layout of state and coefficients.
"""

from __future__ import annotations

import math

import torch

from .contract import COEF_INDEX as C
from .contract import MASKED, RowSpec
from .contract import STATE_INDEX as S

#: Bytes of one block of rows in the accumulator dtype; about the size of a core's share of L2/L3.
BLOCK_BYTES = 2 << 20
#: Upper bound on the block-sized temporaries alive at once, for the memory formula of the ops.
BLOCK_TEMPORARIES = 8


def scratch_bytes(columns: int, itemsize: int) -> int:
    """Upper bound on the scratch of one ``fold`` or ``grad`` on a tile with this many columns."""
    return BLOCK_TEMPORARIES * max(BLOCK_BYTES, columns * itemsize)


def _blocks(rows: int, columns: int, itemsize: int):
    if columns == 0:
        return  # nothing to fold or to write
    step = max(1, BLOCK_BYTES // max(1, columns * itemsize))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def row_blocks(tile):
    """Slices of rows whose block of ``tile`` fits the cache."""
    return _blocks(tile.shape[0], tile.shape[1], tile.element_size())


def transform(raw, dtype, scale, softcap, inv_temp):
    """raw (n, V) -> transformed logits in ``dtype`` and tanh (or None). Never writes ``raw``."""
    x = raw.to(dtype)
    tanh = None
    if scale != 1.0:
        x = x * scale
    if softcap:
        tanh = (x / softcap).tanh_()
        x = tanh * softcap
    if inv_temp is not None:
        x = x * inv_temp[:, None]
    return x, tanh


def _mask_teacher(z, t):
    """T lives on the student's support: t = -inf wherever z = -inf."""
    masked = z == float("-inf")
    # looking first saves a pass on the CPU; on a device it would be a sync
    return t if t.device.type == "cpu" and not bool(masked.any()) else t.masked_fill(masked, float("-inf"))


def _finite(x):
    """-inf -> 0, for products in which the other factor is exactly zero there."""
    return x.masked_fill(x == float("-inf"), 0.0)


def _mix(z, t, spec):
    """alpha z + eta t (n, V), a new tensor."""
    if spec.alpha <= 0.0:  # 0 * -inf is NaN and -1 * -inf is +inf: masked entries are put back by hand
        m = _finite(z) * spec.alpha
        m = m.add_(t, alpha=spec.eta) if spec.eta else m
        return m.masked_fill_(z == float("-inf"), float("-inf"))
    m = z * spec.alpha
    return m.add_(t, alpha=spec.eta) if spec.eta else m


def _online(x, old_max, payloads, olds):
    """One online-softmax step. x (n, V); payload None stands for 1. Returns new max and sums."""
    new_max = torch.maximum(old_max, x.amax(1))
    safe = new_max.masked_fill(new_max == float("-inf"), 0.0)
    e = (x - safe[:, None]).exp_()
    decay = (old_max - safe).exp()
    sums = []
    for payload, old in zip(payloads, olds, strict=True):
        if payload is None:
            part = e.sum(1)
        elif payload is _SQUARE:
            sums.append(old * decay.square() + torch.linalg.vecdot(e, e))
            continue
        else:
            part = torch.linalg.vecdot(e, payload)
        sums.append(old * decay + part)
    return new_max, sums


_SQUARE = object()


def fold(tile, teacher, state, target, spec: RowSpec, *, start=0, inv_temp=None, teacher_inv_temp=None):
    """Merge a tile's columns [start, start + V) into ``state`` (STATE_ROWS, N), in place.

    tile, teacher (N, V) raw logits; target (N,) int64 over the whole vocabulary; inv_temp (N,).
    """
    rows, columns = tile.shape
    dtype = state.dtype
    for block in _blocks(rows, columns, state.element_size()):
        s, y = state[:, block], target[block] - start
        z, _ = transform(tile[block], dtype, spec.scale, spec.softcap, inv_temp[block] if spec.temperature else None)
        inside = (y >= 0) & (y < columns)
        at = y.clamp(0, columns - 1)[:, None]
        picked = z.gather(1, at)[:, 0]
        s[S["z_label"]] = torch.where(inside, picked, s[S["z_label"]])
        if spec.has("hit"):
            # argmax of this tile beats the state only if strictly larger: lowest index on ties
            top, index = z.max(1)
            hit = (index == y).to(dtype)
            s[S["argmax"]] = torch.where(top > s[S["z_max"]], hit, s[S["argmax"]])
        t = None
        if spec.uses_teacher:
            t, _ = transform(
                teacher[block], dtype, spec.teacher_scale, spec.teacher_softcap,
                teacher_inv_temp[block] if spec.teacher_temperature else None,
            )  # fmt: skip
            t = _mask_teacher(z, t)
            if spec.has("teacher_logp"):
                s[S["t_label"]] = torch.where(inside, t.gather(1, at)[:, 0], s[S["t_label"]])

        zf = _finite(z) if spec.has("mean", "uniform", "mix", "cross") else None
        sums: dict[str, object] = {"z_sum": None}
        if spec.has("mean"):
            sums["z_exp"] = zf
        if spec.has("square"):
            sums["p_square"] = _SQUARE
        if spec.has("other"):
            sums["t_exp"] = _finite(t)
        _merge(s, "z_max", sums, z)
        if zf is not None and spec.has("uniform"):
            s[S["z_total"]] += zf.sum(1)
            s[S["z_count"]] += (z != float("-inf")).sum(1).to(dtype)
        if spec.folds_mix:
            sums = {"m_sum": None}
            if spec.has("mix"):
                sums["m_exp"] = zf
            _merge(s, "m_max", sums, _mix(z, t, spec))
        if spec.folds_teacher:
            sums = {"t_sum": None}
            if spec.has("cross"):
                sums["t_z"] = zf
            if spec.has("teacher_entropy"):
                sums["t_t"] = _finite(t)
            _merge(s, "t_max", sums, t)


def _merge(s, max_name, sums, x):
    """Fold x (n, V) into the running maximum and the sums e^x times payload; None stands for 1."""
    new_max, values = _online(x, s[S[max_name]], sums.values(), [s[S[n]] for n in sums])
    s[S[max_name]] = new_max
    for name, value in zip(sums, values, strict=True):
        s[S[name]] = value


_NORMS = ("z_max", "z_log", "t_max", "t_log")


def _log_ratio(z, t, beta, z_max, z_log, t_max, t_log):
    """log p, log T and log M with M = beta T + (1 - beta) p, each (n, V)."""
    logp, logt = z - z_max[:, None] - z_log[:, None], t - t_max[:, None] - t_log[:, None]
    log_beta = math.log(beta) if beta > 0.0 else -math.inf
    log_rest = math.log1p(-beta) if beta < 1.0 else -math.inf
    return logp, logt, torch.logaddexp(logt + log_beta, logp + log_rest)


def _minus(logx, logm):
    """log x - log M, and 0 where it only meets a zero factor."""
    return (logx - logm).nan_to_num_(0.0, posinf=0.0, neginf=0.0)


def fold_jsd(tile, teacher, state, spec: RowSpec, *, inv_temp=None, teacher_inv_temp=None):
    """Second pass for the Jensen-Shannon sums, which need both log-sum-exps first."""
    rows, columns = tile.shape
    norms = [state[S["z_max"]], state[S["z_sum"]].log(), state[S["t_max"]], state[S["t_sum"]].log()]
    for block in _blocks(rows, columns, state.element_size()):
        z, t, _ = _pair(tile, teacher, block, state.dtype, spec, inv_temp, teacher_inv_temp)
        logp, logt, logm = _log_ratio(z, t, spec.beta, *(norm[block] for norm in norms))
        state[S["jsd_t"], block] += torch.linalg.vecdot(logt.exp(), _minus(logt, logm))
        state[S["jsd_p"], block] += torch.linalg.vecdot(logp.exp(), _minus(logp, logm))


def _pair(tile, teacher, block, dtype, spec, inv_temp, teacher_inv_temp):
    z, tanh = transform(tile[block], dtype, spec.scale, spec.softcap, inv_temp[block] if spec.temperature else None)
    t = None
    if spec.uses_teacher:
        t, _ = transform(
            teacher[block], dtype, spec.teacher_scale, spec.teacher_softcap,
            teacher_inv_temp[block] if spec.teacher_temperature else None,
        )  # fmt: skip
        t = _mask_teacher(z, t)
    return z, t, tanh


def grad(
    tile, teacher, out, coef, target, spec: RowSpec, *, start=0, inv_temp=None, teacher_inv_temp=None,
    ids=None, ids_grad=None,
):  # fmt: skip
    """Write d loss / d raw logits of the tile into ``out`` (N, V), which may be ``tile`` itself.

    coef (COEF_ROWS, N) from ``contract.coefficients``; ids, ids_grad (N, K) add at given columns.
    """
    rows, columns = tile.shape
    used = _used(spec)
    for block in _blocks(rows, columns, coef.element_size()):
        k = coef[:, block]

        def col(name, k=k):
            return k[C[name]][:, None]

        z, t, tanh = _pair(tile, teacher, block, coef.dtype, spec, inv_temp, teacher_inv_temp)
        y = target[block] - start
        inside = (y >= 0) & (y < columns)
        at = y.clamp(0, columns - 1)[:, None]
        p = (z - col("z_max")).sub_(col("z_log")).exp_()
        a_label = torch.where(inside, k[C["a_label"]], k[C["a"]])[:, None]  # replaces a at k = y, if y is here
        p_label = p.gather(1, at)
        if used["b"] or used["c"] or used["e"]:
            # a copy even for one column, where expand().contiguous() would be coef itself
            poly = torch.empty_like(p).copy_(col("a")).scatter_(1, at, a_label)
            if used["b"]:
                poly.addcmul_(_finite(z), col("b"))
            if used["c"]:
                poly.addcmul_(p, col("c"))
            if used["e"]:
                poly.addcmul_(_finite(t), col("e"))
            dz = poly.mul_(p)
        else:
            dz = p.mul_(col("a")).scatter_(1, at, p_label * a_label)
        if used["d"]:
            dz.addcmul_(_mix(z, t, spec).sub_(col("m_max")).sub_(col("m_log")).exp_(), col("d"))
        if used["f"]:
            dz.addcmul_((t - col("t_max")).sub_(col("t_log")).exp_(), col("f"))
        if used["u"]:
            dz.add_(col("u"))
        if used["g"]:
            logp, _, logm = _log_ratio(z, t, spec.beta, *(k[C[n]] for n in _NORMS))
            ratio = _minus(logp, logm).sub_(col("jsd_p"))
            dz.addcmul_(ratio.mul_(logp.exp_()), col("g"))
        dz.scatter_add_(1, at, torch.where(inside, k[C["label"]], 0.0)[:, None])
        if ids is not None:
            local = ids[block] - start
            ok = (local >= 0) & (local < columns) & (ids[block] >= 0)
            dz.scatter_add_(1, local.clamp(0, columns - 1), torch.where(ok, ids_grad[block], 0.0))
        dz.masked_fill_(z == float("-inf"), 0.0)
        if tanh is not None:
            dz.mul_(tanh.square_().neg_().add_(1.0))
        if spec.temperature:
            dz.mul_(inv_temp[block][:, None])
        if spec.scale != 1.0:
            dz.mul_(spec.scale)
        out[block] = dz


def _used(spec):
    """Which terms this launch needs, from the statistics alone (never from values: no sync)."""
    return {
        "b": spec.has("mean"),
        "c": spec.has("square"),
        "e": spec.has("other"),
        "d": spec.folds_mix,
        "f": spec.has("cross"),
        "u": spec.has("uniform"),
        "g": spec.has("jsd"),
    }


def gather_ids(tile, ids, spec: RowSpec, *, start=0, inv_temp=None, dtype=torch.float32):
    """Transformed logits at ids (N, K); NaN where an id lies outside the tile (or is -1), -1e30 where masked."""
    columns = tile.shape[1]
    if columns == 0:
        return torch.full(ids.shape, float("nan"), dtype=dtype, device=tile.device)
    local = ids - start
    ok = (local >= 0) & (local < columns) & (ids >= 0)
    picked = tile.gather(1, local.clamp(0, columns - 1))
    z, _ = transform(picked, dtype, spec.scale, spec.softcap, inv_temp if spec.temperature else None)
    return z.masked_fill(z == float("-inf"), MASKED).masked_fill(~ok, float("nan"))
