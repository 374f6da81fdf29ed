"""The bf16 shim: what the interpreter computes with it is what hardware, and torch, compute."""

from __future__ import annotations

import interpreter
import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not used where a GPU is")


@triton.jit
def _cast(X, OUT, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + i, tl.load(X + i, mask=i < n, other=0.0).to(OUT.dtype.element_ty), mask=i < n)


@triton.jit
def _arithmetic(X, Y, ADD, MUL, LESS, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(X + i, mask=i < n, other=0.0), tl.load(Y + i, mask=i < n, other=0.0)
    tl.store(ADD + i, x + y, mask=i < n)
    tl.store(MUL + i, x * y + 1.5, mask=i < n)
    tl.store(LESS + i, (x < y).to(tl.int32), mask=i < n)


@triton.jit
def _dot(A, B, OUT, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tl.store(OUT + i * SIZE + j, tl.dot(tl.load(A + i * SIZE + j), tl.load(B + i * SIZE + j)))


def _values():
    """Every bf16 value, the halves between neighbours, their fp32 neighbours, and random bit patterns."""
    bits = torch.arange(1 << 16, dtype=torch.int64) << 16
    near = [bits + d for d in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 1 << 32, (100_000,), generator=g)
    return torch.cat([*near, noise]).to(torch.uint32).view(torch.float32)


def _same(a, b):
    """Equal bit for bit, any NaN being any other NaN."""
    return bool(((a == b) & (a.signbit() == b.signbit()) | a.isnan() & b.isnan()).all())


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.float16])
def test_casts_round_to_nearest_even(source):
    x = _values().to(source)
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    block = 1 << 16
    _cast[(triton.cdiv(x.numel(), block),)](x, out, x.numel(), BLOCK=block)
    assert _same(out, x.to(torch.bfloat16))
    back = torch.empty(x.shape, dtype=source)
    _cast[(triton.cdiv(x.numel(), block),)](out, back, x.numel(), BLOCK=block)
    assert _same(back, out.to(source))


def test_arithmetic_is_that_of_torch():
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(1000, generator=g).to(torch.bfloat16) * 10 for _ in range(2))
    add, mul = torch.empty_like(x), torch.empty_like(x)
    less = torch.empty(1000, dtype=torch.int32)
    _arithmetic[(1,)](x, y, add, mul, less, 1000, BLOCK=1024)
    assert _same(add, x + y)
    assert _same(mul, x * y + 1.5)
    assert torch.equal(less.bool(), x < y)


def test_dot_accumulates_in_fp32():
    g = torch.Generator().manual_seed(2)
    a, b = (torch.randn(16, 16, generator=g).to(torch.bfloat16) for _ in range(2))
    out = torch.empty(16, 16)
    _dot[(1,)](a, b, out, SIZE=16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_install_is_idempotent():
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.binary_op
    interpreter.install()
    assert InterpreterBuilder.binary_op is before
