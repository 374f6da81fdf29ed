"""Rewinding: a finished run walked back along its path, a point chosen on held-out suites, and tested there.

The point's t says little across paths: at t = 0.3 the line has gone 0.3 of the way and the square-root generator 0.55
to 0.72.  So each point carries the distance it has travelled, and paths are compared by that or by outcome.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...paths import (
    Adapter,
    Additive,
    LoRAScale,
    OFTGenerator,
    Point,
    Scored,
    WeightPath,
    best_sum,
    best_target,
    equalised,
    find_stack,
    furthest,
    sweep,
)
from ...paths.frontier import Rule

#: model, split -> (score on each target suite, score on each retention suite).
Scorer = Callable[[torch.nn.Module, str], tuple[dict[str, float], dict[str, float]]]


@dataclass(frozen=True)
class Rewinding:
    """A path with the point that each alpha in [0, 1] stands for.

    ``reaches`` says whether alpha = 1 is the trained model: under "safe" and "min" strong layers are held back there.
    """

    name: str
    path: WeightPath
    point: Callable[[float], Point]
    reaches: bool = True


def paths_of(
    family: str, pre: Mapping[str, torch.Tensor], post: Mapping[str, torch.Tensor], adapter: Adapter | None,
    variants: Sequence[str], power: float = 0.5,
) -> list[Rewinding]:  # fmt: skip
    """The paths of a finished run, by name.

    "line": between merged weights, for any technique; "scale": of a LoRA; "generator": OFT with its skew generator
    scaled by alpha^power; "safe", "min": the same, and layers rotated more than the mean of the first five layers, or
    than the least, held at that (SafeScale, MinScale; see ``burnish.paths.equalised``).

    Args:
        family: of the technique.
        pre, post: state dicts before, and after with the adapter merged.
        adapter: of a LoRA or OFT run.
    """
    out = []
    for name in variants:
        if name == "line":
            out.append(Rewinding(name, Additive(pre, post), lambda t: t))
        elif name == "scale":
            out.append(Rewinding(name, LoRAScale(pre, adapter), lambda t: t))
        else:
            path = OFTGenerator(pre, adapter, power=power)
            if name == "generator":
                out.append(Rewinding(name, path, lambda t: t))
                continue
            strength = layer_strength(path)
            inner = [s for layer, s in strength.items() if layer is not None] or list(strength.values())
            reference = min(inner) if name == "min" else statistics.fmean(inner[:5])
            out.append(Rewinding(name, path, _held(strength, reference, power), reaches=False))
    return out


def _held(strength: Mapping[int | None, float], reference: float, power: float) -> Callable[[float], Point]:
    # weights of no layer are not rotated
    return lambda t: {None: t, **equalised(strength, t, reference, power)}


def layer_strength(path: OFTGenerator) -> dict[int | None, float]:
    """Mean rotation strength of each layer's weights, layers in order; see ``OFTGenerator.strength``."""
    stack = find_stack(path.template, None)
    by_layer: dict[int | None, list[float]] = {}
    for name, s in path.strength().items():
        by_layer.setdefault(stack.layer(name) if stack else None, []).append(s)
    return {k: statistics.fmean(by_layer[k]) for k in sorted(by_layer, key=lambda k: -1 if k is None else k)}


def rule_of(name: str, number: float, base: float) -> Rule:
    """A rule by name: within a forgetting of ``number``, or of best_sum with it as the weight of retention."""
    if name == "best_sum":
        return best_sum(number)
    return (best_target if name == "best_target" else furthest)(number, base)


@torch.no_grad()
def travelled(weights: Mapping[str, torch.Tensor], pre: Mapping[str, torch.Tensor]) -> float:
    """||theta - theta_pre||_F over all weights; tied ones count once."""
    total, seen = 0.0, set()
    for name, before in pre.items():
        if before.data_ptr() in seen:
            continue
        seen.add(before.data_ptr())
        total += float((weights[name].to(before).float() - before.float()).square().sum(dtype=torch.float64))
    return total**0.5


def mean(scores: Mapping[str, float]) -> float:
    """Over exactly the suites that the arena names, each once."""
    return statistics.fmean(scores.values())


def choose_point(
    rewinding: Rewinding, grid: Iterable[float], model: torch.nn.Module, scorer: Scorer, rule: Rule, *,
    pre: Mapping[str, torch.Tensor], known: Mapping[float, Mapping[str, Any]], length: float,
) -> dict[str, Any]:  # fmt: skip
    """Score a path's points on the held-out suites, choose one by ``rule``, and score that one alone on the tests.

    Args:
        grid: alphas, 0 and 1 among them.
        model: a plain one, left with the weights that it came with.
        pre: its weights at alpha = 0; ``length``: how far the trained model is from them.
        known: scores by split of alphas that are scored already: {0.0: base, 1.0: the trained model}.

    Returns points (each with alpha, target, retention, its suites' scores, and distance, 1 at the trained model), the
    chosen one, and its test scores.
    """
    details: dict[float, dict[str, Any]] = {}

    def score(alphas: list[float], split: str) -> list[Scored]:
        seen: list[dict[str, Any]] = []

        def target(m) -> float:
            goal, kept = scorer(m, split)
            far = travelled(m.state_dict(), pre) / length if length else 0.0
            seen.append({"target": mean(goal), "retention": mean(kept), "suites": {**goal, **kept}, "distance": far})
            return seen[-1]["target"]

        path = rewinding.path
        found = sweep(path, [rewinding.point(a) for a in alphas], model, target, lambda m: seen[-1]["retention"])
        details.update(zip(alphas, seen, strict=True))
        return [replace(p, t=a) for p, a in zip(found, alphas, strict=True)]

    ends = {a: known[a] for a in (0.0, 1.0) if a in known and (a == 0 or rewinding.reaches)}
    alphas = sorted(set(grid) | {0.0, 1.0})
    points = score([a for a in alphas if a not in ends], "held_out")
    for a, scores in ends.items():
        details[a] = {**scores["held_out"], "distance": a}
        points.append(Scored(details[a]["target"], details[a]["retention"], a))
    points.sort(key=lambda p: p.t)
    rows = [{"alpha": p.t, **details[p.t]} for p in points]
    chosen = rule(points)
    row = next(r for r in rows if r["alpha"] == chosen.t)
    if chosen.t in ends:
        test = {**ends[chosen.t]["test"], "distance": row["distance"]}
    else:
        score([chosen.t], "test")
        test = details[chosen.t]
    return {"points": rows, "chosen": row, "test": {"alpha": chosen.t, **test}}
