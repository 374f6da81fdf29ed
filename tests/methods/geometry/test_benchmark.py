"""benchmarks/geometry.py at a size that takes no time: every way says the same, and the page's table is made of it."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "geometry.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak RSS is read from Linux's /proc")
def test_every_way_agrees_and_the_table_holds_them():
    spec = importlib.util.spec_from_file_location("geometry_benchmark", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    w0 = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    w1 = script.tuned(w0, 1)
    assert float((w1 - w0).norm() / w0.norm()) == pytest.approx(script.SHARE, rel=1e-4)
    parts = {
        "matrices": script.matrix(w0, w1, 2), "stable": script.stable(w0, w1, 2),
        "procrustes": script.procrustes(16, 1),
    }  # fmt: skip
    for rows in parts.values():
        for row in rows:
            # one Gram matrix has half the digits, of which a difference of norms leaves none
            if row["way"] != "one Gram matrix":
                assert row["errors"] and all(e < 1e-3 for e in row["errors"].values()), row
            assert row["seconds"] > 0 and row["added_bytes"] >= 0
    by = {row["way"]: row["errors"] for row in parts["matrices"]}
    assert by["weight_geometry"]["retention"] < by["svd, fp32"]["retention"]
    result = {name: [{"name": "small", "rows": rows}] for name, rows in parts.items()} | {
        "torch": "2", "threads": 1, "repeats": 2, "capability": "AVX2",
        "whole": {"matrices": 1, "parameters": 960, "seconds": 1.0, "added_bytes": 0, "largest_bytes": 3840,
                  "average": {"relative": 0.01, "stable_rank": 2.0}},
    }  # fmt: skip
    text = script.table(result)
    assert all(way in text for rows in parts.values() for way in (r["way"] for r in rows))
