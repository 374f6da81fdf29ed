"""What AXPO resamples and what each token is credited with: pure functions of rewards, flags and masks.

arXiv 2605.28774, section 3.  A batch is B questions of N rollouts, rewards 0 or 1.  A question's tool-using rollouts
are its subgroup U.  Where U is not empty and all of it is wrong, the prefix of some of them, up to and including the
first tool-call tag, is kept and continued K times:

    Eq. 2   A_res_k = (r_k - mean r) / std r       over the K continuations; their own tokens behind the prefix
    Eq. 3   r_pre   = 1[some r_k = 1]
    Eq. 4   A_pre   = the same over the N rewards, the source's replaced by r_pre; the source's prefix alone
    Eq. 5   a selected prefix adds L_clip(prefix; A_pre) + sum_k L_clip(continuation_k; A_res_k)

Every other rollout keeps its GRPO term.  So a row has one advantage and one 0/1 mask, whatever stream it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

STDS = ("sample", "population")
SUBGROUPS = ("tool", "no_tool")
NORMS = ("token_mean", "row")


@dataclass(frozen=True)
class Rules:
    """AXPO's numbers, and the ablations of the paper's table.

    Args:
        budget: extra rollouts as a share of the B N ordinary ones, r.
        resamples: continuations a prefix, K.
        fix_prefix: False is "no prefix fix": whole rollouts of the question are sampled anew.
        prefix_credit: False is "no prefix credit": no Eq. 3 and 4, the source stays an ordinary rollout.
        merge_groups: True is "merged advantage group": a question's rollouts, r_pre in the sources' place, and all its
            resamples are one group, whose mean and std everyone's advantage is made with.
        subgroup: "no_tool" is "resample no-tool instead": trigger and source are the rollouts without a call.  They
            have no tag to keep a prefix to, so whole rollouts are sampled anew.
        std: of Eq. 2 and 4, "sample" (n - 1) or "population".
        eps: added to it.  A group of equal rewards has advantages 0.

    ValueError, naming the field, for a value that cannot be.
    """

    budget: float = 0.25
    resamples: int = 4
    fix_prefix: bool = True
    prefix_credit: bool = True
    merge_groups: bool = False
    subgroup: str = "tool"
    std: str = "sample"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not (math.isfinite(self.budget) and self.budget >= 0):
            raise ValueError(f"resample_budget must be a number >= 0; got {self.budget!r}")
        if type(self.resamples) is not int or self.resamples < 2:
            raise ValueError(f"num_resamples must be a whole number >= 2; got {self.resamples!r}")
        if self.subgroup not in SUBGROUPS:
            raise ValueError(f"resample_subgroup must be one of {', '.join(SUBGROUPS)}; got {self.subgroup!r}")
        if self.std not in STDS:
            raise ValueError(f"std must be one of {', '.join(STDS)}; got {self.std!r}")
        if not self.eps >= 0:
            raise ValueError(f"eps must be >= 0; got {self.eps!r}")

    @property
    def keeps_prefix(self) -> bool:
        """Whether resamples begin with the source's prefix."""
        return self.fix_prefix and self.subgroup == "tool"

    @property
    def credits_prefix(self) -> bool:
        """Whether a source trains its prefix alone, with A_pre.  There is none to credit where none is kept."""
        return self.keeps_prefix and self.prefix_credit

    def prefixes(self, rollouts: int) -> int:
        """How many prefixes a step of ``rollouts`` = B N may resample: floor(r B N / K)."""
        # the decimal that was written: 0.29 * 100 in floats is below 29
        return math.floor(Fraction(str(self.budget)) * rollouts / self.resamples)


