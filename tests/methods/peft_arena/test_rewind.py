"""Paths of runs: ends, distances, layers held; a point chosen on held-out scores alone."""

import copy
import math

import arenas
import pytest
import torch

from burnish.methods.peft_arena import apply, choose_point, paths_of, toy, travelled
from burnish.methods.peft_arena.arena import _merge, snapshot
from burnish.methods.peft_arena.plan import Run
from burnish.methods.peft_arena.rewind import layer_strength, mean, rule_of
from burnish.paths import Scored, best_target

FAMILIES = {"full": ("line",), "lora": ("scale", "line"), "oft": ("generator", "safe", "min", "line")}


def trained(name, size=0.3, **arguments):
    """(base, pre, post, adapter) of a run whose trained parameters were moved at random."""
    base = toy.model(0)
    student = apply(copy.deepcopy(base), name, 10, **arguments)
    generator = torch.Generator().manual_seed(1)
    layer = 0
    with torch.no_grad():
        for n, p in student.named_parameters():
            if p.requires_grad and p.dim() > 1:
                layer = int(n.split("layers.")[1].split(".")[0]) if "layers." in n else 0
                # every layer another strength, the first the least
                p += size * (1 + layer) * torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1])
    run = Run(name, name, arguments, 1e-3, 10, 0, "", 0, None)
    adapter, post = _merge(student, run)
    return base, snapshot(base), post, adapter


CASES = [("full", {}, "full"), ("lora", {"r": 4, "dropout": 0.0}, "lora"), ("oft", {"block_size": 16}, "oft")]


@pytest.mark.parametrize("name, arguments, family", CASES, ids=[c[0] for c in CASES])
def test_ends_are_the_base_and_the_trained_model(name, arguments, family):
    base, pre, post, adapter = trained(name, **arguments)
    for one in paths_of(family, pre, post, adapter, FAMILIES[family]):
        work = copy.deepcopy(base)
        one.path.load_into(work, one.point(0.0))
        assert all(torch.equal(x, pre[n]) for n, x in work.state_dict().items())
        one.path.load_into(work, one.point(1.0))
        close = all(torch.allclose(x, post[n], atol=1e-5) for n, x in work.state_dict().items())
        assert close == one.reaches
        if one.name in ("line", "scale"):
            one.path.load_into(work, one.point(0.3))
            assert travelled(work.state_dict(), pre) / travelled(post, pre) == pytest.approx(0.3, rel=1e-4)


def test_the_generator_goes_further_than_its_alpha():
    for size, low, high in ((0.01, 0.54, 0.56), (0.25, 0.56, 0.75)):
        base, pre, post, adapter = trained("oft", size, block_size=16, neumann=False)
        (one,) = paths_of("oft", pre, post, adapter, ("generator",))
        one.path.load_into(base, one.point(0.3))
        share = travelled(base.state_dict(), pre) / travelled(post, pre)
        assert low < share < high


def test_layers_are_held_at_the_reference():
    _, pre, post, adapter = trained("oft", block_size=16, neumann=False)
    for name, reference in (("min", min), ("safe", lambda s: sum(s) / len(s))):
        free, held = paths_of("oft", pre, post, adapter, ("generator", name))
        strength = layer_strength(free.path)
        assert sorted(strength) == [0, 1, 2] and strength[0] < strength[2]
        limit = reference(list(strength.values()))
        for layer, s in strength.items():
            # the generator is scaled by sqrt of the point's t
            assert held.point(1.0)[layer] ** 0.5 * s == pytest.approx(min(s, limit), rel=1e-6)
            assert held.point(0.4)[layer] == pytest.approx(0.4 * held.point(1.0)[layer], rel=1e-6)


def test_a_point_is_chosen_on_held_out_scores_and_only_it_is_tested():
    base, pre, post, adapter = trained("lora", r=4, dropout=0.0)
    (one,) = paths_of("lora", pre, post, adapter, ("scale",))
    length, asked = travelled(post, pre), []

    def scorer(model, split):
        far = travelled(model.state_dict(), pre) / length
        asked.append((split, round(far, 3)))
        # on the tests another point would be best
        return {"goal": far if split == "held_out" else 1 - far / 2}, {"a": 1 - far**2, "b": 1 - far**2}

    def known(t):
        return {"target": t, "retention": 1 - t * t, "suites": {"goal": t, "a": 1 - t * t, "b": 1 - t * t}}

    ends = {t: {"held_out": known(t), "test": known(t)} for t in (0.0, 1.0)}
    start = {n: x.clone() for n, x in base.state_dict().items()}
    found = choose_point(
        one, [0.25, 0.5, 0.75], base, scorer, best_target(0.3, 1.0), pre=pre, known=ends, length=length
    )
    assert [p["alpha"] for p in found["points"]] == [0, 0.25, 0.5, 0.75, 1]
    assert found["chosen"]["alpha"] == 0.5 and found["test"]["target"] == pytest.approx(0.75, abs=1e-3)
    assert asked == [("held_out", 0.25), ("held_out", 0.5), ("held_out", 0.75), ("test", 0.5)]
    assert found["chosen"]["distance"] == pytest.approx(0.5, rel=1e-4)
    assert all(torch.equal(x, start[n]) for n, x in base.state_dict().items())
    # an end is known already
    asked.clear()
    found = choose_point(one, [0.5], base, scorer, rule_of("best_sum", 0.0, 1.0), pre=pre, known=ends, length=length)
    assert found["chosen"]["alpha"] == 1.0 and found["test"]["target"] == 1.0 and asked == [("held_out", 0.5)]


def test_rules_and_means():
    points = [Scored(0.0, 1.0, 0.0), Scored(0.5, 0.95, 0.5), Scored(0.9, 0.5, 1.0)]
    assert rule_of("best_target", 0.1, 1.0)(points).t == 0.5
    assert rule_of("furthest", 0.6, 1.0)(points).t == 1.0
    assert rule_of("best_sum", 1.0, 1.0)(points).t == 0.5
    assert mean({"a": 1.0, "b": 0.0}) == 0.5


def test_distance_counts_tied_weights_once():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(4, 3, bias=False)
            self.b = torch.nn.Linear(4, 3, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    pre = snapshot(model)
    assert pre["a.weight"].data_ptr() == pre["b.weight"].data_ptr() != model.a.weight.data_ptr()
    with torch.no_grad():
        model.a.weight += 1
    assert travelled(model.state_dict(), pre) == pytest.approx(math.sqrt(12), rel=1e-6)


def test_snapshots_are_copies(tmp_path):
    model = toy.model(0)
    before = snapshot(model)
    with torch.no_grad():
        model.lm_head.weight += 1
    assert not torch.equal(before["lm_head.weight"], model.lm_head.weight)
    assert arenas.ROWS.endswith(":rows")
