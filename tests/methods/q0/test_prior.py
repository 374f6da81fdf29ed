"""The learned prior: convexity, EM, Newton steps, AdamW, copies, top-K, and a second split.  All in fp64, seconds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from burnish.methods.q0 import prior
from burnish.methods.q0.prior import (
    check_split,
    choose_k,
    effective_size,
    learn_prior,
    mixture_logp,
    mixture_nll,
    sweep_k,
    top_k,
)

M, N = 12, 600


def members(m=M, n=N, seed=0, dtype=torch.float64):
    """log p_i(y_t) of m members of two families and different quality: a sparse optimum with a few members."""
    g = torch.Generator().manual_seed(seed)
    text = 1.5 * torch.randn(n, generator=g, dtype=torch.float64) - 3
    family = 0.6 * torch.randn(2, n, generator=g, dtype=torch.float64)
    own = 0.5 * torch.randn(m, n, generator=g, dtype=torch.float64)
    quality = torch.linspace(-0.5, 0, m, dtype=torch.float64)[torch.randperm(m, generator=g)]
    return (text + family[torch.arange(m) % 2] + own + quality[:, None]).clamp(max=-1e-4).to(dtype)


def brute(log_probs, w):
    return float(-(w[:, None] * log_probs.double().exp()).sum(0).log().mean())


def kkt(log_probs, w):
    p = log_probs.double().exp()
    return (p / (w @ p)).mean(1)


@pytest.fixture(params=[8 << 20, 4096], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(prior, "BLOCK_BYTES", request.param)


def test_the_optimum(blocks):
    """KKT to 1e-6, sparse, below uniform and the best single member; the bound on what is left holds."""
    log_probs = members()
    found = learn_prior(log_probs)
    g = kkt(log_probs, found.weights)
    assert found.weights.sum() == pytest.approx(1, abs=1e-12) and bool((found.weights >= 0).all())
    assert float(g.max()) <= 1 + 1e-6
    assert bool((g[found.weights > 1e-6] - 1).abs().max() < 1e-5)
    assert 1 < int((found.weights > 0).sum()) < M
    assert found.nll == pytest.approx(brute(log_probs, found.weights), abs=1e-12)
    uniform = brute(log_probs, torch.full((M,), 1 / M, dtype=torch.float64))
    assert found.nll < uniform - 0.01 and found.nll < float(-log_probs.mean(1).max()) - 0.01
    exact = learn_prior(log_probs, tol=1e-12)
    assert 0 <= found.nll - exact.nll <= found.gap + 1e-14
    assert found.effective_size == effective_size(found.weights)
    assert found.steps <= 60


@pytest.mark.parametrize("newton", [True, False])
def test_the_loss_never_rises(newton):
    for seed in range(4):
        found = learn_prior(members(seed=seed), newton=newton, tol=1e-8, max_steps=400)
        assert len(found.losses) > 5
        assert all(b <= a for a, b in itertools.pairwise(found.losses))
        assert found.losses[-1] == found.nll


def test_plain_em_and_newton_steps_end_at_the_same_place():
    log_probs = members()
    slow = learn_prior(log_probs, newton=False, tol=1e-4, max_steps=5000)
    fast = learn_prior(log_probs)
    assert 0 <= slow.nll - fast.nll < 1e-4
    assert float(kkt(log_probs, slow.weights).max()) <= 1 + 1e-4
    assert fast.steps < slow.steps / 5


def test_plain_em_is_the_formula():
    log_probs = members(5, 40)
    w = torch.full((5,), 0.2, dtype=torch.float64)
    for _ in range(6):
        w = w * kkt(log_probs, w)
    found = learn_prior(log_probs, newton=False, max_steps=7)
    assert torch.allclose(found.weights, w, atol=1e-13)


def test_the_authors_adamw_finds_the_same_optimum():
    """300 steps at 0.5 within 1e-4 nats; its gradient is autograd's of their own lines."""
    log_probs = members()
    adamw, em = learn_prior(log_probs, "adamw"), learn_prior(log_probs)
    assert 0 <= adamw.nll - em.nll < 1e-4
    assert (adamw.weights - em.weights).abs().max() < 0.02
    alpha = (1e-4 * torch.randn(M, generator=torch.Generator().manual_seed(3))).double().requires_grad_()
    optimizer = torch.optim.AdamW([alpha], lr=0.5, weight_decay=0.0)
    for _ in range(4):
        p = log_probs.exp()
        loss = -(alpha.softmax(0) @ p).clamp(min=1e-12).log().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([alpha], 1.0)
        optimizer.step()
    four = learn_prior(log_probs, "adamw", max_steps=4, seed=3)
    assert torch.allclose(four.weights, alpha.detach().softmax(0), atol=1e-12)


