"""What the runs of an arena say together: means and intervals over seeds, fronts, rewinding against its controls."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...paths import Scored, hypervolume, pareto_front, retention_at
from ..intervals import interval
from .correlation import pearson, spearman
from .plan import Run

#: {"mean": of seeds, "half": half the width of its 95% interval or None, "n": seeds}.
Estimate = dict[str, Any]
Summary = dict[str, Any]


def read_runs(output: str | Path) -> list[dict[str, Any]]:
    """The runs of an arena's directory, by name.  ValueError where there is none, or one cannot be read."""
    return list(_read(output).values())


def read_planned(output: str | Path, plan: Iterable[Run]) -> tuple[list[dict[str, Any]], int]:
    """(the runs of ``plan`` that are in an arena's directory, how many others are there).

    What a run is, a control or one of the grid, is as the plan says it.  ValueError where none is there, or one cannot
    be read.
    """
    named, out = {run.name: run for run in plan}, []
    found = _read(output)
    for name, one in found.items():
        run = named.get(name)
        if run is not None and run.differs(one["run"]) is None and run.has_all(one["run"]):
            out.append({**one, "run": run.settings()})
    if not out:
        raise ValueError(f"{output}: has no finished run of those that the file asks for")
    return out, len(found) - len(out)


def _read(output: str | Path) -> dict[str, dict[str, Any]]:
    files = sorted((Path(output) / "runs").glob("*.json"))
    if not files:
        raise ValueError(f"{output}: has no finished run")
    out = {}
    for file in files:
        try:
            out[file.stem] = json.loads(file.read_text())
        except ValueError:
            raise ValueError(f"{file}: is no run's JSON") from None
    return out


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Mean and interval of what there is; None where there is nothing."""
    found = [v for v in values if v is not None]
    if not found:
        return None
    mean, half = interval(found)
    return {"mean": mean, "half": None if math.isnan(half) else half, "n": len(found)}


def summarise(
    runs: Sequence[dict[str, Any]], limits: Sequence[float] = (0.01, 0.02, 0.05, 0.1), others: int = 0
) -> Summary:
    """Everything that a report shows, as plain JSON.

    base: target and retention before training.
    rows: each method at each rate, and its controls, on the test suites.
    methods: of each method over its rates:
        hypervolume: over the seed's points, above (the base model's target, 0);
        hypervolume_of_fewest: ``mean_hypervolume`` of ``fewest`` of them, where ``fewest`` is a number;
        best_target: for each limit of forgetting, the target on the tests at the rate that is best within it on the
            held-out suites; the base model's where none is;
        retention_at: retention at ``matched``, on the straight lines between the base model and the method's points, of
            the seeds that reach it; seeds: of how many.
    fewest: the smallest number of points that any method has of any seed; None where all have as many.
    matched: the target that every method reaches: the least of their best.
    front: labels and rates of the points that nothing dominates, of the means over seeds.
    rewinding: each method and path at its highest rate: the final model, and the point chosen on held-out suites,
        tested; against each control, the retention of the path less the control's at the control's own target, on
        held-out suites, in which nothing is chosen.
    others: runs that lie beside these and were left out.
    diverged: runs whose weights or outputs are no longer finite; they count nowhere else.
    correlations: of each metric with forgetting and with target over all runs: Pearson, Spearman, runs.

    ValueError where no run but controls is finished.
    """
    diverged = [r["run"] for r in runs if r.get("diverged")]
    runs = [r for r in runs if not r.get("diverged")]
    tops: dict[str, float] = {}
    for r in (r["run"] for r in runs if not r["run"]["control"]):
        tops[r["label"]] = max(r["rate"], tops.get(r["label"], 0.0))
    by = _grouped(runs, lambda r: (r["run"]["label"], r["run"]["rate"], r["run"]["steps"], _control(r["run"], tops)))
    rows = [_row(key, group) for key, group in by.items()]
    rows.sort(key=lambda r: (r["label"], r["control"], r["rate"]))
    methods = _grouped([r for r in runs if not r["run"]["control"]], lambda r: r["run"]["label"])
    if not methods:
        raise ValueError("no run is finished but controls")
    best = {
        label: max(e["mean"] for e in (r["target"] for r in rows if r["label"] == label and not r["control"]))
        for label in methods
    }
    matched = min(best.values())
    counts = {len(g) for group in methods.values() for g in _grouped(group, lambda r: r["run"]["seed"]).values()}
    fewest = min(counts) if len(counts) > 1 else None
    trained = [r for r in rows if not r["control"]]
    # a seed of which every run diverged does not reach the target either
    trained_of = _grouped([*diverged, *(r["run"] for r in runs)], lambda r: r["label"])
    points = [Scored(r["target"]["mean"], r["retention"]["mean"], name=f"{r['label']} {r['rate']:g}") for r in trained]
    return {
        "base": {a: estimate(_test(r["base"], a) for r in _seeds(runs).values()) for a in ("target", "retention")},
        "seeds": sorted({r["run"]["seed"] for r in runs}),
        "suites": sorted(runs[0]["base"]["test"]["suites"]),
        "rows": rows,
        "matched": matched,
        "fewest": fewest,
        "methods": {
            label: {**_method(group, matched, limits, fewest), "seeds": len({r["seed"] for r in trained_of[label]})}
            for label, group in methods.items()
        },
        "front": [p.name for p in pareto_front(points)],
        "rewinding": _rewinding([r for r in runs if r["run"]["label"] in methods], tops),
        "correlations": _correlations(runs),
        "runs": len(runs),
        "others": others,
        "diverged": [f"{r['label']} {r['rate']:g}, seed {r['seed']}" for r in diverged],
    }


def _test(scores: dict, axis: str) -> float:
    return scores["test"][axis]


def _seeds(runs: Iterable[dict]) -> dict[int, dict]:
    return {r["run"]["seed"]: r for r in runs}


def _grouped(runs: Iterable[dict], key: Callable[[dict], Any]) -> dict[Any, list[dict]]:
    out: dict[Any, list[dict]] = {}
    for r in runs:
        out.setdefault(key(r), []).append(r)
    return out


def _row(key: tuple, group: list[dict]) -> dict[str, Any]:
    label, rate, steps, control = key
    one = group[0]["run"]
    return {
        "label": label, "technique": one["technique"], "rate": rate, "steps": steps, "control": control,
        "parameters": one["parameters"], "budget": one["budget"],
        "target": estimate(_test(r["final"], "target") for r in group),
        "retention": estimate(_test(r["final"], "retention") for r in group),
        "forgetting": estimate(forgetting(r) for r in group),
        "distance": estimate(r["distance"] for r in group),
        "suites": {s: estimate(r["final"]["test"]["suites"][s] for r in group) for s in one_suites(group)},
        "seconds": estimate(r["training"]["seconds"] for r in group),
    }  # fmt: skip


def one_suites(group: list[dict]) -> list[str]:
    """The suites of a group's runs, sorted."""
    return sorted(group[0]["final"]["test"]["suites"])


