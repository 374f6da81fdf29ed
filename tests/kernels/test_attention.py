"""Gathered-key attention of every backend against the dense definition, forward and backward."""

from __future__ import annotations

import dataclasses

import attention_problems as problems
import pytest
import torch
from attention_problems import EDGES, SHAPES, Shape, expected, problem, run

from burnish.kernels import attention, attention_torch, attention_triton, dispatch
from burnish.kernels.attention import Saved


@pytest.fixture(params=["torch", "triton"])
def kernels(request, monkeypatch):
    monkeypatch.setattr(attention_triton, "TILE", 16)  # several tiles of keys in small problems
    return dispatch.module("attention", request.param)


def close(got, want, atol):
    """Equal where either is not finite, and within atol elsewhere."""
    assert got.shape == want.shape
    same = torch.where(want.isfinite(), (got - want).abs() <= atol, (got == want) | (got.isnan() & want.isnan()))
    assert bool(same.all()), (got - want).abs().nan_to_num().max()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_definition(kernels, shape, bias, device, poison):
    p = problem(shape, bias=bias, device=device)
    (out, grads), (got, got_grads) = expected(p), run(kernels, p)
    for x, y in zip(got, out, strict=True):
        close(x, y, 1e-13)
    for x, y in zip(got_grads, grads, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            close(x, y, 1e-12)


@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_nothing_to_attend_with_or_to(kernels, shape, device, poison):
    p = problem(shape, bias=True, device=device)
    got, grads = run(kernels, p)
    for x, y in zip(
        [*got, *grads], [*expected(p)[0], *(torch.zeros_like(x) for x in (p.q, p.k, p.v, p.bias))], strict=True
    ):
        assert torch.equal(x, y)


def test_an_empty_list_beside_full_ones(kernels, device, poison):
    p = problem(SHAPES[1], device=device)
    (out, lse, entropy), (dq, *_) = run(kernels, p)
    rows = slice(0, SHAPES[1].queries)  # of the first frame
    assert int(p.counts[0, 0, 0]) == 0 and int(p.counts[0, 2, 0]) == 9
    assert not out[:, :, rows].any() and not entropy[:, :, rows].any() and not dq[:, :, rows].any()
    assert (lse[:, :, rows] == -torch.inf).all() and lse[:, :, 2 * SHAPES[1].queries :].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_low_precision_is_as_good_as_torch_in_the_same_dtype(kernels, dtype, shape, device):
    """Errors against fp64 of the same rounded operands, at most twice those of plain torch: fact 13 of the spec."""
    p = problem(shape, holes=False, device=device).to(dtype)
    exact = problem(shape, holes=False, device=device).to(dtype).to(torch.float64)
    want, want_grads = expected(exact)
    leaves = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
    group = shape.heads // shape.key_heads
    times = problems.reference.multiplicity(p.lists, p.counts, exact.q, exact.k)
    mask = times.log().to(dtype)
    some = (times > 0).any(-1)
    mask = torch.where(some[..., None], mask, 0)
    k, v = (x.repeat_interleave(group, 1) for x in leaves[1:])
    s = leaves[0] @ k.transpose(-1, -2) * p.scale + mask
    plain = s.softmax(-1) @ v * some[..., None]
    plain_grads = torch.autograd.grad(plain, leaves, p.upstream[0])
    saved = kernels.forward(*p.operands, entropy=False)
    grads = kernels.backward(*p.operands, Saved(*saved, p.upstream[0], None, None))
    only_out = dataclasses.replace(
        exact, upstream=(exact.upstream[0], *(torch.zeros_like(x) for x in exact.upstream[1:]))
    )
    want_grads = expected(only_out)[1]
    floor = 4 * torch.finfo(dtype).eps
    for got, reference, truth in zip(
        (saved[0], *grads[:3]), (plain, *plain_grads), (want[0], *want_grads[:3]), strict=True
    ):
        error, theirs = (got.double() - truth).norm(), (reference.double() - truth).norm()
        assert got.dtype == dtype and error <= 2 * theirs + floor * truth.norm(), (float(error), float(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_entropy_and_lse_of_low_precision(kernels, dtype, device):
    p = problem(SHAPES[2], device=device).to(dtype)
    (_, lse, entropy), _ = run(kernels, p)
    want = expected(p.to(torch.float64))[0]
    close(lse.double(), want[1], 2e-6)
    close(entropy.double(), want[2], 4e-6)
    # without the entropy torch's CPU attention in bf16 takes an exponential of 20 bits
    close(kernels.forward(*p.operands, entropy=False).lse.double(), want[1], 2e-6 if dtype == torch.float32 else 2e-4)
    assert lse.dtype == entropy.dtype == torch.float32


def test_rows_that_nobody_lists_get_exactly_nothing_and_two_runs_the_same_bits(kernels, device):
    p = problem(SHAPES[2], bias=True, device=device).to(torch.float32)
    (first, grads), (second, again) = run(kernels, p), run(kernels, p)
    assert all(torch.equal(a, b) for a, b in zip([*first, *grads], [*second, *again], strict=True))
    unlisted = problems.reference.multiplicity(p.lists, p.counts, p.q, p.k).sum((1, 2)) == 0  # (B, Lk)
    assert unlisted.any()
    for x in grads[1:]:
        assert not x.transpose(1, 2)[unlisted].any()


def test_the_order_of_a_list_does_not_matter(kernels, device):
    p = problem(SHAPES[2], holes=False, device=device)
    turned = dataclasses.replace(p, lists=p.lists.clone(), counts=torch.full_like(p.counts, SHAPES[2].m))
    p = dataclasses.replace(turned, lists=turned.lists.flip(-1))
    for x, y in zip(*(run(kernels, each)[0] + run(kernels, each)[1][:3] for each in (p, turned)), strict=True):
        close(x, y, 1e-12)


def test_operands_of_any_stride(kernels, device):
    """Heads inside the rows, as a projection leaves them; an expanded upstream gradient."""
    p = problem(SHAPES[2], device=device).to(torch.float32)
    want = run(kernels, p)

    def inside(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    wide = torch.full((*p.lists.shape[:3], p.lists.shape[3] + 3), 10**6, dtype=torch.int32, device=device)
    wide[..., :-3] = p.lists
    q = dataclasses.replace(
        p, q=inside(p.q), k=inside(p.k), v=torch.stack([p.v, p.k], 3)[:, :, :, 0], lists=wide[..., :-3],
        upstream=(inside(p.upstream[0]), *p.upstream[1:]),
    )  # fmt: skip
    for a, b in zip([*want[0], *want[1][:3]], [*(got := run(kernels, q))[0], *got[1][:3]], strict=True):
        assert torch.equal(a, b)
    one = dataclasses.replace(p, upstream=(torch.ones((), device=device).expand(p.q.shape), *p.upstream[1:]))
    plain = dataclasses.replace(p, upstream=(torch.ones_like(p.q), *p.upstream[1:]))
    for a, b in zip(run(kernels, one)[1][:3], run(kernels, plain)[1][:3], strict=True):
        assert torch.equal(a, b)


def test_an_index_beyond_the_keys_is_nan_and_not_followed(kernels, device):
    for dtype in (torch.float64, torch.float32):
        p = problem(SHAPES[1], holes=False, device=device).to(dtype)
        p.lists[0, 2, 0, 1] = 10**9
        out, lse, entropy = kernels.forward(*p.operands, entropy=True)
        bad = slice(2 * SHAPES[1].queries, None)
        for x in (out, lse, entropy):
            assert x[:, :, bad].isnan().all() and not x[:, :, : bad.start].isnan().any()


@pytest.mark.parametrize("tile", [1, 4, 16])
@pytest.mark.parametrize("shape", [*SHAPES, *EDGES], ids=str)
def test_the_inverse_of_the_lists(shape, tile):
    """Every entry once, under its row's tile and its frame; every row of a tile listed by somebody."""
    p = problem(shape)
    inverse = attention.invert(p.lists, p.counts, shape.keys, shape.key_heads, tile)
    h = max(1, shape.list_h // shape.key_heads)  # lists to a key head
    told_apart = min(shape.list_h, shape.key_heads)
    assert inverse.rows.shape[0] == shape.list_b * told_apart
    got, want, listed_by = [], [], []
    for x in range(inverse.rows.shape[0]):
        rows = inverse.rows[x].tolist()
        listed = [r for r in rows if r >= 0]
        assert listed == sorted(set(listed)) and rows[len(listed) :] == [-1] * (len(rows) - len(listed))
        listed_by += [(x, r) for r in listed]
        for t in range(inverse.tiles.shape[1] - 1):
            first, last = inverse.tiles[x, t : t + 2].tolist()
            groups = inverse.groups[x, first:last].tolist()
            assert groups == sorted(set(groups))
            for i, group in enumerate(groups, first):
                begin, end = inverse.runs[x, i : i + 2].tolist()
                assert begin < end
                for slot in inverse.slots[x, begin:end].tolist():
                    assert t * tile <= slot < (t + 1) * tile
                    got.append((x, group, rows[slot]))
    for b in range(shape.list_b):
        for f in range(shape.frames):
            for head in range(shape.list_h):
                for row in p.lists[b, f, head, : p.counts[b, f, head]].tolist():
                    if row >= 0:
                        want.append((b * told_apart + head // h, f * h + head % h, row))
    assert sorted(got) == sorted(want)
    assert listed_by == sorted({(x, row) for x, _, row in want})  # and no row that nobody lists


def test_the_cpu_takes_torchs_own_blocks_where_it_can(monkeypatch):
    """The quick way of the twin is taken, and not where it would be wrong."""
    calls = []
    real = attention_torch._frames
    monkeypatch.setattr(attention_torch, "_frames", lambda *a: calls.append(1) or real(*a))
    for dtype, bias, quick in [(torch.float32, False, 1), (torch.bfloat16, False, 1), (torch.float32, True, 0),
                               (torch.float16, False, 0), (torch.float64, False, 0)]:  # fmt: skip
        calls.clear()
        p = problem(SHAPES[1], bias=bias).to(dtype)
        attention_torch.forward(*p.operands, entropy=False)
        assert len(calls) == quick, dtype


def test_operands_that_do_not_fit_are_named():
    p = problem(Shape(2, 4, 2, 3, 5, 23, 8, 9)).to(torch.float32)
    bad = [
        (ValueError, "k must be", {"k": p.k[:, :, :, :4], "v": p.v[:, :, :, :4]}),
        (ValueError, "k as v", {"v": p.v[:, :, :5]}),
        (TypeError, "one floating dtype", {"q": p.q.double()}),
        (TypeError, "int32", {"lists": p.lists.long()}),
        (ValueError, "lists must be", {"lists": p.lists.expand(3, -1, -1, -1)}),
        (ValueError, "split evenly", {"lists": p.lists[:, :2], "counts": p.counts[:, :2]}),
        (ValueError, "counts must be", {"counts": p.counts[:, :2]}),
        (ValueError, "bias must be", {"bias": p.k[0, :, :, 0]}),
        (ValueError, "unit stride", {"q": p.q.transpose(2, 3).contiguous().transpose(2, 3)}),
    ]
    for error, match, change in bad:
        with pytest.raises(error, match=match):
            attention.check(*dataclasses.replace(p, **change).operands[:-1])
