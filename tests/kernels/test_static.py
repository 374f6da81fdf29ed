"""Offline compilation for four architectures: within the checked-in budgets, no spills, wide accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULT = json.loads((BENCHMARKS / "results" / "static.json").read_text())
BUDGETS = json.loads((BENCHMARKS / "budgets.json").read_text())


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


def test_registers_and_shared_memory_are_within_the_budgets(compiled):
    for name, counts in compiled["kernels"].items():
        kernel, objective, _, target = name.split("/")
        registers, shared = BUDGETS[f"{kernel}/{objective}"][target]
        assert counts["registers"] <= registers and counts["shared"] <= shared, (name, counts, registers, shared)


def test_the_committed_result_is_of_this_launch_and_within_the_budgets(compiled):
    assert (compiled["block"], compiled["threads"]) == (RESULT["block"], RESULT["threads"]), "run benchmarks/static.py"
    for name, counts in RESULT["kernels"].items():
        kernel, objective, _, target = name.split("/")
        registers, shared = BUDGETS[f"{kernel}/{objective}"][target]
        assert counts["registers"] <= registers and counts["shared"] <= shared and counts["spills"] == [0, 0], name


def test_a_kernel_over_its_budget_is_named():
    """The comparison behind ``static.py --check``, in a process of its own: it must be able to fail."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import static\n"
        "table = {'fold/nll/bf16/sm_90': {'registers': 999, 'shared': 0, 'spills': [0, 4], 'stack': 0},\n"
        "         'new/nll/bf16/sm_90': {}}\n"
        "print(json.dumps(static.exceeded(table)))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(BENCHMARKS)], capture_output=True, text=True, env=environment
    )  # fmt: skip
    over = json.loads(done.stdout.splitlines()[-1])
    assert [line.split(": ")[1].split()[0] for line in over] == ["registers", "spills", "no"], (over, done.stderr)


def test_tiles_move_in_128_bit_accesses(compiled):
    """And fold's loop has neither barrier nor shuffle.  What is narrower is a row's scalars, 2 to 8 bytes."""
    for name, counts in compiled["kernels"].items():
        kernel, objective, dtype, _ = name.split("/")
        a_tile = 1 if dtype == "bf16" else 2  # 16-byte accesses a thread: 2048 entries over 256 threads
        tiles = 1 if objective == "nll" else 2
        loads, stores = (_accesses(counts[what]) for what in ("loads", "stores"))
        assert loads.pop(16) == tiles * a_tile and all(width <= 8 for width in loads), (name, counts)
        assert stores.pop(16, 0) == (a_tile if kernel == "grad" else 0), (name, counts)
        assert not stores if kernel == "grad" else set(stores) == {4}, (name, counts)
        assert not counts["barriers"], (name, counts)


def _accesses(text: str) -> dict[int, int]:
    """ "2x16 5x4" -> {16: 2, 4: 5}."""
    return {int(width): int(count) for count, width in (part.split("x") for part in text.split())}