def forgetting(run: dict) -> float:
    """General before less General after, on the test suites (points of the suites' own scale, 0.01 a percent)."""
    return _test(run["base"], "retention") - _test(run["final"], "retention")


def _scored(scores: dict, split: str, t: float = 0.0) -> Scored:
    return Scored(scores[split]["target"], scores[split]["retention"], t)


def mean_hypervolume(points: Sequence[Scored], reference: tuple[float, float], count: int) -> float:
    """The mean of ``hypervolume`` over all choices of ``count`` of the points.

    ValueError where there are fewer points, or ``count`` is below 1.
    """
    if not 1 <= count <= len(points):
        raise ValueError(f"count must be from 1 to the {len(points)} points; got {count}")
    # cell by cell: the share of the choices in which a point reaches it
    xs = sorted({max(p.target, reference[0]) for p in points} | {reference[0]})
    ys = sorted({max(p.retention, reference[1]) for p in points} | {reference[1]})
    every, area = math.comb(len(points), count), 0.0
    for x, right in pairwise(xs):
        for y, top in pairwise(ys):
            short = sum(p.target < right or p.retention < top for p in points)
            area += (right - x) * (top - y) * (1 - math.comb(short, count) / every)
    return area


def _method(group: list[dict], matched: float, limits: Sequence[float], fewest: int | None) -> dict[str, Any]:
    seeds = list(_grouped(group, lambda r: r["run"]["seed"]).values())
    areas, equal, kept = [], [], []
    at: dict[float, list[float]] = {x: [] for x in limits}
    for runs in seeds:
        base = runs[0]["base"]
        trained = [_scored(r["final"], "test") for r in runs]
        points, reference = [_scored(base, "test"), *trained], (base["test"]["target"], 0.0)
        areas.append(hypervolume(points, reference))
        if fewest is not None:
            equal.append(mean_hypervolume(trained, reference, fewest))
        kept.append(retention_at(points, matched))
        for x in limits:
            floor = base["held_out"]["retention"] - x
            fit = [r["final"] for r in runs if r["final"]["held_out"]["retention"] >= floor]
            best = max(fit, key=lambda f: f["held_out"]["target"], default=base)
            at[x].append(_test(best, "target"))
    return {
        "hypervolume": estimate(areas), "hypervolume_of_fewest": estimate(equal), "retention_at": estimate(kept),
        "best_target": {f"{x:g}": estimate(v) for x, v in at.items()},
    }  # fmt: skip


