"""From episodes to the rows that are trained on: {prompt, completion, weight, success}."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from .episode import Episode
from .returns import WeightOptions, concentration, episode_return, softmax_weights


@dataclass(frozen=True)
class Weighed:
    """Weights of episodes and what they come to.

    Args:
        returns, weights: (N,) fp64, one an episode.
        kept: (N,) bool, what is trained on.  A kept episode of weight 0 has no gradient, and counts in means.
        statistics: prompts, episodes, solved (share of episodes), all_failed and all_solved (shares of prompts),
            mean_return, weight_entropy (nats, a mean over prompts), effective_sample_size (a share), max_weight.
    """

    returns: np.ndarray
    weights: np.ndarray
    kept: np.ndarray
    statistics: dict[str, float]


def weigh(episodes: Sequence[Episode], options: WeightOptions | None = None) -> Weighed:
    """Returns and weights of episodes; those of a prompt are one group.

    ValueError where an option is out of range, or where nothing is left with a weight: no episode, or none solved under
    "rejection" or ``drop_all_failed``.
    """
    o = (options or WeightOptions()).check()
    if not episodes:
        raise ValueError("episodes: an empty group has no weights")
    groups = [e.prompt_id for e in episodes]
    solved = np.array([e.solved for e in episodes])
    returns = np.array([_return(e, o) for e in episodes])
    weights = np.ones(len(episodes))
    if o.weighting == "drift":
        weights = softmax_weights(returns, groups, o.drift_beta, o.weight_norm)
    hits: dict = {}
    sizes: dict = {}
    for group, hit in zip(groups, solved, strict=True):
        hits[group] = hits.get(group, 0) + int(hit)
        sizes[group] = sizes.get(group, 0) + 1
    kept = np.ones(len(episodes), dtype=bool)
    if o.drop_all_failed:
        kept &= np.array([hits[g] > 0 for g in groups])
    if o.weighting == "rejection":
        kept &= solved
    if not kept.any():
        raise ValueError(f"none of {len(episodes)} episodes is solved: {_what(o)} leaves nothing to train on")
    entropy, size = concentration(weights[kept], [g for g, k in zip(groups, kept, strict=True) if k])
    statistics = {
        "prompts": len(sizes), "episodes": len(episodes), "solved": float(solved.mean()),
        "all_failed": sum(n == 0 for n in hits.values()) / len(sizes),
        "all_solved": sum(hits[g] == sizes[g] for g in sizes) / len(sizes),
        "mean_return": float(returns.mean()), "weight_entropy": entropy, "effective_sample_size": size,
        "max_weight": float(weights[kept].max()),
    }  # fmt: skip
    return Weighed(returns, weights, kept, statistics)


def weighted_rows(episodes: Sequence[Episode], options: WeightOptions | None = None) -> Dataset:
    """A ``datasets.Dataset`` of {prompt, completion, weight, success, prompt_id}, what ``DriftTrainer`` trains on.

    ``completion`` is one assistant message and ``prompt`` everything before it: of each episode its last turn, or under
    supervise "all" every turn, each with the episode's weight.  Errors as ``weigh``.
    """
    o = (options or WeightOptions()).check()
    weighed = weigh(episodes, o)
    records = []
    for episode, weight, kept in zip(episodes, weighed.weights, weighed.kept, strict=True):
        if not kept:
            continue
        turns = episode.turns()
        for i in turns if o.supervise == "all" else turns[-1:]:
            records.append({
                "prompt": episode.messages[:i], "completion": [episode.messages[i]], "weight": float(weight),
                "success": float(episode.solved), "prompt_id": str(episode.prompt_id),
            })  # fmt: skip
    return Dataset.from_list(records)


def _return(e: Episode, o: WeightOptions) -> float:
    own = e.format_penalty
    value = episode_return(
        e.rewards, e.answers, gamma=o.gamma, repetition_penalty=o.repetition_penalty,
        format_penalty=o.format_penalty if own is None else 0.0, return_form=o.return_form,
    )  # fmt: skip
    return value if own is None else value + own


def _what(o: WeightOptions) -> str:
    return "rejection sampling" if o.weighting == "rejection" else "drop_all_failed"
