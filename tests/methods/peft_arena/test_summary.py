"""Summaries of runs written by hand, against numbers worked out by hand; correlations against numpy."""

import itertools
import math
import random

import numpy as np
import pytest

from burnish.methods.peft_arena import html, markdown, summarise
from burnish.methods.peft_arena.correlation import pearson, ranks, spearman
from burnish.methods.peft_arena.summary import estimate, mean_hypervolume
from burnish.paths import Scored, hypervolume


def both(target, retention, test=None):
    held = {"target": target, "retention": retention, "suites": {"goal": target, "kept": retention}}
    t, r = test or (target, retention)
    return {"held_out": held, "test": {"target": t, "retention": r, "suites": {"goal": t, "kept": r}}}


def run(label, rate, seed, final, control="", base=(0.2, 0.9), metric=0.0, points=()):
    path = [{"alpha": a, "distance": d, "target": t, "retention": r} for a, d, t, r in points]
    chosen = {"points": path, "chosen": path[1], "test": {**path[1], "target": 0.5}} if path else None
    return {
        "run": {"label": label, "technique": label, "rate": rate, "steps": 10, "seed": seed, "control": control,
                "parameters": 1000, "budget": 990, "arguments": {}},
        "base": both(*base), "final": final, "distance": metric + 1, "metrics": {"m": metric},
        "paths": {"line": chosen} if chosen else {}, "training": {"seconds": 1.0},
    }  # fmt: skip


def arena():
    out = []
    for seed in (0, 1):
        shift = 0.1 * seed
        points = [(0.0, 0.0, 0.2, 0.9), (0.5, 0.5, 0.4, 0.88), (1.0, 1.0, 0.6, 0.6)]
        out += [
            run("a", 1e-3, seed, both(0.4 + shift, 0.8), metric=0.1),
            run("a", 1e-2, seed, both(0.6 + shift, 0.6), metric=0.3, points=points),
            run("a", 1e-2, seed, both(0.5, 0.7), control="5 steps", metric=0.2),
            run("b", 1e-3, seed, both(0.5 + shift, 0.85, (0.45, 0.85)), metric=0.05),
        ]
    return out


def test_means_forgetting_and_front():
    s = summarise(arena(), [0.1, 0.5])
    rows = {(r["label"], r["rate"], r["control"]): r for r in s["rows"]}
    assert len(rows) == 4 and s["runs"] == 8 and s["seeds"] == [0, 1]
    a = rows["a", 1e-2, ""]
    assert a["target"]["mean"] == pytest.approx(0.65) and a["forgetting"]["mean"] == pytest.approx(0.3)
    # two values 0.1 apart: t(1) * sd / sqrt(2)
    assert a["target"]["half"] == pytest.approx(12.706 * (0.1 / math.sqrt(2)) / math.sqrt(2), rel=1e-3)
    # b's 0.45/0.85 dominates a's 0.45/0.8
    assert s["front"] == ["b 0.001", "a 0.01"]
    assert s["matched"] == pytest.approx(0.45)
    assert s["base"]["target"]["mean"] == pytest.approx(0.2)


def test_methods_over_rates():
    m = summarise(arena(), [0.1, 0.5])["methods"]
    # above (0.2, 0): seed 0 (0.4-0.2) 0.8 + (0.6-0.4) 0.6, seed 1 a tenth further
    assert m["a"]["hypervolume"]["mean"] == pytest.approx(((0.16 + 0.12) + (0.24 + 0.12)) / 2)
    # at 0.45: between (0.4, 0.8) and (0.6, 0.6); between (0.2, 0.9) and (0.5, 0.8)
    assert m["a"]["retention_at"]["mean"] == pytest.approx((0.75 + (0.9 - 0.1 * 0.25 / 0.3)) / 2)
    assert m["b"]["retention_at"]["mean"] == pytest.approx(0.85)
    # within 0.1 of 0.9 the lower rate alone; chosen on held-out suites, read on the tests
    assert m["a"]["best_target"]["0.1"]["mean"] == pytest.approx(0.45)
    assert m["a"]["best_target"]["0.5"]["mean"] == pytest.approx(0.65)
    assert m["b"]["best_target"]["0.1"]["mean"] == pytest.approx(0.45)
    # a control is no point of its method's curve
    assert m["a"]["hypervolume"]["n"] == 2
    nothing = summarise(arena(), [0.01])["methods"]["a"]["best_target"]["0.01"]
    assert nothing["mean"] == pytest.approx(0.2)  # no rate forgets so little: the base model


