"""Objectives that move the student towards a teacher's distribution T.  All need a teacher."""

from __future__ import annotations

import math

import torch

from .base import Objective, RowStats
from .qtarget import _KL_STATS, _forward_kl, _range


def kd(temperature: float = 1.0) -> Objective:
    """Knowledge distillation: tau^2 KL(T^tau | p^tau) (arXiv 1503.02531).

    Both sides are divided by ``temperature``.  Gauge: w = tau, gamma = 0, r = T^tau.
    """
    _range("kd", "temperature", temperature, 0.0, math.inf, open_low=True)
    return Objective(
        "kd", lambda s: temperature**2 * _forward_kl(s), _KL_STATS, temperature=temperature,
        weight="tau", trust="0", residual="T^tau", paper="arXiv 1503.02531", params={"temperature": temperature},
    )  # fmt: skip


def kd_hybrid(lam: float = 0.5) -> Objective:
    """(1 - lam)(-log p_y) + lam KL(T | p) (arXiv 1503.02531).  Gauge: w = 1, gamma = 1 - lam, r = T."""
    _range("kd_hybrid", "lam", lam, 0.0, 1.0)
    return Objective(
        "kd_hybrid", lambda s: -(1 - lam) * s.logp + lam * _forward_kl(s), ("logp", *_KL_STATS),
        weight="1", trust="1 - lam", residual="T", paper="arXiv 1503.02531", params={"lam": lam},
    )  # fmt: skip


def chain_distillation(share: float = 0.45, temperature: float = 1.2) -> Objective:
    """(1 - a)(-log p_y) + a T^2 KL(T^T | p^T), the loss of a chain of snapshots (q0, arXiv 2606.03938).

    The label term is at temperature 1, the divergence at ``temperature`` T on both sides, in one pass: the student's
    second log-sum-exp is ``mix_lse``.  ``share`` is a.  The teacher is the preceding snapshot; logits are those after
    each side's softcap: give ``linear_loss`` the student's and ``Teacher`` the teacher's.  Defaults are the authors'.
    dL/dz = (1 - a)(p - delta) + a T (p^T - T^T).  ``share`` 0 is ``nll`` and reads no teacher.
    """
    _range("chain_distillation", "share", share, 0.0, 1.0)
    _range("chain_distillation", "temperature", temperature, 0.0, math.inf, open_low=True)
    stats: tuple[str, ...] = ("logp", "mix_lse", "cross", "teacher_entropy")

    def fn(s: RowStats) -> torch.Tensor:
        divergence = s.mix_lse - s.cross / temperature - s.teacher_entropy
        return -(1 - share) * s.logp + share * temperature**2 * divergence

    options: dict = {"alpha": 1.0 / temperature, "teacher_temperature": temperature}
    if share == 0.0:
        fn, stats, options = (lambda s: -s.logp), ("logp",), {}
    return Objective(
        "chain_distillation", fn, stats, weight="1", trust="1 - a", residual="p - T (p^T - T^T), signed",
        paper="arXiv 2606.03938", params={"share": share, "temperature": temperature}, **options,
    )  # fmt: skip


def reverse_kl() -> Objective:
    """KL(p | T) = E_p[log p - log T] (MiniLLM, arXiv 2306.08543).

    dL/dz_k = p_k (r_k - E_p[r]), r = log(p / T).  A token that the teacher masks (-inf) is outside
    the divergence's support and adds nothing; give a top-K teacher a tail that is not zero.
    """
    return Objective(
        "reverse_kl", lambda s: s.mean - s.lse - s.other + s.teacher_lse, ("mean", "lse", "other", "teacher_lse"),
        weight="1", trust="0", residual="p (1 - r + E_p[r]), signed", paper="arXiv 2306.08543",
    )  # fmt: skip


def jsd(beta: float = 0.5) -> Objective:
    """Generalised Jensen-Shannon: beta KL(T | M) + (1 - beta) KL(p | M), M = beta T + (1 - beta) p.

    The form of GKD (arXiv 2306.13649).  beta = 0 is KL(T | p) and beta = 1 is KL(p | T) by the
    libraries' convention; the limits of the formula itself are 0, so there is a jump at both ends.
    """
    _range("jsd", "beta", beta, 0.0, 1.0)
    about: dict = {"paper": "arXiv 2306.13649", "params": {"beta": beta}, "weight": "1", "trust": "0"}
    if beta == 0.0:
        return Objective("jsd", _forward_kl, _KL_STATS, residual="T", **about)
    if beta == 1.0:
        return Objective("jsd", reverse_kl().fn, ("mean", "lse", "other", "teacher_lse"), residual="signed", **about)
    return Objective("jsd", lambda s: s.jsd, ("jsd",), beta=beta, residual="signed", **about)


def on_policy_distillation() -> Objective:
    """-A_y log p_y with A_y = sg[log T_y - log p_y] on tokens sampled from the student.

    In expectation over y ~ p its gradient is that of ``reverse_kl``.  Reads only the teacher's
    log-probability of the label.
    """
    return Objective(
        "on_policy_distillation", lambda s: -(s.teacher_logp - s.logp.detach()) * s.logp, ("logp", "teacher_logp"),
        weight="A_y", trust="1", residual="-", paper="arXiv 2306.13649",
    )  # fmt: skip
