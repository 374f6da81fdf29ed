"""The segmented row sum of every backend: the gradient of an embedding's rows, bit for bit where that is promised."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.kernels import dispatch, segment_sum_torch, segment_sum_triton

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: M, D, vocabulary: primes, more rows than tokens, one of each, and nothing at all.
SHAPES = [(97, 37, 23), (64, 16, 7), (1, 1, 3), (61, 33, 101), (0, 5, 3), (5, 0, 3)]


class Sorted:
    """The twin as it runs on a device, where it may not look at the tokens."""

    @staticmethod
    def segment_sum(grad, tokens, start, stop, padding_idx, out):
        segment_sum_torch._sorted(grad, tokens, start, stop, padding_idx, out)


@pytest.fixture(params=["torch", "torch, sorted", "triton", "host"])
def kernels(request, device, monkeypatch):
    if request.param == "host" and device.type != "cpu":
        pytest.skip("the host backend serves the CPU")
    monkeypatch.setattr(segment_sum_triton, "BLOCK", 16)
    return Sorted if request.param == "torch, sorted" else dispatch.segment_sum(request.param)


def problem(m, d, v, *, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    grad = torch.randn(m, d, generator=g, dtype=torch.float64) * torch.randn(m, d, generator=g).mul(3).exp()
    return grad.to(dtype).to(device), torch.randint(0, v, (m,), generator=g).to(device)


def ranges(v):
    """[start, stop) and padding_idx: all, a part with and without the padding, one row, none."""
    a, b = v // 4, v - v // 4
    return [(0, v, None), (0, v, 1), (a, b, a), (a, b, 0), (v - 1, v, None), (a, a, None)]


def run(kernels, grad, tokens, start, stop, padding_idx):
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    out = torch.full((stop - start, grad.shape[1]), float("nan"), dtype=dtype, device=grad.device)
    kernels.segment_sum(grad, tokens, start, stop, padding_idx, out)
    return out


def dense(grad, tokens, v, padding_idx):
    weight = torch.zeros(v, grad.shape[1], dtype=grad.dtype, device=grad.device, requires_grad=True)
    F.embedding(tokens, weight, padding_idx=padding_idx).backward(grad)
    return weight.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_of_the_dense_gradient(kernels, shape, threads):
    """On the CPU in fp32, with tokens that come up again and again."""
    grad, tokens = problem(*shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for start, stop, padding_idx in ranges(shape[2]):
            want = dense(grad, tokens, shape[2], padding_idx)[start:stop]
            if kernels is not segment_sum_triton or not torch.cuda.is_available():
                assert torch.equal(run(kernels, grad, tokens, start, stop, padding_idx), want), (start, stop)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_every_dtype_is_summed_in_order_and_in_fp32(kernels, dtype, shape, device):
    """Against a loop over m: the same bits, whatever the dtype."""
    grad, tokens = problem(*shape, dtype=DTYPES[dtype], device=device, seed=1)
    for start, stop, padding_idx in ranges(shape[2]):
        out = run(kernels, grad, tokens, start, stop, padding_idx)
        want = torch.zeros_like(out)
        for row, token in zip(grad, tokens.tolist(), strict=True):
            if start <= token < stop and token != padding_idx:
                want[token - start] += row.to(want.dtype)
        assert torch.equal(out, want), (start, stop, padding_idx)
        assert torch.equal(out, run(kernels, grad, tokens, start, stop, padding_idx))


def test_tokens_outside_the_range_and_negative_ones_are_ignored(kernels, device):
    grad, tokens = problem(97, 37, 23, device=device)
    wild = torch.tensor([-1, -100, 23, 1 << 40, -(1 << 62)], device=device)[torch.arange(97, device=device) % 5]
    mixed = torch.where(torch.arange(97, device=device) % 3 == 0, wild, tokens)
    grad = torch.where((mixed == wild)[:, None], float("nan"), grad)
    out = run(kernels, grad, mixed, 0, 23, 2)
    assert torch.equal(out, run(kernels, grad[mixed == tokens], tokens[mixed == tokens], 0, 23, 2))
    assert not out[2].any() and out.isfinite().all()


def test_rows_of_any_stride_and_an_output_within_another(kernels, device):
    grad, tokens = problem(53, 37, 11, device=device)
    want = run(kernels, grad, tokens, 2, 9, None)
    wide = torch.full((53, 3, 40), float("nan"), device=device)
    wide[:, 1, :37] = grad
    around = torch.full((9, 50), 7.0, device=device)
    kernels.segment_sum(wide[:, 1, :37], tokens, 2, 9, None, around[1:8, 5:42])
    assert torch.equal(around[1:8, 5:42], want)
    around[1:8, 5:42] = 7.0
    assert (around == 7).all()
    one = torch.ones(1, 37, device=device).expand(53, 37)
    counts = torch.bincount(tokens, minlength=11)[2:9]
    assert torch.equal(run(kernels, one, tokens, 2, 9, None), counts[:, None].expand(7, 37).float())


def test_one_token_for_all(kernels, device):
    """The longest segment there can be; the others empty."""
    grad, _ = problem(101, 33, 5, device=device)
    tokens = torch.full((101,), 3, device=device)
    out = run(kernels, grad, tokens, 0, 5, None)
    want = grad[0].clone()
    for row in grad[1:]:
        want += row
    assert torch.equal(out[3], want) and not out[[0, 1, 2, 4]].any()


def test_a_block_of_the_real_size(device, monkeypatch):
    monkeypatch.setattr(segment_sum_triton, "BLOCK", 1024)
    grad, tokens = problem(19, 1025, 5, device=device)
    want = run(Sorted, grad, tokens, 1, 5, None)
    assert torch.equal(run(segment_sum_triton, grad, tokens, 1, 5, None), want)


@pytest.mark.parametrize("kernels", ["sorted", "triton"])
def test_nothing_waits_for_the_device(kernels):
    """No operation whose result the host would look at."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    names: set[str] = set()
    syncs = {"_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "unique_dim", "bincount"}
    grad, tokens = problem(31, 8, 5)
    with Seen():
        run({"sorted": Sorted, "triton": segment_sum_triton}[kernels], grad, tokens, 1, 4, 2)
    assert "sort" in names and not names & syncs, names
    with Seen():
        segment_sum_torch._in_order(grad, tokens, 1, 4, 2, torch.empty(3, 8))
    assert names & syncs or "index" in names  # the form of the CPU would be caught


def test_wrong_operands_are_refused():
    grad, tokens = problem(5, 4, 3)
    for kernels in (segment_sum_torch, segment_sum_triton):

        def call(grad=grad, tokens=tokens, start=0, stop=3, padding_idx=None, out=None, kernels=kernels):
            kernels.segment_sum(grad, tokens, start, stop, padding_idx, torch.empty(3, 4) if out is None else out)

        for error, match, wrong in (
            (ValueError, r"out must be \(3, 4\)", {"out": torch.empty(2, 4)}),
            (TypeError, "out must be torch.float32", {"out": torch.empty(3, 4, dtype=torch.bfloat16)}),
            (TypeError, "out must be torch.float64", {"grad": grad.double()}),
            (TypeError, "tokens must be int64", {"tokens": tokens.int()}),
            (ValueError, "must be \\(M, D\\) and", {"tokens": tokens[:3]}),
            (ValueError, "unit stride", {"grad": grad.repeat(1, 2)[:, ::2]}),
            (ValueError, "range of rows", {"start": 4}), (ValueError, "range of rows", {"start": -1}),
            (ValueError, "padding_idx", {"padding_idx": -1}),
        ):  # fmt: skip
            with pytest.raises(error, match=match):
                call(**wrong)


def test_backends_have_one_signature():
    assert inspect.signature(segment_sum_torch.segment_sum) == inspect.signature(segment_sum_triton.segment_sum)
    assert dispatch.segment_sum("host") is segment_sum_torch
