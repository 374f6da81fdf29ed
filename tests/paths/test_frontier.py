"""Fronts, areas and rules, against definitions; sweeps over a real model."""

import itertools
import random

import pytest
import torch

from burnish.paths import (
    Additive,
    Scored,
    best_sum,
    best_target,
    choose,
    dominates,
    furthest,
    hypervolume,
    pareto_front,
    retention_at,
    sweep,
)


def clouds():
    rng = random.Random(0)
    for n in (1, 2, 7, 40):
        for levels in (3, 1000):
            yield [Scored(rng.randrange(levels) / levels, rng.randrange(levels) / levels, i) for i in range(n)]


def test_front_is_what_nothing_dominates():
    for points in clouds():
        front = pareto_front(points)
        want = [p for p in points if not any(dominates(q, p) for q in points)]
        assert sorted(map(id, front)) == sorted(map(id, want))
        assert [p.target for p in front] == sorted(p.target for p in front)


def test_hypervolume_is_the_area():
    for points in clouds():
        for reference in ((0.0, 0.0), (0.3, 0.1)):
            size = 200
            cells = sum(
                any(p.target > x and p.retention > y for p in points)
                for x, y in itertools.product(*(
                    [reference[i] + (k + 0.5) * (1 - reference[i]) / size for k in range(size)] for i in (0, 1)
                ))
            )  # fmt: skip
            exact = hypervolume(points, reference)
            assert abs(exact - cells / size**2 * (1 - reference[0]) * (1 - reference[1])) < 4 / size
    assert hypervolume([Scored(0.5, 0.5)], (0.6, 0.0)) == 0
    assert hypervolume([Scored(0.5, 0.5), Scored(0.25, 1.0)]) == 0.25 + 0.125
    # a dominated point adds nothing, a better one never takes away
    assert hypervolume([Scored(0.5, 0.5), Scored(0.4, 0.4)]) == hypervolume([Scored(0.5, 0.5)])


def test_pefts_published_pairs():
    """HF PEFT's method comparison (specs, anchors): GSM8K accuracy against forgetting, less of which is better."""
    rows = {
        "LoRA": (0.4784, 0.0500), "OFT": (0.4913, 0.0412), "full": (0.4716, 0.0300), "MiSS": (0.4867, 0.1973),
        "DoRA": (0.4693, 0.0506), "PSOFT": (0.4488, 0.0529), "OSF": (0.4268, 0.0165), "AdaLoRA": (0.3730, 0.0221),
        "VeRA": (0.3541, 0.0995), "BOFT": (0.3434, 0.0241), "IA3": (0.3108, 0.0193),
    }  # fmt: skip
    front = pareto_front(Scored(t, -f, name=n) for n, (t, f) in rows.items())
    assert [p.name for p in front] == ["OSF", "full", "OFT"]
    assert best_target(0.03, 0.0)([Scored(t, -f, name=n) for n, (t, f) in rows.items()]).name == "full"


def test_rules():
    points = [Scored(0.0, 1.0, 0.0), Scored(0.5, 0.95, 0.3), Scored(0.4, 0.92, 0.6), Scored(0.9, 0.5, 1.0)]
    assert best_target(0.1, 1.0)(points).t == 0.3
    assert furthest(0.1, 1.0)(points).t == 0.6
    assert best_target(1.0, 1.0)(points).t == 1.0 and best_target(0.0, 1.0)(points).t == 0.0
    assert best_sum()(points).t == 0.3 and best_sum(0.1)(points).t == 1.0
    with pytest.raises(ValueError, match=r"no point forgets at most 0\.1"):
        best_target(0.1, 1.2)(points)
    assert retention_at(points, 0.7) == pytest.approx(0.725)
    assert retention_at(points, 0.95) is None and retention_at(points, 0.9) == 0.5
    for empty in (pareto_front, best_sum()):
        with pytest.raises(ValueError, match="no points"):
            empty([])
    with pytest.raises(ValueError, match="NaN"):
        pareto_front([Scored(float("nan"), 1.0)])


def test_sweep_and_choice_leave_the_model_as_it_was():
    torch.manual_seed(0)
    model, other = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    start = {n: x.clone() for n, x in model.state_dict().items()}
    x = torch.randn(20, 3)
    goal, old = other(x).detach(), model(x).detach()
    path = Additive(model, other)

    @torch.no_grad()
    def target(m):
        return -float((m(x) - goal).square().mean())

    @torch.no_grad()
    def retention(m):
        return -float((m(x) - old).square().mean())

    points = sweep(path, [0, 0.25, 0.5, 0.75, 1], model, target, retention)
    assert [p.target for p in points] == sorted(p.target for p in points)
    assert [p.retention for p in points] == sorted((p.retention for p in points), reverse=True)
    assert points[0].retention == 0 and points[-1].target == 0
    seen = []
    picked = choose(
        path, [0, 0.5, 1], model, best_target(-points[2].retention + 1e-6, 0.0), held_out=(target, retention),
        test=(lambda m: seen.append(1) or target(m), retention),
    )  # fmt: skip
    assert picked.chosen.t == 0.5 and picked.test.target == picked.chosen.target and len(picked.points) == 3
    assert len(seen) == 1  # of the test sets the chosen point alone is scored
    assert all(torch.equal(model.state_dict()[n], start[n]) for n in start)

    def fails(m):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        sweep(path, [0.5], model, fails, retention)
    assert all(torch.equal(model.state_dict()[n], start[n]) for n in start)
