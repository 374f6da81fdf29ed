"""``selected_attention`` as a user calls it: facts of the method, gradients, forms of lists, errors, compilation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from burnish.kernels import attention_triton
from burnish.ops import selected_attention as module
from burnish.ops.selected_attention import AttentionOutput, attention_certificate, merge_attention, selected_attention
from burnish.reference import attention as reference

B, HQ, HK, L, LK, D = 2, 4, 2, 12, 31, 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention_triton, "TILE", 16)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def operands(dtype=torch.float64, device="cpu", seed=0, grad=False, heads=(HQ, HK)):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, heads[0], L, D), (B, heads[1], LK, D), (B, heads[1], LK, D))
    return [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).to(device).requires_grad_(grad) for s in shapes]


def some(m, *shape, seed=1, device="cpu"):
    """Lists of m different keys, in no order."""
    g = torch.Generator().manual_seed(seed)
    n = math.prod(shape)
    return torch.stack([torch.randperm(LK, generator=g)[:m] for _ in range(n)]).view(*shape, m).int().to(device)


def dense(q, k, v, lists, scale=None):
    """Masked attention of torch, lists (F, heads, M) or fewer dimensions."""
    while lists.ndim < 3:
        lists = lists[:, None] if lists.ndim == 2 else lists[None]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    allowed = torch.zeros(*lists.shape[:2], LK, dtype=torch.bool, device=q.device).scatter_(2, lists.long(), True)
    allowed = allowed.transpose(0, 1)  # (heads, F, Lk)
    allowed = allowed.repeat_interleave(q.shape[1] // allowed.shape[0], 0)
    allowed = allowed.repeat_interleave(q.shape[2] // allowed.shape[1], 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)


FORMS = {"shared": (), "frame": (3,), "head": (1, HK), "query head": (1, HQ), "frame x head": (3, HK),
         "frame x query head": (4, HQ)}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_it_is_masked_attention(form, backend, device):
    lists = some(9, *FORMS[form], device=device)
    ours, theirs = operands(device=device, grad=True), operands(device=device, grad=True)
    out, want = selected_attention(*ours, lists, backend=backend), dense(*theirs, lists)
    assert torch.allclose(out, want, rtol=0, atol=1e-14)
    g = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(3)).to(device)
    for a, b in zip(torch.autograd.grad(out, ours, g), torch.autograd.grad(want, theirs, g), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_one_list_goes_to_torchs_dense_attention(monkeypatch, device):
    """Gathered once, no mask, and no kernel of ours; not where a statistic or a bias is wanted."""
    q, k, v = operands(torch.float32, device, grad=True)
    lists = some(9, device=device)
    want, seen = dense(q, k, v, lists), []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda *a, **k: seen.append((a, k)) or real(*a, **k))
    out = selected_attention(q, k, v, lists, 9)
    ((args, kwargs),) = seen
    assert args[1].shape == (B, HK, 9, D) and kwargs.get("attn_mask") is None
    assert torch.allclose(out, want, atol=1e-6)
    selected_attention(q, k, v, lists, 9, return_lse=True)
    selected_attention(q, k, v, lists, 9, key_bias=torch.zeros(LK, device=device))
    selected_attention(q, k, v, lists, 0)
    selected_attention(q, k, v, some(9, 3, device=device), 9)
    assert len(seen) == 1
    if device.type == "cpu":
        selected_attention(q, k, v, lists)  # the host can see that nothing is missing
        assert len(seen) == 2


@pytest.mark.parametrize("per_batch", [False, True], ids=["", "by batch"])
def test_gradients_of_one_list_with_rows_that_come_twice(per_batch, device):
    lists = torch.tensor([3, 7, 3, 30, 0], device=device)
    lists = torch.stack([lists, lists + torch.tensor([1, 1, 1, -1, 9], device=device)])[:, None, None]
    lists = lists if per_batch else lists[:1]
    ours, theirs = operands(device=device, grad=True), operands(device=device, grad=True)
    out = selected_attention(*ours, lists, 5)
    want = selected_attention(*theirs, lists, backend="torch")
    assert torch.allclose(out, want, rtol=0, atol=1e-14)
    for a, b in zip(
        torch.autograd.grad(out.sin().sum(), ours), torch.autograd.grad(want.sin().sum(), theirs), strict=True
    ):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)


def test_all_keys_in_order_is_dense_attention(backend, device):
    q, k, v = operands(device=device)
    everything = torch.arange(LK, device=device, dtype=torch.int32)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.allclose(selected_attention(q, k, v, everything, backend=backend), want, rtol=0, atol=1e-14)
    assert torch.allclose(selected_attention(q, k, v, everything), want, rtol=0, atol=1e-14)


def test_identities_of_entropy_and_lse(backend, device):
    """H = LSE - sum p s; log n where scores are equal; in [0, log n]; 0 under a huge score; shifts."""
    q, k, v = operands(device=device)
    lists = some(9, 3, device=device)
    out, lse, entropy = selected_attention(q, k, v, lists, return_lse=True, return_entropy=True, backend=backend)
    scaled, scale = torch.log_softmax, D**-0.5
    group = k.repeat_interleave(HQ // HK, 1)
    rows = group[:, :, lists.long()]  # (B, H, F, M, D)
    s = torch.einsum("bhfpd,bhfmd->bhfpm", q.view(B, HQ, 3, L // 3, D), rows) * scale
    p = s.softmax(-1)
    assert torch.allclose(lse.view(s.shape[:-1]), s.logsumexp(-1), rtol=0, atol=1e-14)
    assert torch.allclose(entropy.view(s.shape[:-1]), -(p * scaled(s, -1)).sum(-1), rtol=0, atol=1e-14)
    assert (entropy >= 0).all() and (entropy <= math.log(9)).all()
    ask = {"return_lse": True, "return_entropy": True, "backend": backend}
    flat = selected_attention(torch.zeros_like(q), k, v, lists, **ask)
    assert torch.allclose(flat.entropy, torch.full_like(lse, math.log(9)), rtol=0, atol=1e-15)
    sharp = selected_attention(q * 1e4, k, v, lists, **ask)
    assert (sharp.entropy < 1e-6).all() and (sharp.entropy >= 0).all()
    moved = selected_attention(q, k, v, lists, key_bias=torch.full((LK,), 5.0, device=device), **ask)
    assert torch.allclose(moved.entropy, entropy, rtol=0, atol=1e-13)
    assert torch.allclose(moved.lse, lse + 5, rtol=0, atol=1e-13) and torch.allclose(moved.out, out, rtol=0, atol=1e-14)


@pytest.mark.parametrize("times", [2, 5])
def test_a_key_that_comes_r_times(times, backend, device):
    """In the tensors, in the list or as a bias of log r: out as before, lse (and entropy, of copies) up by log r."""
    q, k, v = operands(device=device, grad=True)
    lists = some(7, 3, device=device)
    ask = {"return_lse": True, "return_entropy": True, "backend": backend}
    once = selected_attention(q, k, v, lists, **ask)
    listed = selected_attention(q, k, v, lists.repeat(1, times), **ask)
    copied = selected_attention(
        q, k.repeat(1, 1, times, 1), v.repeat(1, 1, times, 1),
        torch.cat([lists + i * LK for i in range(times)], 1), **ask,
    )  # fmt: skip
    biased = selected_attention(
        q, k, v, lists, key_bias=torch.full((HK, 1), math.log(times), dtype=q.dtype, device=device), **ask
    )
    for got in (listed, copied, biased):
        assert torch.allclose(got.out, once.out, rtol=0, atol=1e-14)
        assert torch.allclose(got.lse, once.lse + math.log(times), rtol=0, atol=1e-14)
    for got in (listed, copied):
        assert torch.allclose(got.entropy, once.entropy + math.log(times), rtol=0, atol=1e-13)
    want = torch.autograd.grad(once.out.sin().sum() + once.entropy.sum(), (q, k, v), retain_graph=True)
    for got in (listed, copied):
        for a, b in zip(torch.autograd.grad(got.out.sin().sum() + got.entropy.sum(), (q, k, v)), want, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_gradcheck_of_every_output(backend, device):
    q, k, v = operands(device=device, grad=True)
    bias = (
        torch.randn(HK, LK, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(device).requires_grad_()
    )
    lists = some(5, 3, HK, device=device)
    lists[1, 0, 3:] = -1
    q.data, k.data, v.data = q.data[:1, :, :6], k.data[:1], v.data[:1]

    def f(q, k, v, bias):
        return selected_attention(q, k, v, lists, key_bias=bias, return_lse=True, return_entropy=True, backend=backend)

    assert torch.autograd.gradcheck(f, (q, k, v, bias), eps=1e-6, atol=1e-7, fast_mode=True)


def test_gradcheck_of_the_reference():
    """The oracle itself, and what its entropy's gradient is: dH/ds_j = -p_j (log p_j + H), which sums to 0."""
    q, k, v = (x[:1, :, :6].detach().requires_grad_() for x in operands())
    bias = torch.randn(1, HK, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    lists = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:4] for i in range(3)])
    lists = lists.int()[None, :, None]
    counts = torch.full(lists.shape[:3], 4, dtype=torch.int32)

    def f(q, k, v, bias):
        return reference.selected_attention(q, k, v, lists, counts, bias, 0.3)

    assert torch.autograd.gradcheck(f, (q, k, v, bias), fast_mode=True)
    *_, entropy = f(q, k, v, bias)
    (g,) = torch.autograd.grad(entropy.sum(), bias)  # dH/dbias_j is dH/ds_j, summed over the queries
    assert float(g.sum().abs()) < 1e-14 and float(g.abs().max()) > 1e-3