def _control(run: dict, tops: Mapping[str, float]) -> str:
    """A control's name.  The rate that it was made from may not be the method's highest any longer: what its own rate
    is of that one says the same of all."""
    control, top = run["control"], tops.get(run["label"])
    if not control or top is None:
        return control
    ratio = f"lr x {run['rate'] / top:g}"
    if control.startswith("lr x "):
        return ratio
    return control if run["rate"] == top else f"{ratio}, {control}"


def _rewinding(runs: Sequence[dict], tops: Mapping[str, float]) -> list[dict[str, Any]]:
    out = []
    for label, group in _grouped(runs, lambda r: r["run"]["label"]).items():
        top = tops[label]
        full = {r["run"]["seed"]: r for r in group if not r["run"]["control"] and r["run"]["rate"] == top}
        controls = _grouped([r for r in group if r["run"]["control"]], lambda r: _control(r["run"], tops))
        # a lower rate of the grid is a control too
        for rate in sorted({r["run"]["rate"] for r in group if not r["run"]["control"]} - {top}):
            less = [r for r in group if not r["run"]["control"] and r["run"]["rate"] == rate]
            controls.setdefault(f"lr x {rate / top:g}", []).extend(less)
        for name in sorted({n for r in full.values() for n in r["paths"]}):
            paths = {seed: r["paths"][name] for seed, r in full.items() if name in r["paths"]}
            found = {
                control: estimate(
                    _ahead(paths[r["run"]["seed"]], r) for r in less if r["run"]["seed"] in paths
                )
                for control, less in controls.items()
            }  # fmt: skip
            out.append({
                "label": label, "rate": top, "path": name,
                "final": {a: estimate(_test(r["final"], a) for r in full.values()) for a in ("target", "retention")},
                "chosen": {
                    a: estimate(p["test"][a] for p in paths.values())
                    for a in ("alpha", "distance", "target", "retention")
                },
                "curve": _curve(list(paths.values())), "against": found,
            })  # fmt: skip
    return out


def _ahead(path: dict, control: dict) -> float | None:
    """The path's retention less the control's where the path has the control's target; None where it never has."""
    own = control["final"]["held_out"]
    at = retention_at([Scored(p["target"], p["retention"]) for p in path["points"]], own["target"])
    return None if at is None else at - own["retention"]


def _curve(paths: list[dict]) -> list[dict[str, float]]:
    """Means over seeds of a path's held-out points."""
    out = []
    for points in zip(*(p["points"] for p in paths), strict=True):
        names = ("alpha", "distance", "target", "retention")
        out.append({n: sum(p[n] for p in points) / len(points) for n in names})
    return out


def _correlations(runs: Sequence[dict]) -> list[dict[str, Any]]:
    out = []
    for name in sorted({n for r in runs for n in r["metrics"]} | {"distance"}):
        having = [r for r in runs if name == "distance" or name in r["metrics"]]
        x = [r["distance"] if name == "distance" else r["metrics"][name] for r in having]
        row: dict[str, Any] = {"metric": name, "runs": len(having)}
        for against, values in (
            ("forgetting", [forgetting(r) for r in having]), ("target", [_test(r["final"], "target") for r in having])
        ):  # fmt: skip
            for kind, function in (("pearson", pearson), ("spearman", spearman)):
                r = function(x, values)
                row[f"{kind}_{against}"] = None if math.isnan(r) else r
        out.append(row)
    return sorted(out, key=lambda r: -abs(r["pearson_forgetting"] or 0))
