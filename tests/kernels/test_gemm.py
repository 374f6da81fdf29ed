"""Products of bf16 operands with fp32 results on CPUs with tile registers: ``host/gemm.cpp``."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from burnish import linear_loss, linear_stats, objectives
from burnish.kernels import gemm_host, host_build, rows_host
from burnish.ops import gemm

CPUINFO = Path("/proc/cpuinfo")

# by what the system says, not by what the library does: one that refuses to load must fail here
pytestmark = pytest.mark.skipif(
    not CPUINFO.exists() or "amx_bf16" not in CPUINFO.read_text() or shutil.which("c++") is None,
    reason="this CPU has no tile registers (AMX), or there is no compiler",
)


def operands(m, n, k, a_columns, b_columns, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(k, m, generator=g).bfloat16().t() if a_columns else torch.randn(m, k, generator=g).bfloat16()
    b = torch.randn(n, k, generator=g).bfloat16().t() if b_columns else torch.randn(k, n, generator=g).bfloat16()
    return a, b


def test_it_is_there():
    assert gemm_host.supported(), host_build._reason


SHAPES = [
    (1, 1, 1), (32, 32, 32), (33, 31, 65), (7, 200, 40), (200, 7, 40), (130, 129, 127), (300, 300, 5), (1, 500, 3),
    (17, 19, 3000), (64, 96, 2500), (600, 40, 9000), (40, 700, 2100), (700, 40, 2100),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_is_that_of_fp64_up_to_fp32_sums(shape):
    """Every layout, on either side of every edge; beside the rows written, nothing is."""
    m, n, k = shape
    for a_columns, b_columns, add in itertools.product((False, True), repeat=3):
        a, b = operands(m, n, k, a_columns, b_columns)
        start = torch.randn(m, n + 5)
        out = start.clone()
        gemm_host.product(a, b, out[:, 2 : n + 2], add=add)
        want = a.double() @ b.double() + (start[:, 2 : n + 2].double() if add else 0)
        size = a.double().abs() @ b.double().abs() + start.abs().max()
        # products are exact in fp32; of k sums each rounds once, and the CPU sums pairs first
        assert ((out[:, 2 : n + 2] - want).abs() <= 2**-24 * (k + 2) * size).all()
        assert (out[:, 2 : n + 2] - want).norm() <= 4 * 2**-24 * (k**0.5 + 1) * want.norm() + 1e-30
        assert torch.equal(out[:, :2], start[:, :2]) and torch.equal(out[:, n + 2 :], start[:, n + 2 :])


def test_slices_of_larger_matrices_and_copies_of_what_has_no_contiguous_side():
    big = torch.randn(200, 300).bfloat16()
    for a in (big[3:50, 7:107], big[7:107, 3:50].t(), big[::2, ::3][:47, :100]):
        b = big[100:200, 11:60]
        out = torch.empty(47, 49)
        gemm_host.product(a, b, out)
        want = a.double() @ b.double()
        assert (out - want).norm() < 1e-6 * want.norm()
    with pytest.raises(ValueError, match="contiguous rows"):
        gemm_host.product(big[:4, :8], big[:8, :4], torch.empty(4, 4).t())


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_empty_sides(shape):
    m, n, k = shape
    for add in (False, True):
        out = torch.ones(m, n)
        gemm_host.product(torch.ones(m, k).bfloat16(), torch.ones(k, n).bfloat16(), out, add=add)
        assert torch.equal(out, torch.full((m, n), float(add)))


def test_special_values_stay_in_their_rows():
    a, b = operands(70, 40, 50, False, True)
    a = a.clone()
    a[3, 7], a[40, 2] = torch.inf, torch.nan
    out, clean = torch.empty(70, 40), torch.empty(70, 40)
    gemm_host.product(a, b, out)
    gemm_host.product(torch.nan_to_num(a, nan=0.0, posinf=0.0), b, clean)
    others = [i for i in range(70) if i not in (3, 40)]
    assert torch.equal(out[others], clean[others])
    assert not out[[3, 40]].isfinite().any()


def test_bits_do_not_depend_on_other_rows_or_on_the_number_of_threads():
    a, b = operands(300, 500, 300, False, True)
    whole, few = torch.empty(300, 500), torch.empty(37, 500)
    gemm_host.product(a, b, whole)
    gemm_host.product(a[100:137], b, few)
    assert torch.equal(whole[100:137], few)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = torch.empty_like(whole)
            gemm_host.product(a, b, again)
            assert torch.equal(again, whole)
    finally:
        torch.set_num_threads(threads)


def test_torch_s_own_products_work_beside_it():
    """oneDNN keeps its own shapes in the tiles' configuration of a thread."""
    x, w = torch.randn(64, 256).bfloat16(), torch.randn(96, 256).bfloat16()
    want, out = x @ w.t(), torch.empty(64, 96)
    for _ in range(3):
        gemm_host.product(x, w.t(), out)
        assert torch.equal(x @ w.t(), want)