def check_rewards(rewards: Tensor) -> Tensor:
    """Rewards (B, N), each 0 or 1.  ValueError for an empty group, a value that is not a number, any other value."""
    if rewards.ndim != 2 or 0 in rewards.shape:
        raise ValueError(f"rewards must be (questions, rollouts), no group empty; got shape {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        b, i = torch.nonzero(~torch.isfinite(rewards))[0].tolist()
        raise ValueError(f"the reward of question {b}, rollout {i} is not a number: {float(rewards[b, i])}")
    other = (rewards != 0) & (rewards != 1)
    if other.any():
        b, i = torch.nonzero(other)[0].tolist()
        raise ValueError(
            f"AXPO's rewards are 0 or 1, right or wrong; question {b}, rollout {i} has {float(rewards[b, i]):g}"
        )
    return rewards


def triggered(member: Tensor, correct: Tensor) -> Tensor:
    """Which questions have a subgroup and nothing right in it.

    Args:
        member: (B, N) bool, the rollouts of the subgroup: those with a tool call.
        correct: (B, N) bool.  What rollouts outside the subgroup got right does not matter.

    Returns (B,) bool.
    """
    return member.any(1) & ~(member & correct).any(1)


def mean_probability(logp: Sequence[float] | Tensor) -> float:
    """Arithmetic mean of the sampled tokens' probabilities exp(logp) over a tool call: the lower, the sooner resampled.

    ``logp`` (n,) in nats are those of the call alone, behind the opening tag up to and with the closing one.  An empty
    span is certain: 1.
    """
    values = torch.as_tensor(logp, dtype=torch.float64)
    return float(values.exp().mean()) if values.numel() else 1.0


def select(confidence: Tensor, candidates: Tensor, count: int) -> list[tuple[int, int]]:
    """(question, rollout) of the prefixes to resample, at most ``count``, breadth first.

    Args:
        confidence: (B, N), the lowest first.  Ties go to the earlier rollout.
        candidates: (B, N) bool.

    Every question gets its first before any gets a second.  Where a layer is cut by ``count`` its least confident
    prefixes go first.
    """
    if confidence.shape != candidates.shape:
        raise ValueError(f"confidence {tuple(confidence.shape)} and candidates {tuple(candidates.shape)} differ")
    if confidence[candidates].isnan().any():
        raise ValueError("confidence has NaN at a candidate")
    values = confidence.tolist()
    order = []
    for b, flags in enumerate(candidates.tolist()):
        ranked = sorted((values[b][i], i) for i, flag in enumerate(flags) if flag)
        order += [(depth, value, b, i) for depth, (value, i) in enumerate(ranked)]
    return [(b, i) for _, _, b, i in sorted(order)[: max(count, 0)]]


def normalise(rewards: Tensor, *, std: str = "sample", eps: float = 1e-6) -> Tensor:
    """(r - mean) / (std + eps) over the last axis, 0 where all are equal.  ValueError below two rewards."""
    if rewards.shape[-1] < 2:
        raise ValueError(f"a group needs two rewards for its std; got shape {tuple(rewards.shape)}")
    if std not in STDS:
        raise ValueError(f"std must be one of {', '.join(STDS)}; got {std!r}")
    deviation = rewards - rewards.mean(-1, keepdim=True)
    scale = rewards.std(-1, correction=int(std == "sample"), keepdim=True)
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    return torch.where(equal, torch.zeros_like(rewards), deviation / (scale + eps))


def prefix_rewards(resampled: Tensor) -> Tensor:
    """Eq. 3: (n, K) rewards -> (n,), 1 where a continuation was right."""
    return (resampled == 1).any(-1).to(resampled.dtype)


def prefix_advantages(
    rewards: Tensor, selected: Sequence[tuple[int, int]], recovered: Tensor, *, std: str = "sample", eps: float = 1e-6
) -> Tensor:
    """Eq. 4: the n sources' A_pre (n,).  Each has a group of its own: (N,) rewards with its own one replaced.

    Args:
        rewards: (B, N).
        selected: n pairs (question, rollout).
        recovered: (n,), Eq. 3.
    """
    out = rewards.new_zeros(len(selected))
    for j, (b, i) in enumerate(selected):
        group = rewards[b].clone()
        group[i] = recovered[j]
        out[j] = normalise(group, std=std, eps=eps)[i]
    return out


@dataclass(frozen=True)
class Credit:
    """Advantages of a step.

    prefix: (n,), A_pre of the sources, whose mask ends with the prefix; None where sources stay ordinary rollouts.
    resampled: (n, K), for the tokens behind the prefix.
    group: {question: (N,)}, the groups whose ordinary advantages change: none, but under ``merge_groups``.
    """

    prefix: Tensor | None
    resampled: Tensor
    group: dict[int, Tensor]


def credit(rewards: Tensor, selected: Sequence[tuple[int, int]], resampled: Tensor, rules: Rules) -> Credit:
    """The advantages of the prefixes and continuations of a step.

    Args:
        rewards: (B, N), 0 or 1.
        selected: n pairs (question, rollout), from ``select``.
        resampled: (n, K), the continuations' rewards, 0 or 1.
    """
    shape = (len(selected), rules.resamples)
    if tuple(resampled.shape) != shape:
        raise ValueError(f"resampled must be {shape}, a row a prefix; got {tuple(resampled.shape)}")
    if not selected:
        return Credit(None, resampled.new_zeros(shape), {})
    check_rewards(resampled)
    recovered = prefix_rewards(resampled)
    scale = {"std": rules.std, "eps": rules.eps}
    if not rules.merge_groups:
        prefix = prefix_advantages(rewards, selected, recovered, **scale) if rules.credits_prefix else None  # type: ignore[arg-type]
        return Credit(prefix, normalise(resampled, **scale), {})  # type: ignore[arg-type]
    own, prefix, merged = rewards.clone(), rewards.new_zeros(len(selected)), resampled.clone()
    if rules.credits_prefix:
        for j, (b, i) in enumerate(selected):
            own[b, i] = recovered[j]
    groups = {}
    for b in dict.fromkeys(b for b, _ in selected):
        sources = [j for j, (question, _) in enumerate(selected) if question == b]
        pool = torch.cat([own[b], resampled[sources].flatten()])
        all_of_it = normalise(pool, std=rules.std, eps=rules.eps)
        groups[b] = all_of_it[: rewards.shape[1]]
        merged[sources] = all_of_it[rewards.shape[1] :].view(len(sources), -1)
        for j in sources:
            prefix[j] = groups[b][selected[j][1]]
    return Credit(prefix if rules.credits_prefix else None, merged, groups)


def stream_masks(own: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(prefix, continuation) masks of a row: its ``own`` tokens (..., T) before and from position ``length`` on."""
    behind = torch.arange(own.shape[-1], device=own.device) >= length
    return own * ~behind, own * behind


def token_weights(mask: Tensor, norm: str, rollouts: int) -> Tensor:
    """Weights (R, T) with which a step's loss is sum w l over token losses l, for rows of whatever stream.

    Args:
        mask: (R, T) of 0 and 1.
        norm: "token_mean", 1 / active tokens of all rows; "row", 1 / (B N) times each row's mean, the literal Eq. 5: a
            selected prefix adds 1 + K row means.
        rollouts: B N, the ordinary rollouts.

    Rows without a token add nothing.
    """
    mask = mask.to(torch.get_default_dtype()) if not mask.is_floating_point() else mask
    if norm == "token_mean":
        return mask / mask.sum().clamp(min=1)
    if norm == "row":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / rollouts
    raise ValueError(f"axpo_norm must be one of {', '.join(NORMS)}; got {norm!r}")
