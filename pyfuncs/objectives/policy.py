"""Policy-gradient objectives: an advantage times a function of log p_y, of now and of when the tokens were sampled.

What comes with the data is given as ``inputs``, each of the labels' shape, or for (B, T) labels (B,) or (B, 1), one
number a sequence:

==================  ==============================================================================================
``advantages``      A, in the reward's units or without unit where it was divided by a deviation
``old_logp``        log p_old(y), nats, of the policy the ratio r = p_y / p_old(y) refers to.  Left out: the policy
                    itself, so r = 1 (with its gradient), as in the first update after sampling
``correction``      multiplies the surrogate, not the divergence: the importance weight of a sampler that is not the
                    old policy (TRL's ``importance_sampling_ratio``, verl's ``rollout_is_weights``), or a mask
``ref_logp``        log p_ref(y), nats; needed where beta > 0
``entropy_weight``  multiplies the coefficient of the entropy, row by row
==================  ==============================================================================================

Arguments that most of them share:

* ``beta``: coefficient of the divergence from the reference; 0 leaves it out.
* ``kl``: its estimator, with d = log p_y - log p_ref(y): "k1" d, "k2" d^2 / 2, "k3" e^-d - 1 + d
  (http://joschu.net/blog/kl-approx.html).
* ``correct_kl``: the divergence times the ratio r, whose gradient counts (DeepSeek-V3.2, arXiv 2512.02556; TRL's
  ``use_bias_correction_kl``).
* ``entropy``: coefficient of the entropy bonus, -entropy H(p); differentiable.
* ``level``: "token", or "sequence": r is the geometric mean of the sequence's token ratios, and its gradient reaches
  all of them (TRL's ``importance_sampling_level``).
* ``aggregate``: what the mean is taken over, see ``aggregate``; everything above goes through it.

Logarithms of ratios, and d, are held within 20 nats, beyond which their gradient is 0: an infinite ratio times an
advantage of 0 would be NaN.  Losses are those to minimise.  Where a sequence's tokens are coupled the objective is
``joint``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .aggregate import over_sequences
from .base import Objective, RowStats
from .qtarget import _range

#: (statistics and inputs, r (N,)) -> the loss without divergence and entropy (N,).
Surrogate = Callable[[RowStats, torch.Tensor], torch.Tensor]
#: Nats beyond which a ratio is held.
_LIMIT = 20.0
_KL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    # e^-d - 1 + d without the cancellation near 0
    "k3": lambda d: torch.expm1(-d) + d,
}


def _log_ratio(s: RowStats) -> torch.Tensor:
    return s.logp - (s.logp.detach() if s.old_logp is None else s.old_logp)


def _pooled(values: torch.Tensor, s: RowStats, mean: bool = True) -> torch.Tensor:
    return over_sequences(values, s.valid, s.sequence, mean=mean)


def _ratio(s: RowStats, level: str) -> torch.Tensor:
    """r of each row: its own ("token"), or its sequence's geometric mean ("sequence") or product ("product")."""
    d = _log_ratio(s)
    if level != "token":
        d = _pooled(d, s, mean=level == "sequence")
    return d.clamp(-_LIMIT, _LIMIT).exp()


def _policy(
    name: str, params: dict[str, Any], surrogate: Surrogate, *, weight: str, paper: str, level: str | None = "token",
    length: float | None = None, pooled_correction: bool = False,
) -> Objective:  # fmt: skip
    """An objective of its surrogate and of the shared arguments in ``params``.

    ``level`` None: no ratio is read.  ``length`` divides every token's loss.
    """
    beta, kl, entropy = params["beta"], params["kl"], params["entropy"]
    correct_kl = params.get("correct_kl", False)
    _range(name, "beta", beta, 0.0, math.inf)
    _range(name, "entropy", entropy, -math.inf, math.inf)
    if kl not in _KL:
        raise ValueError(f"{name}: kl must be one of {', '.join(_KL)}; got {kl!r}")
    joint = level not in (None, "token") or pooled_correction

    def fn(s: RowStats) -> torch.Tensor:
        ratio = torch.ones_like(s.logp) if level is None else _ratio(s, level)
        loss = surrogate(s, ratio)
        if s.correction is not None:
            loss = loss * (_pooled(s.correction.log(), s).exp() if pooled_correction else s.correction)
        if beta:
            distance = _KL[kl]((s.logp - s.ref_logp).clamp(-_LIMIT, _LIMIT))
            loss = loss + beta * (distance * ratio if correct_kl else distance)
        if entropy:
            bonus = entropy * s.entropy
            loss = loss - (bonus if s.entropy_weight is None else bonus * s.entropy_weight)
        return loss if length is None else loss / length

    return Objective(
        name, fn, ("logp", "entropy") if entropy else ("logp",), aggregate=params["aggregate"], joint=joint,
        needs=frozenset({"sequences"} if joint else ()),
        inputs=("advantages", "ref_logp") if beta else ("advantages",),
        optional=(*(() if level is None else ("old_logp",)), "correction", *(("entropy_weight",) if entropy else ())),
        weight=weight, trust="1", residual="-", paper=paper, params=params,
    )  # fmt: skip