@pytest.mark.parametrize("asked", ["out", "lse", "entropy", "none"])
def test_a_loss_on_some_of_the_outputs(asked, backend, device):
    """An output without a gradient costs nothing and changes nothing; a second backward gives the same."""
    q, k, v = operands(device=device, grad=True)
    got = selected_attention(q, k, v, some(7, 2, device=device), return_entropy=True, backend=backend)
    if asked == "none":
        assert not got.lse.detach().requires_grad
        return
    x = getattr(got, asked).sin().sum()
    first = torch.autograd.grad(x, (q, k, v), retain_graph=True)
    again = torch.autograd.grad(2 * x, (q, k, v))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(2 * a, b) and a.isfinite().all()
    assert (asked == "out") == bool(first[2].any())  # v moves out alone


def test_only_a_frozen_side(backend, device):
    for frozen in itertools.product([False, True], repeat=3):
        if all(frozen):
            continue
        leaves = [x.requires_grad_(not f) for x, f in zip(operands(device=device), frozen, strict=True)]
        selected_attention(*leaves, some(7, 2, device=device), backend=backend).sum().backward()
        for x, f in zip(leaves, frozen, strict=True):
            assert (x.grad is None) == f


def test_a_second_derivative_is_refused(backend, device):
    q, k, v = operands(device=device, grad=True)
    out = selected_attention(q, k, v, some(7, 2, device=device), backend=backend)
    (g,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), q)


