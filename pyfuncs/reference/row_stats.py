"""Row statistics and losses by definition; see ``kernels/contract.py`` for the table."""

from __future__ import annotations

from types import SimpleNamespace

import torch

_INF = float("inf")


def transform(raw, *, scale=1.0, softcap=None, temperature=1.0):
    """raw -> scale -> softcap -> temperature.  temperature is a number or (N,)."""
    x = raw * scale
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    t = torch.as_tensor(temperature, dtype=x.dtype, device=x.device)
    return x / (t[:, None] if t.ndim else t)


def row_stats(z, target, *, teacher=None, alpha=1.0, eta=0.0, beta=0.5, top_k=2, ids=None):
    """Every statistic of ``objectives.RowStats`` by its definition, as a dict; z, teacher (N, V)."""
    keep = z != -_INF  # masked entries leave both distributions
    zf = torch.where(keep, z, 0.0)
    lse = torch.logsumexp(z, 1)
    p = torch.where(keep, (z - lse[:, None]).exp(), 0.0)
    inside = (target >= 0) & (target < z.shape[1])
    at = torch.where(inside, target, 0)[:, None]
    low = max(-1e30, torch.finfo(z.dtype).min)
    label = zf.gather(1, at)[:, 0].masked_fill(~keep.gather(1, at)[:, 0], low)
    label = label.masked_fill(~inside, float("nan"))
    out = {
        "lse": lse,
        "label": label,
        "logp": label - lse,
        "mean": (p * zf).sum(1),
        "square": p.square().sum(1),
        "uniform": zf.sum(1) / keep.sum(1),
        "hit": (z.argmax(1) == target).to(z.dtype),
    }
    top = z.detach().topk(min(top_k, z.shape[1]), 1).values.log_softmax(1)
    out["top_entropy"] = -(top.exp() * torch.where(top == -_INF, 0.0, top)).sum(1)
    if ids is not None:
        out["ids"] = torch.where(keep, z, low).gather(1, ids.clamp(min=0)).masked_fill(ids < 0, float("nan"))
    m = alpha * zf
    if teacher is not None:
        t = torch.where(keep, teacher, -_INF)
        m = m + eta * t if eta else m
        tf = torch.where(t == -_INF, 0.0, t)
        t_lse = torch.logsumexp(t, 1)
        logt = t - t_lse[:, None]
        big_t = logt.exp()
        t_label = t.gather(1, at)[:, 0]
        out |= {
            "cross": (big_t * zf).sum(1),
            "other": (p * tf).sum(1),
            "teacher_lse": t_lse,
            "teacher_logp": t_label.masked_fill(t_label == -_INF, low) - t_lse,
            "teacher_entropy": t_lse - (big_t * tf).sum(1),
        }
        mid = beta * big_t + (1 - beta) * p
        safe = torch.where(mid > 0, mid, 1.0).log()
        sum_t = (big_t * torch.where(big_t > 0, torch.where(big_t > 0, logt, 0.0) - safe, 0.0)).sum(1)
        sum_p = (p * torch.where(p > 0, zf - lse[:, None] - safe, 0.0)).sum(1)
        out["jsd"] = beta * sum_t + (1 - beta) * sum_p
    m = torch.where(keep, m, -_INF)
    out["mix"] = (m.softmax(1).detach() * zf).sum(1)
    out["mix_lse"] = torch.logsumexp(m, 1)
    return out


def row_loss(
    logits, target, objective, *, teacher=None, ids=None, token_weight=None, sequences=None, inputs=None,
    ignore_index=-100, scale=1.0, softcap=None, temperature=1.0, teacher_scale=1.0, teacher_softcap=None,
    teacher_temperature=1.0,
):  # fmt: skip
    """Per-token losses (N,) of any objective, differentiable in ``logits`` by autograd."""
    tau = objective.temperature
    z = transform(logits, scale=scale, softcap=softcap, temperature=temperature) / tau
    t = None
    if teacher is not None:
        t = transform(
            teacher[:, : z.shape[1]], scale=teacher_scale, softcap=teacher_softcap, temperature=teacher_temperature
        ) / (tau * objective.teacher_temperature)  # fmt: skip
    valid = target != ignore_index
    o = objective
    stats = row_stats(
        z, torch.where(valid, target, 0), teacher=t, alpha=o.alpha, eta=o.eta, beta=o.beta,
        top_k=max(o.top_k, 2), ids=ids,
    )  # fmt: skip
    for name in ("top_entropy", "teacher_lse", "teacher_logp", "teacher_entropy", "hit"):
        if name in stats:
            stats[name] = stats[name].detach()
    stats["entropy"] = stats["lse"] - stats["mean"]
    stats["prob"] = stats["logp"].exp()
    if ids is not None:
        stats["ids_logp"] = stats["ids"] - stats["lse"][:, None]
    given = dict.fromkeys(o.optional) | (inputs or {})
    counted = valid if token_weight is None else valid & (token_weight != 0)
    s = SimpleNamespace(**stats, **given, valid=counted, sequence=sequences, weight=None)
    if o.couple is not None:
        rows = torch.where(counted)[0]
        # only rows that count are coupled
        part = {k: v[rows].detach() for k, v in stats.items()}
        part |= {k: None if v is None else v[rows] for k, v in given.items()}
        w = torch.zeros_like(stats["lse"])
        sequence = None if sequences is None else sequences[rows]
        kept = SimpleNamespace(**part, valid=valid[rows], sequence=sequence, weight=None)
        w[rows] = o.couple(kept).to(w.dtype)
        s.weight = w
    loss = torch.where(valid, o.fn(s), 0.0)
    return loss if token_weight is None else torch.where(token_weight == 0, 0.0, loss * token_weight)