def _clipped(name: str, low: float, high: float | None, delta: float | None = None, dual: float | None = None):
    """-min(min(r, delta) A, clip(r, 1 - low, 1 + high) A), and at most dual |A| where A < 0."""
    high = low if high is None else high
    _range(name, "low", low, 0.0, 1.0)
    _range(name, "high", high, 0.0, math.inf)
    for argument, value in (("delta", delta), ("dual", dual)):
        if value is not None:
            _range(name, argument, value, 1.0, math.inf, open_low=True)

    def surrogate(s: RowStats, ratio: torch.Tensor) -> torch.Tensor:
        a = s.advantages
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.min(bounded * a, ratio.clamp(1.0 - low, 1.0 + high) * a)
        return loss if dual is None else torch.where(a < 0, torch.min(loss, -dual * a), loss)

    return surrogate


def _level(name: str, level: str) -> str:
    if level not in ("token", "sequence"):
        raise ValueError(f"{name}: level must be 'token' or 'sequence'; got {level!r}")
    return level


def weighted_nll(aggregate: str = "token_mean") -> Objective:
    """-w_t log p_y with weights that come with the data, as ``token_weight``: one a token, or (B,), one a sequence.

    The denominator is that of ``aggregate`` and has no weights in it: over a batch of K rollouts of each prompt whose
    weights sum to K, as DRIFT's do (arXiv 2605.31455, Eqs. 13 to 15: aggregate "sequence_mean_token_sum"), it is their
    sum.  For a mean over the weights give ``num_items=weights.sum()``.  Rows of weight 0 are not projected.
    Gauge: w = w_t, gamma = 1.
    """
    return Objective(
        "weighted_nll", lambda s: -s.logp, ("logp",), needs=frozenset({"token_weight"}), aggregate=aggregate,
        weight="w_t", trust="1", residual="-", paper="arXiv 2605.31455", params={"aggregate": aggregate},
    )  # fmt: skip


def reinforce(*, beta: float = 0.0, kl: str = "k3", entropy: float = 0.0, aggregate: str = "token_mean") -> Objective:
    """-A log p_y: REINFORCE (Williams 1992), whatever baseline is in A; verl's "gpg".

    Its gradient is that of every clipped objective below at r = 1; the value is not.
    """
    return _policy(
        "reinforce", dict(locals()), lambda s, _: -s.advantages * s.logp, weight="A", paper="Williams 1992", level=None
    )


def grpo(
    low: float = 0.2, high: float | None = None, delta: float | None = None, level: str = "token", *, beta: float = 0.0,
    kl: str = "k3", correct_kl: bool = True, entropy: float = 0.0, aggregate: str = "sequence_mean_token_mean",
) -> Objective:  # fmt: skip
    """-min(r A, clip(r, 1 - low, 1 + high) A), a mean over each sequence, then over these (arXiv 2402.03300, Eq. 3).

    ``high`` None: ``low``.  ``delta`` > 1 bounds r in the first term too (two-sided clipping, arXiv 2505.07291), which
    acts where A < 0.  TRL's loss_type "grpo"; the paper's own divergence has ``correct_kl=False``.
    """
    params = dict(locals())
    return _policy(
        "grpo", params, _clipped("grpo", low, high, delta), level=_level("grpo", level), weight="r A, 0 where clipped",
        paper="arXiv 2402.03300",
    )  # fmt: skip