def test_which_operands_get_it():
    cpu, bf16, fp16, fp32 = torch.device("cpu"), torch.bfloat16, torch.float16, torch.float32
    assert gemm.mode(bf16, bf16, cpu, fp32, "host") == "mixed"
    assert gemm.mode(bf16, bf16, cpu, fp32, "torch") == "upcast"  # the twin is plain torch
    assert gemm.mode(fp16, fp16, cpu, fp32, "host") == "upcast"
    assert gemm.mode(fp32, bf16, cpu, fp32, "host") == "upcast"
    assert gemm.mode(fp32, fp32, cpu, fp32, "host") == "native"


@pytest.mark.parametrize("plan", ["tokens", "vocab"])
@pytest.mark.parametrize("name", ["nll", "gem", "confidence_penalty"])
def test_a_loss_is_the_twin_s_up_to_the_rounding_of_dz(name, plan):
    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(300, 64, generator=g).bfloat16(), torch.randn(1009, 64, generator=g).bfloat16()
    y = torch.randint(0, 1009, (300,), generator=g)
    y[::7] = -100
    o, found = getattr(objectives, name)(), {}
    for backend in ("host", "torch"):
        leaves = [v.clone().requires_grad_() for v in (x, w)]
        loss = linear_loss(*leaves, y, o, plan=plan, backend=backend)
        found[backend] = (loss.detach(), *torch.autograd.grad(loss, leaves))
    exact = [v.double().requires_grad_() for v in (x, w)]
    loss = linear_loss(*exact, y, o, backend="torch")
    wants = (loss.detach(), *torch.autograd.grad(loss, exact))
    for got, twin, want in zip(found["host"], found["torch"], wants, strict=True):
        # dz is bf16 here: 2^-9 of each entry at most, beside the rounding of the gradients themselves
        assert (got - want).norm() <= (twin - want).norm() + 2**-9 * want.norm() + 1e-6
    assert (found["host"][0] - wants[0]).abs() < 1e-5 * wants[0].abs()  # logits are fp32


def test_statistics_are_of_fp32_logits():
    g = torch.Generator().manual_seed(2)
    x, w = torch.randn(50, 128, generator=g).bfloat16(), torch.randn(700, 128, generator=g).bfloat16()
    y = torch.randint(0, 700, (50,), generator=g)
    got = linear_stats(x, w, y, stats=("logp", "entropy"), backend="host")
    want = torch.log_softmax(x.double() @ w.double().t(), -1)
    assert (got.logp - want.gather(1, y[:, None])[:, 0]).abs().max() < 1e-4
    assert (got.entropy + (want.exp() * want).sum(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scaled_has_the_bits_of_torch(dtype):
    x = torch.randn(37, 1031)
    x[0, :3] = torch.tensor([torch.inf, torch.nan, 1e38])
    for factor in (1.0, 1 / 3, 1e-3):
        assert torch.equal(
            rows_host.scaled(x, factor, dtype).nan_to_num(7.0), (x * factor).to(dtype).nan_to_num(7.0)
        )
    assert rows_host.scaled(x[:0], 2.0, dtype).shape == (0, 1031)


def test_without_tiles_it_is_an_error_and_heads_are_cast_up(monkeypatch):
    monkeypatch.setattr(gemm_host, "supported", lambda: False)
    with pytest.raises(RuntimeError, match="no tile registers"):
        gemm_host.product(torch.ones(2, 2).bfloat16(), torch.ones(2, 2).bfloat16(), torch.empty(2, 2))
    assert gemm.mode(torch.bfloat16, torch.bfloat16, torch.device("cpu"), torch.float32, "host") == "upcast"
