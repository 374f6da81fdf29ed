"""``maxsim`` as a user calls it: gradients, masks, means, compilation, errors."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.ops import maxsim as module
from burnish.ops.maxsim import maxsim
from burnish.reference.maxsim import maxsim as reference


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def operands(dtype=torch.float64, grad=True, device="cpu"):
    g = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((3, 4, 6), (2, 7, 6)))
    masks = torch.ones(3, 4, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    masks[0][1, 2:] = 0
    masks[1][1, 3:] = 0
    leaves = [x.to(dtype).to(device).requires_grad_(grad) for x in (queries, documents)]
    return [*leaves, *(m.to(device) for m in masks)]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradcheck(backend, reduction, device):
    queries, documents, *masks = operands(device=device)

    def f(q, d):
        return maxsim(q, d, *masks, reduction=reduction, backend=backend)

    assert torch.autograd.gradcheck(f, (queries, documents), eps=1e-7, atol=1e-7, fast_mode=backend == "triton")
    want = reference(queries, documents, *(m.bool() for m in masks), reduction=reduction)
    torch.testing.assert_close(f(queries, documents), want, rtol=0, atol=1e-14)


def test_one_token_a_side_is_a_product(backend, device):
    queries, documents, *_ = operands(device=device, grad=False)
    a, b = queries[:, :1], documents[:, :1]
    for reduction in ("sum", "mean"):  # of one token
        got = maxsim(a, b, reduction=reduction, backend=backend)
        torch.testing.assert_close(got, a[:, 0] @ b[:, 0].T, rtol=0, atol=1e-14)


def test_a_document_without_a_token_is_left_out_of_a_softmax(backend, device):
    """Its score is -inf, its share 0, and no gradient is NaN."""
    queries, documents, query_mask, document_mask = operands(device=device)
    document_mask[1] = 0
    scores = maxsim(queries, documents, query_mask, document_mask, reduction="mean", backend=backend)
    assert (scores[:, 1] == -torch.inf).all()
    loss = -(scores / 0.05).log_softmax(-1)[:, 0].sum()
    grads = torch.autograd.grad(loss, (queries, documents))
    assert loss.item() == 0 and all(g.isfinite().all() for g in grads) and not grads[1][1].any()
    # an upstream gradient that is not a number goes nowhere through such a pair
    bad = torch.autograd.grad(
        maxsim(queries, documents, query_mask, document_mask, backend=backend), (queries, documents),
        torch.tensor([[1.0, torch.nan]] * 3, dtype=torch.float64, device=device),
    )  # fmt: skip
    assert all(g.isfinite().all() for g in bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(backend, dtype, device):
    queries, documents, *masks = operands(dtype, device=device)
    scores = maxsim(queries, documents, *masks, backend=backend)
    assert scores.dtype == torch.float32
    grads = torch.autograd.grad(scores.sum(), (queries, documents))
    assert all(g.dtype == dtype and g.any() for g in grads)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(maxsim(queries, documents, *masks, backend=backend), scores)


def test_a_frozen_side_and_no_gradient_at_all(backend, device):
    queries, documents, *masks = operands(device=device)
    both = torch.autograd.grad(maxsim(queries, documents, *masks, backend=backend).sum(), (queries, documents))
    for i in range(2):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate((queries, documents))]
        maxsim(*leaves, *masks, backend=backend).sum().backward()
        assert leaves[1 - i].grad is None and torch.equal(leaves[i].grad, both[i])
    with torch.no_grad():
        assert not maxsim(queries, documents, *masks, backend=backend).requires_grad


def test_places_are_kept_only_for_a_gradient(monkeypatch, device):
    seen = []
    real = module._maxsim
    monkeypatch.setattr(module, "_maxsim", lambda *a: seen.append(a[4]) or real(*a))
    queries, documents, *masks = operands(device=device)
    maxsim(queries, documents, *masks)
    with torch.no_grad():
        maxsim(queries, documents, *masks)
    maxsim(queries.detach(), documents.detach(), *masks)
    assert seen == [True, False, False]


def test_a_second_derivative_is_refused(backend, device):
    queries, documents, *masks = operands(device=device)
    (g,) = torch.autograd.grad(maxsim(queries, documents, *masks, backend=backend).sin().sum(), queries,
                               create_graph=True)  # fmt: skip
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), documents)


@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(grad, device):
    queries, documents, *masks = operands(torch.float32, grad, device)
    masks = [m.bool() for m in masks]
    torch.library.opcheck(module._maxsim, (queries, documents, *masks, grad, "auto"))
    arg = module._maxsim(queries.detach(), documents.detach(), *masks, True, "auto")[1]
    args = (queries.detach(), documents.detach(), arg, torch.ones(3, 2, device=device), True, grad, "auto")
    torch.library.opcheck(module._maxsim_backward, args)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler, device):
    torch._dynamo.reset()
    queries, documents, *masks = operands(torch.float32, device=device)

    def step(q, d):
        return maxsim(q * 2, d, *masks, reduction="mean").log_softmax(-1).sum()

    eager = step(queries, documents)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)(queries, documents)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(*(torch.autograd.grad(x, (queries, documents)) for x in (compiled, eager)), strict=True):
        torch.testing.assert_close(a, b)
    if compiler == "aot_eager":
        assert torch.equal(compiled, eager)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "queries must be a tensor", {"queries": None}),
        (TypeError, "documents must be float32", {"documents": torch.zeros(2, 7, 6, dtype=torch.int64)}),
        (TypeError, "one floating dtype", {"documents": torch.zeros(2, 7, 6)}),
        (ValueError, "queries must be", {"queries": torch.zeros(4, 6)}),
        (ValueError, "documents must have queries' d", {"documents": torch.zeros(2, 7, 5, dtype=torch.float64)}),
        (ValueError, "query_mask must be", {"query_mask": torch.ones(3, 5).long()}),
        (TypeError, "document_mask must be bool or whole", {"document_mask": torch.ones(2, 7)}),
        (TypeError, "document_mask must be a tensor", {"document_mask": [1]}),
        (ValueError, "reduction", {"reduction": "max"}),
        (ValueError, "backend", {"backend": "host"}),
        (ValueError, "backend", {"backend": "cuda"}),
    ],
)
def test_bad_arguments_are_named(error, match, change):
    queries, documents, query_mask, document_mask = operands()
    given = {"queries": queries, "documents": documents, "query_mask": query_mask, "document_mask": document_mask}
    with pytest.raises(error, match=match):
        burnish.maxsim(**{**given, **change})