def dr_grpo(
    length: float, low: float = 0.2, high: float | None = None, delta: float | None = None, level: str = "token", *,
    beta: float = 0.0, kl: str = "k3", correct_kl: bool = True, entropy: float = 0.0,
    aggregate: str = "sequence_mean_token_sum",
) -> Objective:  # fmt: skip
    """GRPO's surrogate summed over a sequence and divided by a constant ``length``, tokens (arXiv 2503.20783).

    TRL's loss_type "dr_grpo" with ``length`` = max_completion_length, verl's "seq-mean-token-sum-norm" with
    loss_scale_factor = ``length``.  Other arguments as ``grpo``.
    """
    params = dict(locals())
    _range("dr_grpo", "length", length, 0.0, math.inf, open_low=True)
    return _policy(
        "dr_grpo", params, _clipped("dr_grpo", low, high, delta), level=_level("dr_grpo", level), length=length,
        weight="r A / length, 0 where clipped", paper="arXiv 2503.20783",
    )  # fmt: skip


def dapo(
    low: float = 0.2, high: float | None = 0.28, delta: float | None = None, level: str = "token", *,
    beta: float = 0.0, kl: str = "k3", correct_kl: bool = True, entropy: float = 0.0, aggregate: str = "token_mean",
) -> Objective:  # fmt: skip
    """GRPO's surrogate, a mean over all tokens, clipped higher above (arXiv 2503.14476, Eq. 8).

    The tokens are those of the whole batch, over micro-batches and ranks: give ``num_items=count_items(...)``.  TRL's
    loss_type "dapo", whose epsilon_high is its epsilon unless set: ``high=None``.  Other arguments as ``grpo``.
    """
    params = dict(locals())
    return _policy(
        "dapo", params, _clipped("dapo", low, high, delta), level=_level("dapo", level), weight="r A, 0 where clipped",
        paper="arXiv 2503.14476",
    )  # fmt: skip


def bnpo(
    low: float = 0.2, high: float | None = None, delta: float | None = None, level: str = "token", *,
    beta: float = 0.0, kl: str = "k3", correct_kl: bool = True, entropy: float = 0.0, aggregate: str = "token_mean",
) -> Objective:  # fmt: skip
    """GRPO's surrogate, a mean over the tokens of the call's own batch: TRL's loss_type "bnpo".

    The same as ``dapo`` but for the denominator one gives: none, so that a split of the batch changes the gradient.
    Other arguments as ``grpo``.
    """
    params = dict(locals())
    return _policy(
        "bnpo", params, _clipped("bnpo", low, high, delta), level=_level("bnpo", level), weight="r A, 0 where clipped",
        paper="TRL",
    )  # fmt: skip


def ppo_clip(
    low: float = 0.2, high: float | None = None, dual: float | None = 3.0, *, beta: float = 0.0, kl: str = "k3",
    entropy: float = 0.0, aggregate: str = "token_mean",
) -> Objective:  # fmt: skip
    """PPO's clipped surrogate (arXiv 1707.06347, Eq. 7) with the dual clip of arXiv 1912.09729: verl's "vanilla".

    Where A < 0 the loss is at most ``dual`` |A|, so that r > dual has no gradient; None leaves that out.  With
    dual >= 1 + high it is ``delta`` of ``grpo``.
    """
    return _policy(
        "ppo_clip", dict(locals()), _clipped("ppo_clip", low, high, dual=dual), weight="r A, 0 where clipped",
        paper="arXiv 1707.06347, 1912.09729",
    )  # fmt: skip


def rloo(
    low: float = 0.2, high: float | None = None, *, beta: float = 0.0, kl: str = "k3", entropy: float = 0.0,
    aggregate: str = "sequence_mean_token_mean",
) -> Objective:  # fmt: skip
    """-min(R A, clip(R, 1 - low, 1 + high) A), R the product of a sequence's ratios (arXiv 2402.14740).

    TRL's RLOOTrainer.  A is the leave-one-out advantage, its divergence already in the reward.  Each token has the loss
    of its sequence, which the default aggregate therefore takes once.
    """
    return _policy(
        "rloo", dict(locals()), _clipped("rloo", low, high), level="product", weight="R A, 0 where clipped",
        paper="arXiv 2402.14740",
    )  # fmt: skip