def test_hypervolume_of_equal_numbers_of_points():
    s = summarise(arena(), [0.1])
    a, b = (s["methods"][x] for x in "ab")
    # a has two rates, b one: the mean of a's two areas, per seed; of b's one it is the area
    want = [((0.4 - 0.2) * 0.8 + (0.6 - 0.2) * 0.6) / 2, ((0.5 - 0.2) * 0.8 + (0.7 - 0.2) * 0.6) / 2]
    assert s["fewest"] == 1 and a["hypervolume_of_fewest"]["mean"] == pytest.approx(sum(want) / 2)
    assert b["hypervolume_of_fewest"]["mean"] == pytest.approx(b["hypervolume"]["mean"])
    lines = markdown(s).split("### Over learning rates")[1].splitlines()
    assert "which grows with the number of points" in lines[2] and "hypervolume of 1 point: the mean over" in lines[2]
    cells = [[c.strip() for c in line.split("|")[1:5]] for line in lines[4:8] if "---" not in line]
    assert cells[0] == ["method", "points", "hypervolume", "hypervolume of 1 point"]
    assert [c[:2] for c in cells[1:]] == [["a", "2"], ["b", "1"]] and cells[1][3].startswith("0.235 ")
    alike = summarise([r for r in arena() if r["run"]["label"] == "a"])
    assert alike["fewest"] is None and "| method | points | hypervolume   | retention at" in markdown(alike)


def test_mean_hypervolume_is_that_of_all_choices():
    rng = random.Random(0)
    for n in (1, 3, 6):
        # ties, and points below the reference
        points = [Scored(rng.choice([0.1, 0.3, rng.random()]), rng.choice([0.0, 0.5, rng.random()])) for _ in range(n)]
        for k in range(1, n + 1):
            areas = [hypervolume(c, (0.2, 0.1)) for c in itertools.combinations(points, k)]
            assert mean_hypervolume(points, (0.2, 0.1), k) == pytest.approx(sum(areas) / len(areas), abs=1e-12)
    with pytest.raises(ValueError, match="count must be from 1 to the 6 points; got 7"):
        mean_hypervolume(points, (0.0, 0.0), 7)


def test_a_rate_is_chosen_on_held_out_suites():
    runs = [run("a", 1e-3, 0, both(0.5, 0.8, (0.3, 0.8))), run("a", 1e-2, 0, both(0.4, 0.8, (0.6, 0.8)))]
    assert summarise(runs, [0.5])["methods"]["a"]["best_target"]["0.5"]["mean"] == pytest.approx(0.3)


def test_rewinding_against_its_controls():
    (r,) = summarise(arena())["rewinding"]
    assert (r["label"], r["rate"], r["path"]) == ("a", 1e-2, "line")
    # the path at target 0.5: halfway between 0.88 and 0.6; the control 0.7
    assert r["against"]["5 steps"]["mean"] == pytest.approx(0.74 - 0.7)
    # the lower rate: seed 0 at 0.4: 0.88 - 0.8, seed 1 at 0.5: 0.74 - 0.8
    assert r["against"]["lr x 0.1"]["mean"] == pytest.approx((0.08 - 0.06) / 2)
    assert r["chosen"]["target"]["mean"] == 0.5 and r["chosen"]["alpha"]["mean"] == 0.5
    assert [p["target"] for p in r["curve"]] == pytest.approx([0.2, 0.4, 0.6])


