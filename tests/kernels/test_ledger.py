"""The ledger: bytes counted in the interpreter are those of the formula, and the count can fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import rotation_problems
import rowcheck
import torch
import triton
import triton.language as tl
from rowcheck import problem, spec_of

if torch.cuda.is_available():
    pytest.skip("counts are taken in Triton's interpreter", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ledger

from burnish.kernels import rotation_triton, rows_triton, segment_sum_triton
from burnish.kernels.contract import COEF, STATISTICS, new_state

N, V = 3, 37


@triton.jit
def read_twice(X, OUT, columns, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    inside = cols < columns
    x = tl.load(X + cols, mask=inside, other=0.0)
    tl.store(OUT + cols, x + tl.load(X + cols, mask=inside, other=0.0), mask=inside)


def test_what_is_masked_is_not_counted_and_what_is_read_twice_is_counted_twice():
    x, out = torch.ones(V), torch.zeros(V)
    with ledger.counted() as launches:
        read_twice[(1,)](x, out, V, BLOCK=64)
    (launch,) = launches
    assert (launch.reads, launch.writes) == ({"X": 2 * V}, {"OUT": V})
    assert launch.operations == {"add": 64}  # lanes, masked or not
    assert torch.equal(out, 2 * x)


def test_counting_ends_with_the_context():
    with ledger.counted() as launches:
        pass
    read_twice[(1,)](torch.ones(V), torch.zeros(V), V, BLOCK=64)
    assert launches == []


def test_nll_reads_a_logit_once_in_fold_and_once_in_grad(small_blocks):
    p, spec = problem(N, V, dtype=torch.float32), spec_of()
    with ledger.counted() as launches:
        stats = rowcheck.fold(rows_triton, p, spec)
        rowcheck.grad(rows_triton, p, spec, stats)
    fold, grad = launches
    assert fold.reads["Z"] == N * V + N and "OUT" not in fold.writes  # and the label's once more
    assert grad.reads["Z"] == N * V and grad.writes == {"OUT": N * V}
    assert not fold.reads["T"] and not grad.reads["T"]


@pytest.mark.parametrize(
    "stats", [(), ("mix",), ("mix_lse",), ("jsd",), ("mean", "other"), STATISTICS], ids=lambda s: "+".join(s)[:20]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("columns", "start"), [(V, 0), (16, 5), (1, 0)])
def test_ours_issue_what_the_formula_says(small_blocks, stats, dtype, columns, start):
    p = problem(N, columns, dtype=dtype)
    p.target[:] = torch.tensor([start + columns - 1, start + columns, -100])  # last column, one beyond, ignored
    spec = spec_of(*stats, temperature=True, teacher_temperature=True)
    temps = {"inv_temp": p.inv_temp.float(), "teacher_inv_temp": p.teacher_inv_temp.float()}
    state = new_state(N, torch.float32, p.tile.device)
    ids = {"ids": p.ids, "ids_grad": p.upstream["ids"].float()} if spec.has("ids") else {}
    with ledger.counted() as launches:
        rows_triton.fold(p.tile, p.teacher, state, p.target, spec, start=start, **temps)
        if spec.has("jsd"):
            rows_triton.fold_jsd(p.tile, p.teacher, state, spec, **temps)
        out, coef = torch.zeros_like(p.tile), torch.zeros(len(COEF), N)
        rows_triton.grad(p.tile, p.teacher, out, coef, p.target, spec, start=start, **temps, **ids)
    assert len(launches) == 2 + spec.has("jsd")
    assert ledger.violations(launches) == []
    launches[0].reads["Z"] += 1
    assert ledger.violations(launches) != []


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("name", ledger.ADAMW)
def test_adamw_issues_what_the_formula_says(name, found_inf):
    """Whole tiles, ragged ones, one element; after an overflow nothing but scalars is read, and nothing is written."""
    with ledger.counted() as launches:
        ledger.launch_adamw(*ledger.ADAMW[name], sizes=(2048, 1, 1025, 300, 16), found_inf=found_inf)
    (launch,) = launches
    assert ledger.violations(launches) == []
    assert bool(launch.writes) != bool(found_inf) and launch.reads["GRAD"] == (0 if found_inf else 3424)
    launch.reads["GRAD"] += 1
    assert ledger.violations(launches) != []


@pytest.mark.parametrize("padding_idx", [None, 3, 9])
def test_a_segmented_sum_issues_what_the_formula_says(padding_idx, monkeypatch):
    monkeypatch.setattr(segment_sum_triton, "BLOCK", 16)
    tokens = torch.arange(29) % 7 - 1
    with ledger.counted() as launches:
        segment_sum_triton.segment_sum(torch.ones(29, V), tokens, 2, 6, padding_idx, torch.empty(4, V))
    (launch,) = launches
    assert ledger.violations(launches) == []
    found = sum(2 <= t < 6 and t != padding_idx for t in tokens.tolist())
    assert (launch.reads["GRAD"], launch.writes) == (found * V, {"OUT": 4 * V})
    launch.writes["OUT"] -= 1
    assert ledger.violations(launches) != []


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(67, 5, 20), (33, 4, 16), (300, 2, 32)], ids=str)
def test_the_block_rotation_issues_what_the_formula_says(shape, shared):
    """x is read once and y written once; backward reads x and dy once and writes dx once."""
    p = rotation_problems.problem(shape, shared=shared).to(torch.bfloat16)
    with ledger.counted() as launches:
        rotation_triton.forward(p.x, p.delta())
        rotation_triton.backward(p.x, p.delta(), p.dy, wanted=(True, True))
    rotate, backward = launches
    assert ledger.violations(launches) == []
    assert rotate.reads["X"] == rotate.writes["OUT"] == backward.reads["DY"] == backward.writes["DX"] == p.x.numel()
    backward.reads["X"] += 1
    assert ledger.violations(launches) != []


def test_a_path_without_large_tensors_in_torch():
    """linear_loss and row_loss give the reference's loss and leave nothing of the logits' size to torch."""
    path = next(p for p in ledger.ours() if (p.name, p.objective) == ("linear_loss", "target_sft"))
    v = 1024  # a multiple of 16: no column is padded; and wide enough that no state is taken for logits
    counts = ledger.run(path, torch.bfloat16, v)
    assert counts["host_bytes"] == 0
    assert counts["writes"] == 1 and counts["reads"] == pytest.approx(4 + 1 / v, abs=1e-4)
    # fp32 logits of student and teacher twice, a bf16 gradient once
    assert counts["kernel_bytes"] == pytest.approx(4 * (4 + 1 / v) + 2, abs=1e-3)