def gspo(
    low: float = 3e-4, high: float | None = 4e-4, delta: float | None = None, *, beta: float = 0.0, kl: str = "k3",
    correct_kl: bool = True, entropy: float = 0.0, aggregate: str = "sequence_mean_token_mean",
) -> Objective:  # fmt: skip
    """GRPO's surrogate with one ratio a sequence, the geometric mean of its tokens' (arXiv 2507.18071, Eqs. 5 and 7).

    TRL's importance_sampling_level "sequence" with loss_type "grpo"; verl's "gspo", where A is one number a sequence;
    with ``aggregate`` "sequence_mean_token_sum" TRL's "luspo".  Clip ranges are the paper's.
    """
    params = dict(locals())
    return _policy(
        "gspo", params, _clipped("gspo", low, high, delta), level="sequence", weight="r_seq A, 0 where clipped",
        paper="arXiv 2507.18071",
    )  # fmt: skip


def gmpo(
    low: float = 0.4, high: float | None = None, *, beta: float = 0.0, kl: str = "k3", entropy: float = 0.0,
    aggregate: str = "sequence_mean_token_mean",
) -> Objective:  # fmt: skip
    """-A (prod_t r_t)^(1 / n), each log r_t clipped first (arXiv 2507.20673): verl's "geo_mean".

    log r_t is held at most ``high`` where A > 0 and at least -``low`` where A < 0, nats; the paper's are e^-0.4, e^0.4.
    A is averaged over a sequence where it differs between tokens, ``correction`` by its geometric mean.
    """
    params = dict(locals())
    high = low if high is None else high
    _range("gmpo", "low", low, 0.0, math.inf)
    _range("gmpo", "high", high, 0.0, math.inf)

    def surrogate(s: RowStats, _: torch.Tensor) -> torch.Tensor:
        d = _log_ratio(s)
        d = torch.where(s.advantages > 0, d.clamp(max=high), d.clamp(min=-low))
        return -_pooled(s.advantages, s) * _pooled(d, s).clamp(-_LIMIT, _LIMIT).exp()

    return _policy(
        "gmpo", params, surrogate, weight="geometric mean of clipped r, times A", paper="arXiv 2507.20673",
        pooled_correction=True,
    )  # fmt: skip


def cispo(
    cap: float = 5.0, floor: float = 0.0, level: str = "token", *, beta: float = 0.0, kl: str = "k3",
    correct_kl: bool = True, entropy: float = 0.0, aggregate: str = "token_mean",
) -> Objective:  # fmt: skip
    """-sg[clip(r, floor, cap)] A log p_y: no token loses its gradient (arXiv 2506.13585, CISPO).

    The bounds are of r itself: TRL's epsilon_high is ``cap``, and verl's clip_ratio_high c is ``cap = 1 + c``, its
    clip_ratio_low ``floor = 1 - c``.  The paper bounds above only and prints no value.
    """
    params = dict(locals())
    _range("cispo", "floor", floor, 0.0, math.inf)
    _range("cispo", "cap", cap, floor, math.inf)
    return _policy(
        "cispo", params, lambda s, ratio: -ratio.detach().clamp(floor, cap) * s.advantages * s.logp,
        level=_level("cispo", level), weight="clip(r) A", paper="arXiv 2506.13585",
    )  # fmt: skip


def sapo(
    tau_pos: float = 1.0, tau_neg: float = 1.05, level: str = "token", *, beta: float = 0.0, kl: str = "k3",
    correct_kl: bool = True, entropy: float = 0.0, aggregate: str = "sequence_mean_token_mean",
) -> Objective:  # fmt: skip
    """-A (4 / tau) sigmoid(tau (r - 1)): a soft gate in the clip's place (arXiv 2511.20347).

    tau is ``tau_pos`` where A > 0, else ``tau_neg``.  At r = 1 the gradient is REINFORCE's.
    """
    params = dict(locals())
    for argument, value in (("tau_pos", tau_pos), ("tau_neg", tau_neg)):
        _range("sapo", argument, value, 0.0, math.inf, open_low=True)

    def surrogate(s: RowStats, ratio: torch.Tensor) -> torch.Tensor:
        tau = torch.full_like(s.advantages, tau_neg).masked_fill(s.advantages > 0, tau_pos)
        return -s.advantages * (4.0 / tau) * torch.sigmoid(tau * (ratio - 1.0))

    return _policy(
        "sapo", params, surrogate, level=_level("sapo", level), weight="4 sigmoid'(tau (r - 1)) r A",
        paper="arXiv 2511.20347",
    )  # fmt: skip
