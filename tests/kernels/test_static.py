"""Offline compilation for four architectures: no spills, registers within the checked-in budget, wide accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BUDGET = json.loads((BENCHMARKS / "results" / "static.json").read_text())


@pytest.fixture(scope="module")
def compiled():
    """Counts by kernel/objective/dtype/target; a process of its own, since this one interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "static.py"), "--reduced", "--json", "-"],
        capture_output=True, text=True, timeout=400, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout.rsplit("\n", 2)[0])
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_all_kernels_compile_for_all_targets(compiled):
    names = {tuple(name.split("/")[::3]) for name in compiled["kernels"]}
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    assert names == {(kernel, target) for kernel in ("fold", "jsd", "grad") for target in targets}


def test_nothing_spills(compiled):
    for name, counts in compiled["kernels"].items():
        assert counts["spills"] == [0, 0] and counts["stack"] == 0, (name, counts)


def test_registers_are_within_the_budget(compiled):
    assert (compiled["block"], compiled["threads"]) == (BUDGET["block"], BUDGET["threads"]), "run benchmarks/static.py"
    for name, counts in compiled["kernels"].items():
        allowed = 1.25 * BUDGET["kernels"][name]["registers"]
        assert counts["registers"] <= allowed, (name, counts["registers"], allowed)


def test_tiles_move_in_128_bit_accesses(compiled):
    """And fold's loop has neither barrier nor shuffle."""
    for name, counts in compiled["kernels"].items():
        kernel, objective, dtype, _ = name.split("/")
        a_tile = 1 if dtype == "bf16" else 2  # 128-bit accesses a thread: 2048 entries over 256 threads
        tiles = 1 if objective == "nll" else 2
        assert counts["loads"] == f"{tiles * a_tile}x128", (name, counts)
        assert counts["stores"] == (f"{a_tile}x128" if kernel == "grad" else "narrow"), (name, counts)
        assert not counts["barriers"], (name, counts)
