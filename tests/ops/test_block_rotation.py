"""``block_rotation`` as a user calls it: gradients, shapes, dtypes, memory, compilation, errors."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.kernels import rotation_host
from burnish.ops import block_rotation as module
from burnish.ops.block_rotation import block_rotation
from burnish.ops.live_bytes import LiveBytes
from burnish.reference.block_rotation import block_rotation as reference


@pytest.fixture(params=["torch", "triton", "host"])
def backend(request, device):
    if request.param == "host" and device.type != "cpu":
        pytest.skip("the host backend serves the CPU")
    return request.param


def operands(dtype=torch.float64, grad=True, shape=(2, 3, 12), b=6, shared=False, device="cpu"):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    generator = torch.randn(1 if shared else shape[-1] // b, b * (b - 1) // 2, generator=g, dtype=torch.float64) / 5
    made = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(device, dtype).requires_grad_(grad), generator.to(device, made).requires_grad_(grad)


@pytest.mark.parametrize("correction", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("terms", [None, 2, 5, 6])
def test_gradcheck(backend, terms, correction, device):
    x, generator = operands(device=device)

    def f(x, generator):
        return block_rotation(x, generator, terms=terms, correction=correction, backend=backend)

    assert torch.autograd.gradcheck(f, (x, generator), eps=1e-6, atol=1e-7, fast_mode=backend == "triton")
    want = reference(x, generator, terms=terms, correction=correction)
    torch.testing.assert_close(f(x, generator), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (0, 12), (2, 0, 12), (2, 2, 2, 12)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_shapes(backend, shape, shared, device):
    x, generator = operands(shape=shape, shared=shared, device=device)
    y, want = block_rotation(x, generator, backend=backend), reference(x, generator)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad(z.square().sum(), (x, generator)) for z in (y, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_x_and_upstream_of_any_stride(backend, device):
    x, generator = operands(device=device)
    want = reference(x, generator)
    up = torch.randn(12, 3, 2, dtype=torch.float64, device=device).permute(2, 1, 0)
    grads = torch.autograd.grad(want, (x, generator), up, retain_graph=True)
    turned = x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    wide = torch.zeros(2, 3, 20, dtype=torch.float64, device=device)
    wide[..., 5:17] = x.detach()
    for given in (turned, wide[..., 5:17].requires_grad_(), x.detach().transpose(0, 1).contiguous().transpose(0, 1)):
        given = given.requires_grad_()
        y = block_rotation(given, generator, backend=backend)
        torch.testing.assert_close(y, want, rtol=0, atol=1e-13)
        for a, b in zip(torch.autograd.grad(y, (given, generator), up), grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    y = block_rotation(x, generator, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("made", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_are_kept_and_autocast_changes_nothing(backend, dtype, made, device):
    x, generator = operands(dtype, device=device)
    generator = generator.detach().to(made).requires_grad_()
    y = block_rotation(x, generator, backend=backend)
    grads = torch.autograd.grad(y.sum(), (x, generator))
    assert y.dtype == dtype and [g.dtype for g in grads] == [dtype, made] and all(g.any() for g in grads)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(block_rotation(x, generator, backend=backend), y)


def test_a_frozen_side_and_no_gradient_at_all(backend, device):
    leaves = operands(device=device)
    both = torch.autograd.grad(block_rotation(*leaves, backend=backend).square().sum(), leaves)
    for i in range(2):
        own = [x.detach().requires_grad_(i == j) for j, x in enumerate(leaves)]
        block_rotation(*own, backend=backend).square().sum().backward()
        assert own[1 - i].grad is None
        torch.testing.assert_close(own[i].grad, both[i], rtol=0, atol=1e-13)
    with torch.no_grad():
        assert not block_rotation(*leaves, backend=backend).requires_grad


def test_what_is_kept_and_what_is_live(device):
    """x and the generator, no copy and no R; peak: y forward, dx and what dR takes in backward."""
    x, generator = operands(torch.bfloat16, shape=(512, 256), b=32, device=device)
    saved = []

    def keep(t):
        saved.append(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block_rotation(x, generator)
    assert set(saved) == {x.untyped_storage().data_ptr(), generator.untyped_storage().data_ptr()}
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block_rotation(x, generator.detach())
    assert set(saved) == {generator.untyped_storage().data_ptr()}
    with LiveBytes() as counter:
        y = block_rotation(x, generator)
        assert counter.live == y.numel() * 2
        dx, dg = torch.autograd.grad(y, (x, generator), torch.ones_like(y))
        del y
    assert counter.live <= dx.numel() * 2 + dg.numel() * 4


def test_a_second_derivative_is_refused(backend, device):
    x, generator = operands(device=device)
    (g,) = torch.autograd.grad(block_rotation(x, generator, backend=backend).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="block_rotation_backward"):
        torch.autograd.grad(g.sum(), generator)


@pytest.mark.parametrize("terms", [5, -1])
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(grad, terms, device):
    x, generator = operands(torch.float32, grad, device=device)
    torch.library.opcheck(module._block_rotation, (x, generator, terms, True, "auto"))
    dy = torch.ones_like(x)
    for wanted in ((True, grad), (grad, True)):
        args = (x.detach(), generator.detach(), dy, terms, False, *wanted, "auto")
        torch.library.opcheck(module._block_rotation_backward, args)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler, device):
    torch._dynamo.reset()
    x, generator = operands(torch.float32, device=device)

    def step(x, generator):
        return block_rotation(x * 2, generator, correction=True).tanh().sum()

    eager = step(x, generator)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)(x, generator)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(*(torch.autograd.grad(y, (x, generator)) for y in (compiled, eager)), strict=True):
        torch.testing.assert_close(a, b)
    if compiler == "aot_eager":
        assert torch.equal(compiled, eager)


def test_zero_generators_change_nothing(backend, device):
    x, generator = operands(torch.bfloat16, device=device)
    for terms in (None, 5):
        for correction in (False, True):
            y = block_rotation(x, generator.detach() * 0, terms=terms, correction=correction, backend=backend)
            assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()


def test_the_cpu_runs_its_own_kernels(monkeypatch):
    seen = []
    monkeypatch.setattr(
        rotation_host, "_launch", lambda *a, real=rotation_host._launch, **k: seen.append(1) or real(*a, **k)
    )
    x, generator = operands(torch.float32)
    block_rotation(x, generator).sum().backward()
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "x must be a tensor", {"x": None}),
        (TypeError, "generator must be float32", {"generator": torch.zeros(2, 15, dtype=torch.int64)}),
        (ValueError, r"generator must be \(blocks, b\(b-1\)/2\)", {"generator": torch.zeros(2, 14)}),
        (ValueError, "generator must be", {"generator": torch.zeros(15)}),
        (ValueError, "generator must be", {"generator": torch.zeros(2, 0)}),
        (ValueError, "d = 3 blocks of 6", {"generator": torch.zeros(3, 15)}),
        (ValueError, "multiple of 6", {"x": torch.zeros(2, 13), "generator": torch.zeros(1, 15)}),
        (ValueError, "x must be", {"x": torch.zeros(())}),
        (ValueError, "x must be", {"x": torch.zeros(3, 0), "generator": torch.zeros(1, 15)}),
        (ValueError, "terms must be", {"terms": -1}),
        (ValueError, "terms must be", {"terms": 2.5}),
        (ValueError, "generator must be on cpu", {"generator": torch.zeros(2, 15, device="meta")}),
        (ValueError, "backend", {"backend": "cuda"}),
    ],
)
def test_bad_arguments_are_named(error, match, change):
    x, generator = operands()
    with pytest.raises(error, match=match):
        burnish.block_rotation(**{"x": x, "generator": generator, **change})