# ----------------------------------------------------------------------------------------- merging and bounding


def parts(q, k, v, sets, device, **kwargs):
    ask = {"return_lse": True, "return_entropy": True, **kwargs}
    return [selected_attention(q, k, v, torch.tensor(s, dtype=torch.int32, device=device), **ask) for s in sets]


def test_merging_any_partition_gives_the_whole(backend, device):
    q, k, v = operands(device=device)
    order = torch.randperm(LK, generator=torch.Generator().manual_seed(0)).tolist()
    (whole,) = parts(q, k, v, [list(range(LK))], device, backend=backend)
    for cuts in ([10], [1, 2, 30], list(range(1, LK))):
        sets = [order[a:b] for a, b in itertools.pairwise([0, *cuts, LK])]
        pieces = parts(q, k, v, sets, device, backend=backend)
        for got in (
            merge_attention(pieces),
            merge_attention([merge_attention(pieces[:1]), merge_attention(pieces[1:])]),
        ):
            for a, b in zip(got, whole, strict=True):
                assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_merging_with_an_empty_set_and_of_nothing_else(device):
    q, k, v = operands(device=device, grad=True)
    empty, whole = parts(q, k, v, [[], list(range(LK))], device)
    for got in (merge_attention([empty, whole]), merge_attention([whole, empty])):
        for a, b in zip(got, whole, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-15)
        loss = got.out.sin().sum() + got.lse.sum() + got.entropy.sum()
        grads = torch.autograd.grad(loss, (q, k, v), retain_graph=True)
        want = torch.autograd.grad(
            whole.out.sin().sum() + whole.lse.sum() + whole.entropy.sum(), (q, k, v), retain_graph=True
        )  # fmt: skip
        for a, b in zip(grads, want, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-13)
    nothing = merge_attention([empty, empty])
    assert not nothing.out.any() and (nothing.lse == -torch.inf).all() and not nothing.entropy.any()
    with pytest.raises(ValueError, match="parts"):
        merge_attention([])
    assert merge_attention([AttentionOutput(whole.out, whole.lse)]).entropy is None


