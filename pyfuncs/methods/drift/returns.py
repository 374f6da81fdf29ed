"""From a trajectory's rewards and answers to its return, and from the returns of a prompt to weights.

DRIFT's optimum is p_ref(tau | x) exp(R(tau) / beta) / Z(x); with K trajectories of the reference policy for each prompt
the importance weight of the k-th is

    w_k = exp(R_k / beta) / ((1 / K) sum_j exp(R_j / beta)) = K softmax_k(R / beta)                    (Eq. 13)

so a prompt's weights sum to K, whatever its returns are: also those of a prompt that no trajectory solved.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields

import numpy as np

#: A turn is correct, and ends its episode, where its reward is at least this.
SUCCESS = 1.0

_CHOICES = {
    "return_form": ("paper", "code"),
    "weight_norm": ("prompt", "dataset"),
    "supervise": ("last", "all"),
    "weighting": ("drift", "uniform", "rejection"),
}


@dataclass(frozen=True)
class WeightOptions:
    """How trajectories are weighed and what of them is trained on; the defaults are the paper's.

    Args:
        drift_beta: temperature of the weights, in the reward's units; 0 keeps each prompt's best trajectories alone,
            inf weighs all alike.
        gamma: discount a turn.
        repetition_penalty: lambda of Eq. 12.
        format_penalty: added to the return for each turn without an answer in it; 0 or below (the code: -0.1).
        return_form: "paper", or "code", see ``episode_return``.
        weight_norm: "prompt" (Eq. 13), or "dataset": Z is one mean over all trajectories, which is no longer the
            paper's target and lets prompts with higher returns weigh more.
        supervise: "last", the turn that ended the episode, or "all" assistant turns, each a row of the trajectory's
            weight.
        drop_all_failed: leave out prompts that no trajectory solved.
        weighting: "drift"; the baselines "uniform" (weight 1: the paper's SFT on the same data) and "rejection" (the
            verified trajectories alone, weight 1).
    """

    drift_beta: float = 0.1
    gamma: float = 0.9
    repetition_penalty: float = 0.5
    format_penalty: float = 0.0
    return_form: str = "paper"
    weight_norm: str = "prompt"
    supervise: str = "last"
    drop_all_failed: bool = False
    weighting: str = "drift"

    def check(self) -> WeightOptions:
        """Itself; ValueError naming the option and what it got."""
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        for name, low, high in (
            ("drift_beta", 0.0, math.inf), ("gamma", 0.0, 1.0), ("repetition_penalty", 0.0, math.inf),
            ("format_penalty", -math.inf, 0.0),
        ):  # fmt: skip
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high or (name != "drift_beta" and math.isinf(value)):
                raise ValueError(f"{name} must be a number between {low} and {high}; got {value!r}")
        if not isinstance(self.drop_all_failed, bool):
            raise ValueError(f"drop_all_failed must be true or false; got {self.drop_all_failed!r}")
        return self

    @classmethod
    def of(cls, other) -> WeightOptions:
        """These options out of an object that has them as attributes, a ``DriftConfig``; checked."""
        return cls(**{f.name: getattr(other, f.name) for f in fields(cls)}).check()


def episode_return(
    rewards: Sequence[float], answers: Sequence[str | None], *, gamma: float = 0.9, repetition_penalty: float = 0.5,
    format_penalty: float = 0.0, return_form: str = "paper",
) -> float:  # fmt: skip
    """The return of one trajectory.

    Args:
        rewards: of each turn, t = 1..L; at least one.
        answers: what each turn answered, None where no answer was found in it.
        gamma, repetition_penalty, format_penalty: as in ``WeightOptions``.
        return_form: "paper", Eq. 12 with E different answers:

                1[r_L >= 1] gamma^(L-1) - lambda (1 - E / L)

            or "code", the published program's: the discounted sum of all rewards, answers compared without white space
            and in lower case, L the turns that have an answer (an empty one counts in L and not in E; without any the
            penalty is 0):

                sum_t gamma^(t-1) r_t - lambda (1 - E / L)

            and in both forms ``format_penalty`` for each turn without an answer.
    """
    turns = len(rewards)
    if not turns:
        raise ValueError("rewards must have a number for each turn, at least one; got none")
    unparsed = sum(a is None for a in answers)
    if return_form == "paper":
        length = turns
        different = len({a.strip() for a in answers if a is not None})
        gained = gamma ** (turns - 1) if rewards[-1] >= SUCCESS else 0.0
    elif return_form == "code":
        length = len(answers) - unparsed
        different = len({"".join(a.split()).lower() for a in answers if a is not None} - {""})
        gained = math.fsum(gamma**t * r for t, r in enumerate(rewards))
    else:
        raise ValueError(f"return_form must be one of {', '.join(_CHOICES['return_form'])}; got {return_form!r}")
    repeated = 1.0 - different / length if length else 0.0
    return gained - repetition_penalty * repeated + format_penalty * unparsed


def softmax_weights(
    returns: Sequence[float] | np.ndarray, groups: Sequence[Hashable], beta: float = 0.1, norm: str = "prompt"
) -> np.ndarray:
    """w_k = K softmax_k(R / beta) over the trajectories of each group (Eq. 13), in fp64: (N,).

    Args:
        returns: R, (N,), finite.
        groups: (N,) the prompt of each; those of a prompt need not be neighbours, and prompts may differ in K.
        beta: in the reward's units, 0 and inf among them: K / m on a prompt's m best and 0 elsewhere, and 1 everywhere.
        norm: "prompt", or "dataset" for one group.

    Exact at every beta: a group's largest return is taken off before the division.  ValueError for anything not finite,
    a beta below 0 and lists that do not match.
    """
    r = np.asarray(returns, dtype=np.float64)
    if r.ndim != 1 or len(groups) != len(r):
        raise ValueError(f"returns and groups must be lists of one length; got {r.shape} and {len(groups)}")
    if not np.isfinite(r).all():
        raise ValueError(f"returns must be finite; got {r[~np.isfinite(r)][0]} at {int(np.argmin(np.isfinite(r)))}")
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0; got {beta!r}")
    if norm not in _CHOICES["weight_norm"]:
        raise ValueError(f"norm must be one of {', '.join(_CHOICES['weight_norm'])}; got {norm!r}")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(g, len(numbers)) if norm == "prompt" else 0 for g in groups], dtype=np.intp)
    count = index.max() + 1 if len(index) else 0
    best = np.full(count, -np.inf)
    np.maximum.at(best, index, r)
    below = r - best[index]
    if beta == 0:
        raised = (below == 0).astype(np.float64)
    else:
        with np.errstate(over="ignore", under="ignore"):  # to -inf, and to 0
            raised = np.exp(below / beta)
    total = np.zeros(count)
    np.add.at(total, index, raised)
    return raised * np.bincount(index, minlength=count)[index] / total[index] if count else raised


def concentration(weights: np.ndarray, groups: Sequence[Hashable]) -> tuple[float, float]:
    """(entropy, effective sample size) of weights, (N,).

    The entropy, in nats, is of each group's weights over their sum, a mean over groups: log K where all are alike.  The
    effective sample size is (sum w)^2 / (N sum w^2), a share of N.
    """
    by_group: dict[Hashable, list[float]] = {}
    for group, w in zip(groups, weights, strict=True):
        by_group.setdefault(group, []).append(float(w))
    entropies = []
    for ws in by_group.values():
        p = np.array([w for w in ws if w > 0])
        p = p / p.sum() if len(p) else p
        entropies.append(-float((p * np.log(p)).sum()))
    squares = float((weights**2).sum())
    size = float(weights.sum()) ** 2 / (len(weights) * squares) if squares else 0.0
    return float(np.mean(entropies)) + 0.0 if entropies else 0.0, size