def test_adamws_floor_of_1e_minus_12_has_no_gradient():
    """Tokens below it weigh nothing in the authors' lines; the loss is that of the floor."""
    log_probs = members(4, 30)
    log_probs[:, :6] -= 40
    alpha = (1e-4 * torch.randn(4, generator=torch.Generator().manual_seed(0))).double().requires_grad_()
    optimizer = torch.optim.AdamW([alpha], lr=0.5, weight_decay=0.0)
    losses = []
    for _ in range(5):
        loss = -(alpha.softmax(0) @ log_probs.exp()).clamp(min=1e-12).log().mean()
        (alpha.grad,) = torch.autograd.grad(loss, alpha)
        losses.append(loss.item())
        optimizer.step()
    found = learn_prior(log_probs, "adamw", max_steps=5)
    assert torch.allclose(found.weights, alpha.detach().softmax(0), atol=1e-9)
    assert found.losses == pytest.approx(losses, abs=1e-12)


def test_the_quadratic_model_is_minimised_exactly():
    """Against every active set, from any start."""
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        n = 2 + seed % 4
        a = torch.randn(n, 2 * n, generator=g, dtype=torch.float64)
        h, b = a @ a.T, 5 * torch.randn(n, generator=g, dtype=torch.float64)
        best, where = 0.0, torch.zeros(n, dtype=torch.float64)
        for free in itertools.product((False, True), repeat=n):
            index = torch.tensor(free).nonzero()[:, 0]
            y = torch.zeros(n, dtype=torch.float64)
            y[index] = torch.linalg.solve(h[index][:, index], b[index]) if len(index) else y[index]
            value = float(y @ h @ y / 2 - b @ y)
            if bool((y >= 0).all()) and value < best:
                best, where = value, y
        start = torch.rand(n, generator=g, dtype=torch.float64) * torch.randint(0, 2, (n,), generator=g)
        assert torch.allclose(prior._nonnegative(h, b, start), where, atol=1e-9), seed


@pytest.mark.parametrize("seed", [67, 79, 107])
def test_where_a_whole_newton_step_would_raise_the_loss(seed):
    """Few tokens, probabilities many orders apart, and a start that has one member: the step is shortened."""
    g = torch.Generator().manual_seed(seed)
    m, n = 3 + seed % 4, 4 + seed % 13
    log_probs = -(torch.rand(m, n, generator=g, dtype=torch.float64) * (5 + 40 * (seed % 5)))
    start = torch.zeros(m)
    start[seed % m] = 1
    found = learn_prior(log_probs, start=start)
    assert all(b < a for a, b in itertools.pairwise(found.losses))
    assert float(kkt(log_probs, found.weights).max()) <= 1 + 1e-6
    assert found.nll == pytest.approx(learn_prior(log_probs).nll, abs=1e-6)