def test_gradients_through_a_merge(device):
    mine, theirs = operands(device=device, grad=True), operands(device=device, grad=True)
    got = merge_attention(parts(*mine, [range(10), range(10, LK)], device))
    (want,) = parts(*theirs, [range(LK)], device)
    for x in ("out", "lse", "entropy"):
        a = torch.autograd.grad(getattr(got, x).sin().sum(), mine, retain_graph=True, allow_unused=True)
        b = torch.autograd.grad(getattr(want, x).sin().sum(), theirs, retain_graph=True, allow_unused=True)
        for s, t in zip(a, b, strict=True):
            assert torch.allclose(s, torch.zeros_like(s) if t is None else t, rtol=0, atol=1e-13)


def test_the_certificate_holds_and_is_reached(backend, device):
    for seed in range(20 if backend == "torch" else 3):
        q, k, v = operands(device=device, seed=seed)
        q = q * (1 + seed)
        kept, whole = parts(q, k, v, [range(0, LK, 3), range(LK)], device, backend=backend)
        bound = attention_certificate(kept.lse, whole.lse, v)
        moved = (kept.out - whole.out).norm(dim=-1)
        assert (moved <= bound + 1e-13).all()
    # two keys with opposite values, one kept: half the mass is gone, and out moves by 2 (1 - mu) |v|
    q, k = torch.zeros(1, 1, 1, 2, device=device), torch.zeros(1, 1, 2, 2, device=device)
    v = torch.tensor([[[[3.0, 4.0], [-3.0, -4.0]]]], device=device)
    kept, whole = parts(q, k, v, [[0], [0, 1]], device)
    assert torch.allclose(attention_certificate(kept.lse, whole.lse, v), (kept.out - whole.out).norm(dim=-1), rtol=1e-6)
    assert float(attention_certificate(whole.lse, whole.lse, v)) == 0


# ----------------------------------------------------------------------------------------- forms, errors, compile


def test_counts_and_padding_say_the_same(backend, device):
    q, k, v = operands(device=device)
    lists, counts = some(9, 3, device=device), torch.tensor([4, 0, 9], device=device)
    padded = torch.where(torch.arange(9, device=device) < counts[:, None], lists, -1)
    want = selected_attention(q, k, v, lists, counts, return_entropy=True, backend=backend)
    for form in ((padded, None), (padded.long(), None), (padded, counts.int()), (padded, torch.full_like(counts, 9))):
        for a, b in zip(selected_attention(q, k, v, *form, return_entropy=True, backend=backend), want, strict=True):
            assert torch.equal(a, b)


def test_a_list_a_batch_element(backend, device):
    q, k, v = operands(device=device)
    lists = some(9, B, 3, 1, device=device)
    got = selected_attention(q, k, v, lists, backend=backend)
    for b in range(B):
        alone = [x[b : b + 1] for x in (q, k, v)]
        assert torch.allclose(got[b : b + 1], selected_attention(*alone, lists[b], backend=backend), rtol=0, atol=1e-14)


