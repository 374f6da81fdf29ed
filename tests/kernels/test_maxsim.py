"""MaxSim of every backend against the tensor of all products, forward and backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from maxsim_problems import EDGES, SHAPES, expected, problem, reference, run

from burnish.kernels import dispatch, maxsim, maxsim_torch, maxsim_triton


@pytest.fixture(params=["torch", "triton"])
def kernels(request, monkeypatch):
    # several blocks in small problems
    monkeypatch.setattr(maxsim_torch, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(maxsim_triton, "blocks", lambda *_: {"BM": 16, "BN": 16, "BK": 16})
    return dispatch.module("maxsim", request.param)


def close(got, want, tol):
    """Equal where not finite, elsewhere within tol of the largest."""
    assert got.shape == want.shape
    atol = tol * max(1.0, float(torch.where(want.isfinite(), want, 0).abs().max()))
    same = torch.where(want.isfinite(), (got - want).abs() <= atol, (got == want) | (got.isnan() & want.isnan()))
    assert bool(same.all()), (got - want).abs().nan_to_num().max()


@pytest.mark.parametrize("masks", [False, True], ids=["", "masks"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_definition(kernels, shape, masks, device, poison):
    p = problem(shape, masks=masks, device=device)
    (scores, grads), (got, got_grads) = expected(p), run(kernels, p)
    close(got, scores, 1e-14)
    for x, y in zip(got_grads, grads, strict=True):
        close(x, y, 1e-14)
        assert not x.isnan().any()
    if masks and shape[2] > 1 and shape[0] > 1:
        assert (got[:-1, -1] == -torch.inf).all() and (got[-1] == 0).all()
        assert not got_grads[0][-1].any() and not got_grads[1][-1].any()


@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_nothing_to_score(kernels, shape, device, poison):
    p = problem(shape, masks=False, device=device)
    (scores, grads), (got, got_grads) = expected(p), run(kernels, p)
    for x, y in zip((got, *got_grads), (scores, *grads), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_torch_in_the_same_dtype(kernels, dtype, device):
    """Against fp64 of the same rounded operands: at most what plain torch loses in the dtype, and a floor of fp32."""
    p = problem(SHAPES[3], poisoned=False, device=device).to(dtype)
    exact = p.to(torch.float64)
    (want, want_grads), (theirs, their_grads), (got, got_grads) = expected(exact), expected(p), run(kernels, p)
    some = want.isfinite()
    assert got.dtype == torch.float32 and torch.equal(got.isfinite(), some)
    error = (got.double() - want)[some].norm()
    assert error <= (theirs.double() - want)[some].norm() + 1e-6 * want[some].norm()
    assert error <= 1e-6 * want[some].norm()  # sums are fp32, whatever the operands
    # a row of a gradient is rounded once, where torch rounds every addend; its own choices of a maximum may differ
    floor = torch.finfo(dtype).eps
    for x, truth in zip(got_grads, want_grads, strict=True):
        assert x.dtype == dtype and (x.double() - truth).norm() <= floor * truth.norm()
    del their_grads


def test_two_runs_have_the_same_bits_and_no_block_changes_the_places(kernels, device, monkeypatch):
    p = problem(SHAPES[2], device=device).to(torch.float32)
    (first, grads), (second, again) = run(kernels, p), run(kernels, p)
    assert torch.equal(first, second) and all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    places = kernels.forward(*p.operands, keep=True)[1]
    monkeypatch.undo()
    assert torch.equal(kernels.forward(*p.operands, keep=True)[1], places)
    assert kernels.forward(*p.operands, keep=False)[1] is None
    torch.testing.assert_close(kernels.forward(*p.operands, keep=False)[0], first)


def test_ties_go_to_the_first_token_that_counts(kernels, device):
    p = problem((1, 3, 1, 50, 8), masks=False, device=device)
    p.documents[:] = p.documents[:, :1].clone()  # every token the same
    p.document_mask[:, :2] = False
    _, (dq, dd) = run(kernels, p)
    assert kernels.forward(*p.operands, keep=True)[1].eq(2).all()
    assert dd[0, 2].abs().sum() > 0 and not dd[0, 3:].any() and not dd[0, :2].any() and dq.any()


def test_nan_and_infinity_among_tokens_that_count_are_seen(kernels, device):
    p = problem(SHAPES[2], masks=False, device=device).to(torch.float32)
    p.documents[1, 20, 3] = torch.nan
    scores, _ = kernels.forward(*p.operands, keep=True)
    assert scores[:, 1].isnan().all() and scores[:, 0].isfinite().all()
    p = problem(SHAPES[2], masks=False, device=device).to(torch.float32)
    p.queries[0], p.documents[1] = 1.0, -torch.inf
    scores, arg = kernels.forward(*p.operands, keep=True)
    assert scores[0, 1] == -torch.inf and arg[0, 1].eq(-1).all()


def test_operands_of_any_stride(kernels, device):
    p = problem(SHAPES[2], device=device).to(torch.float32)
    want = run(kernels, p)

    def turned(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    wide = torch.full((*p.documents.shape[:2], 33), torch.nan, device=device)
    wide[..., :20] = p.documents
    q = dataclasses.replace(
        p, queries=turned(p.queries), documents=wide[..., :20], document_mask=turned(p.document_mask),
        upstream=turned(p.upstream),
    )  # fmt: skip
    got = run(kernels, q)
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1], want[1], strict=True):
        assert torch.equal(a, b)


def test_only_the_side_that_is_wanted(kernels, device):
    p = problem(SHAPES[1], device=device)
    _, arg = kernels.forward(*p.operands, keep=True)
    _, both = run(kernels, p)
    for i, wanted in enumerate(((True, False), (False, True))):
        got = kernels.backward(p.queries, p.documents, arg, p.upstream, wanted=wanted)
        assert got[1 - i] is None and torch.equal(got[i], both[i])


def test_both_backends_choose_the_same_tokens(device):
    p = problem(SHAPES[3], device=device).to(torch.float32)
    a, b = (dispatch.module("maxsim", n).forward(*p.operands, keep=True) for n in ("torch", "triton"))
    assert torch.equal(a[1], b[1])
    torch.testing.assert_close(a[0], b[0])


def test_the_block_is_a_bound(device):
    """Scores of a block stay within the budget: the tensor of all products would be 16 MiB."""
    from burnish.ops.live_bytes import LiveBytes

    queries, documents = torch.randn(32, 32, 8), torch.randn(64, 64, 8)
    masks = torch.ones(32, 32, dtype=torch.bool), torch.ones(64, 64, dtype=torch.bool)
    before, maxsim_torch.BLOCK_BYTES = maxsim_torch.BLOCK_BYTES, 1 << 16
    try:
        with LiveBytes() as counter:
            scores, arg = maxsim_torch.forward(queries, documents, *masks, keep=True)
            forward = counter.peak
            maxsim_torch.backward(queries, documents, arg, torch.ones_like(scores), wanted=(True, True))
    finally:
        maxsim_torch.BLOCK_BYTES = before
    all_products = 4 * 32 * 32 * 64 * 64
    kept = 4 * (scores.numel() + arg.numel())
    assert forward <= kept + 4 * (1 << 16) < all_products / 8
    gradients = 2 * 4 * (queries.numel() + documents.numel())
    assert counter.peak <= kept + gradients + 6 * (1 << 16) < all_products / 8


def test_operands_that_do_not_fit_are_named():
    p = problem(SHAPES[1])
    bad = [
        (ValueError, "documents must have", {"documents": p.documents[:, :, :4]}),
        (TypeError, "one floating dtype", {"documents": p.documents.float()}),
        (TypeError, "query_mask must be bool", {"query_mask": p.query_mask.int()}),
        (ValueError, "document_mask must be", {"document_mask": p.document_mask[:, :2]}),
        (ValueError, "unit stride", {"queries": p.queries.transpose(1, 2).contiguous().transpose(1, 2)}),
        (ValueError, "queries must be", {"queries": p.queries[0]}),
    ]
    for error, match, change in bad:
        with pytest.raises(error, match=match):
            maxsim.check(*dataclasses.replace(p, **change).operands)
    arg = torch.zeros(2, 3, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match="g and arg"):
        maxsim.check_backward(p.queries, p.documents, arg, torch.zeros(3, 2))
    with pytest.raises(TypeError, match="int32"):
        maxsim.check_backward(p.queries, p.documents, arg.long(), torch.zeros(2, 3))
    assert reference(p.queries, p.documents, p.query_mask, p.document_mask).shape == (2, 3)
