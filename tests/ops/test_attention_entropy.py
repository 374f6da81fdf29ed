"""The streaming probe: dense statistics, however the keys are split, and nothing that waits or grows."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.kernels import probe as contract
from burnish.ops import attention_entropy as module
from burnish.ops.attention_entropy import attention_entropy


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def operands(b=2, heads=4, key_heads=2, queries=13, keys=60, d=20, dtype=torch.float64, device="cpu", sharp=1.0):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(b, heads, queries, d, generator=g, dtype=torch.float64) * sharp
    k = torch.randn(b, key_heads, keys, d, generator=g, dtype=torch.float64)
    return q.to(dtype).to(device), k.to(dtype).to(device)


def dense(q, k, frames=None):
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = q.double() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    p = s.softmax(-1)
    mass = None if frames is None else p.unflatten(-1, (frames, -1)).sum(-1)
    return s.logsumexp(-1), -(p * s.log_softmax(-1)).sum(-1), p.amax(-1), mass


@pytest.mark.parametrize("split", [1, 7, 16, 4096])
@pytest.mark.parametrize("frames", [None, 1, 5, 60])
def test_it_is_the_dense_statistic_however_keys_are_split(backend, split, frames, device, monkeypatch):
    monkeypatch.setattr(module, "SPLIT", split)
    q, k = operands(device=device)
    got = attention_entropy(q, k, frames=frames, backend=backend)
    for name, a, b in zip(got._fields, got, dense(q, k, frames), strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert torch.allclose(a, b, rtol=0, atol=1e-13), name


@pytest.mark.parametrize("queries", [1, 16, 77])
@pytest.mark.parametrize("keys", [1, 63, 65, 128])
def test_ragged_blocks(backend, queries, keys, device, poison):
    q, k = operands(queries=queries, keys=keys, device=device)
    for a, b in zip(attention_entropy(q, k, backend=backend)[:3], dense(q, k)[:3], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(backend, dtype, device):
    q, k = operands(dtype=dtype, device=device)
    got = attention_entropy(q, k, frames=4, backend=backend)
    for a, b in zip(got, dense(q, k, 4), strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a.double(), b, rtol=0, atol=3e-6)


def test_flat_and_sharp(backend, device):
    q, k = operands(device=device)
    flat = attention_entropy(torch.zeros_like(q), k, frames=4, backend=backend)
    assert torch.allclose(flat.entropy, torch.full_like(flat.entropy, math.log(60)), rtol=0, atol=1e-14)
    assert torch.allclose(flat.top1, torch.full_like(flat.top1, 1 / 60)) and torch.allclose(
        flat.frame_mass, torch.full_like(flat.frame_mass, 1 / 4)
    )
    q, k = operands(device=device, sharp=1e6)
    sharp = attention_entropy(q, k, backend=backend)
    assert (sharp.entropy >= 0).all() and (sharp.entropy < 1e-6).all() and (sharp.top1 > 1 - 1e-6).all()


def test_heads_of_a_slice_and_rows_of_any_stride(backend, device):
    q, k = operands(heads=8, key_heads=8, device=device)
    want = attention_entropy(q[:, ::5].contiguous(), k[:, ::5].contiguous(), backend=backend)
    got = attention_entropy(q[:, ::5], k.transpose(1, 2).contiguous().transpose(1, 2)[:, ::5], backend=backend)
    for a, b in zip(got[:3], want[:3], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)


def test_frames_longer_than_a_split_are_cut_into_equal_parts(monkeypatch):
    seen = []
    real = module._probe
    monkeypatch.setattr(module, "_probe", lambda q, k, scale, split, backend: seen.append(split) or real(
        q, k, scale, split, backend))  # fmt: skip
    monkeypatch.setattr(module, "SPLIT", 8)
    q, k = operands()
    for frames, split in ((1, 6), (2, 6), (3, 5), (5, 6), (12, 5)):
        attention_entropy(q, k, frames=frames)
        assert seen.pop() == split


def test_no_gradient_and_no_score_matrix():
    q, k = operands(dtype=torch.float32)
    assert not attention_entropy(q.requires_grad_(), k).entropy.requires_grad
    partial = contract.new_partial(q, 3)
    assert partial.top.shape == (*q.shape[:3], 3)


def test_compiled_equals_eager():
    torch._dynamo.reset()
    q, k = operands(dtype=torch.float32)

    def f(q, k):
        return attention_entropy(q * 2, k, frames=5)

    for a, b in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(q, k), f(q, k), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "q must be a tensor", {"q": None}),
        (TypeError, "one floating dtype", {"k": torch.zeros(2, 2, 60, 20)}),
        (ValueError, "frames must divide", {"frames": 7}),
        (ValueError, "frames must divide", {"frames": 0}),
        (ValueError, "heads that divide", {"k": torch.zeros(2, 3, 60, 20, dtype=torch.float64)}),
        (ValueError, r"\(B, heads, length, D\)", {"k": torch.zeros(60, 20, dtype=torch.float64)}),
        (ValueError, "must have keys", {"k": torch.zeros(2, 2, 0, 20, dtype=torch.float64)}),
    ],
)
def test_bad_arguments_are_named(error, match, change):
    q, k = operands()
    with pytest.raises(error, match=match):
        attention_entropy(**{"q": q, "k": k, **change})