ERRORS = [
    (TypeError, "q must be a tensor", lambda a: {**a, "q": [1]}),
    (TypeError, "v must have q's dtype", lambda a: {**a, "v": a["v"].half()}),
    (ValueError, r"k must be \(B, heads", lambda a: {**a, "k": a["k"][0]}),
    (ValueError, "v must have k's shape", lambda a: {**a, "v": a["v"][:, :, :3]}),
    (ValueError, "heads that divide 4", lambda a: {**a, "k": a["k"][:, [0, 1, 0]], "v": a["v"][:, [0, 1, 0]]}),
    (ValueError, "head dimension", lambda a: {n: x.repeat(1, 1, 1, 20) if n in "qkv" else x for n, x in a.items()}),
    (TypeError, "kv_indices must be an int32", lambda a: {**a, "kv_indices": a["kv_indices"].float()}),
    (TypeError, "kv_indices must be an int32", lambda a: {**a, "kv_indices": [1, 2]}),
    (ValueError, "kv_indices must be", lambda a: {**a, "kv_indices": a["kv_indices"].view(1, 1, 1, 1, -1)}),
    (ValueError, "frames that split", lambda a: {**a, "kv_indices": a["kv_indices"].expand(5, -1)}),
    (ValueError, "1, 2 or 4 heads", lambda a: {**a, "kv_indices": a["kv_indices"].expand(1, 3, -1)}),
    (ValueError, "1 or B = 2", lambda a: {**a, "kv_indices": a["kv_indices"].expand(3, 1, 1, -1)}),
    (ValueError, r"kv_counts must be in \[0, 9\]", lambda a: {**a, "kv_counts": 10}),
    (ValueError, r"kv_counts must be \(\)", lambda a: {**a, "kv_counts": torch.ones(3, dtype=torch.int32)}),
    (TypeError, "kv_counts must be an int", lambda a: {**a, "kv_counts": 2.0}),
    (ValueError, "key_bias must be broadcastable", lambda a: {**a, "key_bias": torch.zeros(7)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "change"), ERRORS, ids=[f"{i}" for i in range(len(ERRORS))])
def test_bad_arguments_are_named(error, match, change):
    q, k, v = operands(torch.float32)
    arguments = {"q": q, "k": k, "v": v, "kv_indices": some(9)}
    with pytest.raises(error, match=match):
        selected_attention(**change(arguments))


def test_a_backend_that_there_is_not():
    q, k, v = operands(torch.float32)
    for backend in ("host", "cuda"):
        with pytest.raises(ValueError, match=f"backend must be .*; got '{backend}'"):
            selected_attention(q, k, v, some(9, 3), backend=backend)


def test_what_the_host_can_see_is_checked():
    q, k, v = operands(torch.float32)
    for lists, counts, match in [
        (torch.tensor([0, LK]), None, f"got {LK}"), (torch.tensor([0, -2]), None, "got -2"),
        (torch.tensor([0, 1]), torch.tensor(3), "kv_counts must be"),
        (torch.tensor([0, 1]), torch.tensor(-1), "got -1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            selected_attention(q, k, v, lists, counts)


@pytest.mark.parametrize("stats", [False, True], ids=["out", "all"])
@pytest.mark.parametrize("form", ["shared", "frame"])
def test_compiled_equals_eager(form, stats):
    torch._dynamo.reset()
    lists = some(9, *FORMS[form])

    def f(q, k, v):
        got = selected_attention(q * 1.5, k, v, lists, 9, return_entropy=stats)
        return got.out.sum() + got.entropy.sin().sum() if stats else got.sin().sum()

    leaves = operands(torch.float32, grad=True)
    eager = f(*leaves)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.allclose(eager, compiled, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(eager, leaves), torch.autograd.grad(compiled, leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_opcheck(backend):
    q, k, v = operands(torch.float32, grad=True)
    lists = some(9, 3, 1)[None]
    counts = torch.full(lists.shape[:3], 9, dtype=torch.int32)
    for bias, entropy in ((None, False), (torch.zeros(B, HK, LK, requires_grad=True), True)):
        arguments = (q, k, v, lists, counts, bias, 0.3, entropy, backend)
        torch.library.opcheck(module._attention, arguments)


def test_autocast_changes_nothing():
    q, k, v = operands(torch.float32)
    lists = some(9, 3)
    want = selected_attention(q, k, v, lists, return_entropy=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = selected_attention(q, k, v, lists, return_entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
