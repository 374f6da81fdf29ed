"""Whole arenas: what a run writes, what a killed one does again, how several processes share the runs."""

import json
import os
import signal
import subprocess
import sys
import time

import arenas
import pytest
import torch
import yaml

from burnish.cli import main
from burnish.methods import load_model
from burnish.methods.peft_arena import arena as arena_module
from burnish.methods.peft_arena import all_techniques, make_config
from burnish.methods.peft_arena.arena import Arena, snapshot


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return arenas.base(tmp_path_factory.mktemp("model") / "base")


def write(folder, values):
    file = folder / "arena.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def without_times(run):
    return {**{k: v for k, v in run.items() if k not in ("seconds", "training")}, "loss": run["training"]["loss"]}


def test_every_technique_runs(model, tmp_path, capsys):
    methods = [{"method": name, "lr": 1e-2, **({"r": 2} if t.size == "r" else {})} for name, t in all_techniques().items()]
    values = arenas.values(model, tmp_path / "out", methods=methods, controls={"steps": [3]}, metrics={"rows": 4})
    assert main(["peft-arena", "run", write(tmp_path, values)]) == 0
    runs = [json.loads(p.read_text()) for p in (tmp_path / "out" / "runs").glob("*.json")]
    assert len(runs) == 2 * len(methods)
    for run in runs:
        assert set(run["final"]["test"]["suites"]) == {"prefix", "copy", "sort"}
        # General is the mean of the named suites, and of nothing else
        suites = run["final"]["test"]["suites"]
        assert run["final"]["test"]["retention"] == pytest.approx((suites["copy"] + suites["sort"]) / 2)
        assert run["distance"] > 0 and all(torch.isfinite(torch.tensor(v)) for v in run["metrics"].values())
        family = all_techniques()[run["run"]["technique"]].family
        assert list(run["paths"]) == (
            [] if run["run"]["control"] else {"full": ["line"], "lora": ["scale"],
                                              "oft": ["generator", "safe", "min", "line"]}[family]
        )  # fmt: skip
        for path in run["paths"].values():
            first, *_, last = path["points"]
            assert (first["alpha"], first["distance"], first["target"]) == (0, 0, run["base"]["held_out"]["target"])
            assert last["distance"] <= 1 + 1e-5
    assert not list((tmp_path / "out" / "training").glob("*"))
    html = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in html and "src=" not in html and "@import" not in html and '<link' not in html
    assert all("w3.org" in part[:40] for part in html.split("http")[1:])  # names of XML, which nothing fetches
    # a second time nothing is left to do
    capsys.readouterr()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").glob("*.json")}
    assert main(["peft-arena", "run", write(tmp_path, values)]) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").glob("*.json")} == stamps
    assert f"{len(runs)} of {len(runs)} runs are done already" in capsys.readouterr().err