def test_a_start_that_rules_a_token_out():
    log_probs = members(4, 60)
    log_probs[0, 3] = -math.inf
    found = learn_prior(log_probs, start=torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert found.nll == pytest.approx(learn_prior(log_probs).nll, abs=1e-6)
    assert all(math.isfinite(x) for x in found.losses)


def test_convexity_along_a_segment():
    log_probs = members()
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        a, b = (torch.rand(M, generator=g, dtype=torch.float64).softmax(0) for _ in range(2))
        a = a.pow(20) / a.pow(20).sum()
        for t in (0.2, 0.5, 0.9):
            line = t * mixture_nll(log_probs, a) + (1 - t) * mixture_nll(log_probs, b)
            assert mixture_nll(log_probs, t * a + (1 - t) * b) <= line + 1e-12


def test_permuting_members_permutes_the_weights():
    log_probs = members()
    order = torch.randperm(M, generator=torch.Generator().manual_seed(2))
    found, moved = learn_prior(log_probs, tol=1e-10), learn_prior(log_probs[order], tol=1e-10)
    assert torch.allclose(found.weights[order], moved.weights, atol=1e-7)


@pytest.mark.parametrize("newton", [True, False])
def test_a_copy_leaves_the_optimum_and_a_new_member_never_raises_it(newton):
    log_probs = members(seed=4)
    options = {"newton": newton, "tol": 1e-6 if newton else 1e-4, "max_steps": 5000}
    base = learn_prior(log_probs[:6], **options)
    copied = learn_prior(torch.cat([log_probs[:6], log_probs[:6]]), **options)
    assert copied.nll == pytest.approx(base.nll, abs=2 * options["tol"])
    before = base.nll
    for m in range(7, M + 1):
        more = learn_prior(log_probs[:m], **options).nll
        assert more <= before + options["tol"]
        before = more


def test_jensen():
    log_probs = members()
    uniform = torch.full((M,), 1 / M, dtype=torch.float64)
    assert mixture_nll(log_probs, uniform) <= float(-log_probs.mean())


def test_one_member_and_tokens_that_some_rule_out(blocks):
    log_probs = members(3, 50)
    assert learn_prior(log_probs[:1]).weights.tolist() == [1.0]
    log_probs[0, ::2] = -math.inf
    log_probs[1, 1::2] = -math.inf
    log_probs[2] -= 400  # so far below that it only matters where nobody else is
    log_probs[:2, 7] = -math.inf
    found = learn_prior(log_probs)
    assert math.isfinite(found.nll) and found.weights.min() > 0
    assert float(kkt(log_probs, found.weights).max()) <= 1 + 1e-5
    assert found.nll == pytest.approx(mixture_nll(log_probs, found.weights), abs=1e-9)
    alone = torch.tensor([1.0, 0.0, 0.0])
    assert mixture_nll(log_probs, alone) == math.inf
    # of a probability that has no fp64 number
    assert mixture_nll(members(2, 5), torch.tensor([3.0, 3.0])) == mixture_nll(members(2, 5), torch.tensor([0.5, 0.5]))
    far = torch.tensor([[-2000.0, -1.0], [-2001.0, -2.0]], dtype=torch.float64)
    want = 2000 - math.log(0.5 + 0.5 * math.exp(-1))
    assert float(-mixture_logp(far, torch.tensor([0.5, 0.5]))[0]) == pytest.approx(want, rel=1e-12)
    assert math.isfinite(learn_prior(far).nll)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_log_probabilities_are_summed_in_fp64(dtype):
    log_probs = members(dtype=dtype)
    found, wide = learn_prior(log_probs), learn_prior(log_probs.double())
    assert found.weights.dtype == torch.float64
    assert found.nll == wide.nll and torch.equal(found.weights, wide.weights)


def test_top_k():
    """K = M is the mixture, renormalised; a refit is never worse on its own set; ties go to the earlier member."""
    log_probs = members(seed=5)
    w = learn_prior(log_probs).weights
    assert torch.allclose(top_k(log_probs, w, M), w, atol=1e-15)
    for k in (1, 2, 3, 5, 9):
        plain, refitted = top_k(log_probs, w, k), top_k(log_probs, w, k, refit=True)
        assert plain.sum() == pytest.approx(1) and int((plain > 0).sum()) <= k
        kept = torch.argsort(w, descending=True)[:k]
        assert torch.allclose(plain[kept], w[kept] / w[kept].sum())
        assert mixture_nll(log_probs, refitted) <= mixture_nll(log_probs, plain)
        assert not bool((refitted[torch.argsort(w, descending=True)[k:]] > 0).any())
    two = mixture_nll(log_probs, top_k(log_probs, w, 2)) - mixture_nll(log_probs, top_k(log_probs, w, 2, refit=True))
    assert two > 1e-6  # the refit does move the weights
    equal = torch.full((M,), 1 / M)
    assert top_k(log_probs, equal, 2).nonzero()[:, 0].tolist() == [0, 1]


def test_a_member_that_a_refit_needs_and_the_start_left_out():
    """Newton steps give weight to a member that starts at 0; the loss still never rises."""
    log_probs = members()
    start = torch.zeros(M)
    start[int(log_probs.mean(1).argmin())] = 1.0
    found = learn_prior(log_probs, start=start)
    assert found.nll == pytest.approx(learn_prior(log_probs).nll, abs=1e-6)
    assert all(b <= a for a, b in itertools.pairwise(found.losses))


def test_k_is_chosen_on_the_fitness_set():
    log_probs, second = members(seed=6), members(seed=6)[:, torch.randperm(N)[:200]]
    w = learn_prior(log_probs).weights
    points = sweep_k(log_probs, w, second=second)
    assert [p.k for p in points] == [1, 2, 4, 8, 12]
    assert points[-1].nll == pytest.approx(mixture_nll(log_probs, w))
    best = choose_k(points)
    assert best.nll == min(p.nll for p in points)
    assert choose_k(points, slack=10.0).k == 1
    assert all(p.second_nll == pytest.approx(mixture_nll(second, p.weights)) for p in points)
    refitted = sweep_k(log_probs, w, (2, 3), refit=True)
    assert all(r.nll <= mixture_nll(log_probs, top_k(log_probs, w, r.k)) for r in refitted)


def test_a_second_split_tells_weights_that_only_fit():
    """Members that differ by luck alone: what the weights gain on 40 tokens is lost on the next thousand."""
    g = torch.Generator().manual_seed(0)
    log_probs = -3 + 0.8 * torch.randn(24, 1040, generator=g, dtype=torch.float64).clamp(max=2)
    fitness, second = log_probs[:, :40], log_probs[:, 40:]
    found = check_split(fitness, second, learn_prior(fitness).weights)
    assert found.gain[0] > 0.02 > 0 > found.gain[1]
    real = members(seed=7, n=4000)
    found = check_split(real[:, :2000], real[:, 2000:], learn_prior(real[:, :2000]).weights)
    assert found.gain[0] > found.gain[1] > 0
    assert found.single[1] > found.learned[1]


def test_effective_size():
    assert effective_size(torch.full((7,), 1 / 7)) == pytest.approx(7)
    assert effective_size(torch.tensor([0.0, 1.0, 0.0])) == 1.0
    assert effective_size(torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(2)


def test_errors():
    good = members(3, 8)
    nan, above, dead = good.clone(), good.clone(), good.clone()
    nan[1, 3], above[1, 3] = math.nan, 0.1
    dead[:, 5] = -math.inf
    for call, message in (
        (lambda: learn_prior(good[0]), r"log_probs must be \(members, tokens\)"),
        (lambda: learn_prior(good[:0]), "at least one member"),
        (lambda: learn_prior(good[:, :0]), "no token to learn"),
        (lambda: learn_prior(nan), "must not be NaN"),
        (lambda: learn_prior(above), "at most 0; got 0.1"),
        (lambda: learn_prior(dead), "rules out token 5"),
        (lambda: learn_prior(good, "sgd"), "method must be one of em, adamw; got 'sgd'"),
        (lambda: learn_prior(good, tol=0.0), "tol must be > 0"),
        (lambda: learn_prior(good, max_steps=0), "max_steps must be at least 1"),
        (lambda: learn_prior(good, "adamw", start=torch.ones(3)), "start goes with"),
        (lambda: learn_prior(good, start=torch.ones(4)), r"weights must be \(3,\)"),
        (lambda: mixture_nll(good, torch.tensor([1.0, -1.0, 1.0])), "non-negative"),
        (lambda: mixture_nll(good[:, :0], torch.ones(3)), "no token"),
        (lambda: top_k(good, torch.ones(3), 4), "k must be a whole number from 1 to 3; got 4"),
        (lambda: choose_k([]), "no points"),
        (lambda: check_split(good, good[:2], torch.ones(3)), "second must have the fitness set's 3 members"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"log_probs must be a float tensor; got torch\.int64"):
        learn_prior(torch.zeros(2, 2, dtype=torch.int64))