def test_controls_are_named_by_their_rate():
    """5e-3 and its "5 steps" were made when 1e-2 was the highest rate."""
    points = [(0.0, 0.0, 0.2, 0.9), (0.5, 0.5, 0.4, 0.88), (1.0, 1.0, 0.6, 0.6)]
    runs = [
        run("a", 2e-2, 0, both(0.6, 0.6), points=points),
        run("a", 1e-2, 0, both(0.5, 0.7)),
        run("a", 5e-3, 0, both(0.4, 0.8), control="lr x 0.5"),
        run("a", 1e-2, 0, both(0.4, 0.7), control="5 steps"),
        run("a", 2e-2, 0, both(0.5, 0.6), control="5 steps"),
        run("a", 6.8e-3, 0, both(0.5, 0.5)),
        run("a", 6e-3, 0, both(0.5, 0.4)),
    ]
    s = summarise(runs)
    found = {c: e["mean"] for c, e in s["rewinding"][0]["against"].items()}
    assert found == pytest.approx({
        "lr x 0.5": 0.04, "lr x 0.25": 0.08, "lr x 0.5, 5 steps": 0.18, "5 steps": 0.14, "lr x 0.34": 0.24,
        "lr x 0.3": 0.34,
    })  # fmt: skip
    controls = {(r["rate"], r["control"]) for r in s["rows"] if r["control"]}
    assert controls == {(5e-3, "lr x 0.25"), (1e-2, "lr x 0.5, 5 steps"), (2e-2, "5 steps")}


def test_an_arena_that_is_not_finished():
    runs = [r for r in arena() if r["run"]["control"] or r["run"]["label"] == "b"]
    s = summarise(runs)  # of a there are controls alone
    assert set(s["methods"]) == {"b"} and s["rewinding"] == []
    assert "5 steps" in markdown(s)
    with pytest.raises(ValueError, match="no run is finished but controls"):
        summarise([r for r in runs if r["run"]["control"]])


def test_correlations_are_over_runs():
    found = {c["metric"]: c for c in summarise(arena())["correlations"]}
    runs = arena()
    x = [r["metrics"]["m"] for r in runs]
    y = [r["base"]["test"]["retention"] - r["final"]["test"]["retention"] for r in runs]
    assert found["m"]["pearson_forgetting"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["m"]["runs"] == 8 and set(found) == {"m", "distance"}


def test_correlation_is_numpys():
    rng = random.Random(0)
    for n in (3, 10, 50):
        x = [rng.choice([1.0, 2.0, 3.0, rng.random()]) for _ in range(n)]
        y = [a + rng.gauss(0, 1) for a in x]
        assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
        mean_ranks = [(sum(b < a for b in x) + sum(b <= a for b in x) + 1) / 2 for a in x]
        assert ranks(x) == mean_ranks
        assert spearman(x, y) == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])
    assert math.isnan(pearson([1, 1], [0, 1])) and math.isnan(pearson([1], [1]))
    assert spearman([1, 2, 3], [1, 10, 100]) == pytest.approx(1)
    with pytest.raises(ValueError, match="same length; got 1 and 2"):
        pearson([1], [1, 2])


def test_seeds_that_do_not_reach_a_target_are_counted():
    runs = [r for r in arena() if r["run"]["label"] != "b"]
    s = summarise(runs)  # the best mean is 0.65: seed 0 ends at 0.6
    assert s["methods"]["a"]["retention_at"]["n"] == 1 and " (1 of 2)" in markdown(s)


def test_a_seed_that_diverged_reaches_no_target():
    runs = [r for r in arena() if r["run"]["label"] == "a" and r["run"]["seed"] == 0]
    lost = run("a", 1e-2, 1, None)["run"]
    s = summarise([*runs, {"run": lost, "diverged": True}])
    assert s["methods"]["a"]["retention_at"]["n"] == 1 and s["methods"]["a"]["seeds"] == 2
    assert "(1 of 2)" in markdown(s)
    s["methods"]["a"]["retention_at"] = None
    assert "- (0 of 2)" in markdown(s)


def test_one_seed_has_no_interval():
    assert estimate([0.5]) == {"mean": 0.5, "half": None, "n": 1} and estimate([None]) is None
    s = summarise([r for r in arena() if r["run"]["seed"] == 0])
    assert "±" not in markdown(s) and "1 seed." in markdown(s)


def test_report_escapes_and_aligns():
    runs = arena()
    for r in runs:
        r["run"]["label"] = r["run"]["label"].replace("b", "b<script>")
    s = summarise(runs)
    page = html(s)
    assert "<script>" not in page and "b&lt;script&gt;" in page and page.startswith("<!doctype html>")
    table = markdown(s).split("### Methods")[1].split("\n\n")[2].splitlines()
    assert len({len(line) for line in table}) == 1 and table[1].startswith("|--")
