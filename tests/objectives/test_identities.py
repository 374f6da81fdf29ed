"""Facts about the objectives that hold to rounding: specs of the Q-target family, in fp64."""

import math

import cases
import pytest
import torch

from burnish import Teacher, implied_target, objectives, row_loss

N, V = 6, 23
TIGHT = 1e-12
IDS = [c[0] for c in cases.all_objectives()]


def data(seed=0, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(N, V, generator=g, dtype=torch.float64) * scale
    t = torch.randn(N, V, generator=g, dtype=torch.float64) * scale
    return z, t, torch.randint(0, V, (N,), generator=g)


def value_grad(objective, z, y, t=None, **kw):
    z = z.clone().requires_grad_()
    teacher = None if t is None else Teacher(logits=t)
    loss = row_loss(z, y, objective, teacher=teacher, reduction=cases.summed(objective), **kw)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def close(a, b, tol=TIGHT):
    assert torch.isfinite(a).all()
    scale = b.norm().clamp(min=1.0)
    assert (a - b).norm() <= tol * scale, float((a - b).norm() / scale)


def delta(y):
    return torch.nn.functional.one_hot(y, V).double()


@pytest.mark.parametrize(("ident", "name", "arguments"), list(cases.all_objectives()), ids=IDS)
def test_gradient_sums_to_zero_and_shift_changes_nothing(ident, name, arguments):
    o, hidden, weight, bias, y, extra = cases.problem(name, arguments)
    t = cases.dense_teacher(extra)
    extra.pop("teacher", None)
    z = hidden @ weight.T + bias
    loss, g = value_grad(o, z, y, t, **extra)
    close(g.sum(1), torch.zeros(len(y), dtype=torch.float64))
    shift = torch.linspace(-3, 3, len(y), dtype=torch.float64)[:, None]
    moved, gm = value_grad(o, z + shift, y, t, **extra)
    close(moved, loss, 1e-11)
    close(gm, g, 1e-11)
    if t is not None:
        moved, gm = value_grad(o, z, y, t + shift, **extra)
        close(moved, loss, 1e-11)
        close(gm, g, 1e-11)


def test_trust_one_is_nll_and_trust_zero_eta_one_is_distillation():
    z, t, y = data()
    p, big_t = z.softmax(1), t.softmax(1)
    for eta in (0.0, 0.4, 1.0):
        loss, g = value_grad(objectives.target_sft(eta, trust=1.0), z, y, t)
        ref, gref = value_grad(objectives.nll(), z, y)
        close(loss, ref)
        close(g, gref)
    loss, g = value_grad(objectives.target_sft(1.0, trust=0.0), z, y, t)
    entropy = -(big_t * t.log_softmax(1)).sum(1)
    kl = (big_t * (t.log_softmax(1) - z.log_softmax(1))).sum(1)
    close(loss, kl + entropy)
    close(g, p - big_t)


def test_label_smoothing_is_torchs():
    z, _, y = data()
    for eps in (0.0, 0.1, 1.0):
        loss, g = value_grad(objectives.label_smoothing(eps), z, y)
        zr = z.clone().requires_grad_()
        ref = torch.nn.functional.cross_entropy(zr, y, label_smoothing=eps, reduction="none")
        close(loss, ref.detach())
        close(g, torch.autograd.grad(ref.sum(), zr)[0])


def test_kd_hybrid_is_a_q_target_up_to_teacher_entropy():
    z, t, y = data()
    lam = 0.3
    loss, g = value_grad(objectives.kd_hybrid(lam), z, y, t)
    other, gother = value_grad(objectives.target_sft(1.0, trust=1 - lam), z, y, t)
    entropy = -(t.softmax(1) * t.log_softmax(1)).sum(1)
    close(g, gother)
    close(loss + lam * entropy, other)


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize(("share", "tau"), [(0.45, 1.2), (0.45, 0.7), (1.0, 3.0), (0.2, 1.0)])
def test_chain_distillation_as_the_authors_write_it(share, tau, backend):
    """Value and gradient of (1 - a) CE + a T^2 KL by torch's kl_div, under both softcaps; and the closed form."""
    z, t, y = data(scale=12.0)
    zr = z.clone().requires_grad_()
    capped, teacher = 15 * (zr / 15).tanh(), 15 * (t / 15).tanh()
    kl = torch.nn.functional.kl_div(
        (capped / tau).log_softmax(1), (teacher / tau).log_softmax(1), reduction="none", log_target=True
    ).sum(1)  # fmt: skip
    ref = (1 - share) * torch.nn.functional.cross_entropy(capped, y, reduction="none") + share * tau**2 * kl
    leaf = z.clone().requires_grad_()
    o = objectives.chain_distillation(share, tau)
    given = {"teacher": Teacher(logits=t, softcap=15.0), "softcap": 15.0, "backend": backend}
    loss = row_loss(leaf, y, o, reduction="none", **given)
    close(loss.detach(), ref.detach())
    (g,) = torch.autograd.grad(loss.sum(), leaf)
    close(g, torch.autograd.grad(ref.sum(), zr)[0])
    c = capped.detach()
    form = (1 - share) * (c.softmax(1) - delta(y)) + share * tau * ((c / tau).softmax(1) - (teacher / tau).softmax(1))
    close(g, form * (1 - (c / 15).square()))


def test_chain_distillation_at_its_ends():
    """A teacher that is the student: no divergence and no gradient of it; share 0: plain NLL, no teacher asked for."""
    z, t, y = data()
    nll, gnll = value_grad(objectives.nll(), z, y)
    for share in (0.45, 1.0):
        loss, g = value_grad(objectives.chain_distillation(share), z, y, z)
        close(loss, (1 - share) * nll)
        close(g, (1 - share) * gnll)
    assert torch.equal(value_grad(objectives.chain_distillation(0.0), z, y)[0], nll)
    assert torch.equal(value_grad(objectives.chain_distillation(0.0), z, y, t)[1], gnll)
    assert not objectives.chain_distillation(0.0).needs
    one, gone = value_grad(objectives.chain_distillation(0.3, 1.0), z, y, t)
    hybrid, ghybrid = value_grad(objectives.kd_hybrid(0.3), z, y, t)
    close(one, hybrid)
    close(gone, ghybrid)
    only, gonly = value_grad(objectives.chain_distillation(1.0, 2.5), z, y, t)
    kd, gkd = value_grad(objectives.kd(2.5), z, y, t)
    close(only, kd)
    close(gonly, gkd)


def test_chain_distillation_at_another_temperature_of_the_op_and_a_teacher_list():
    """The op's temperature divides the student's logits first, as for ``kd``; a top-K teacher is raised to 1 / T."""
    z, t, y = data()
    o = objectives.chain_distillation(0.6, 1.7)
    loss, g = value_grad(o, z, y, t, temperature=0.8)
    same, gsame = value_grad(o, z / 0.8, y, t)
    close(loss, same)
    close(g, gsame / 0.8)
    top = t.log_softmax(1).topk(5, 1)
    dense = torch.full_like(t, -math.inf).scatter(1, top.indices, top.values)
    leaf = z.clone().requires_grad_()
    listed = row_loss(leaf, y, o, teacher=Teacher(ids=top.indices, logp=top.values, tail="zero"), reduction="none")
    loss, g = value_grad(o, z, y, dense)
    close(listed.detach(), loss)
    close(torch.autograd.grad(listed.sum(), leaf)[0], g)


def test_target_sft_without_teacher_is_dft():
    z, _, y = data()
    p = z.softmax(1)
    loss, g = value_grad(objectives.target_sft(0.0), z, y)
    dft, gdft = value_grad(objectives.dft(), z, y)
    _, gone = value_grad(objectives.beyond_log(1.0), z, y)
    py = p.gather(1, y[:, None])[:, 0]
    entropy = -(p * z.log_softmax(1)).sum(1)
    close(g, gdft)
    close(gdft, gone)
    close(loss, dft + (1 - py) * entropy)
    assert (loss - dft).abs().max() > 0.1  # the value differs
    shifted = z + torch.randn(N, 1, dtype=torch.float64)
    for eta in (0.2, 0.7, 1.0):  # a teacher that equals the student: any eta
        close(value_grad(objectives.target_sft(eta), z, y, shifted)[1], g)


def test_beyond_log_family():
    z, _, y = data()
    p = z.softmax(1)
    py = p.gather(1, y[:, None])
    for alpha in (0.5, 1.0, 2.0, 10.0):
        close(value_grad(objectives.beyond_log(alpha), z, y)[1], py**alpha * (p - delta(y)))
        close(value_grad(objectives.gce(alpha), z, y)[0], (1 - py[:, 0] ** alpha) / alpha)
    nll = value_grad(objectives.nll(), z, y)[0]
    close(value_grad(objectives.beyond_log(1e-7), z, y)[0], nll, 1e-5)
    assert torch.equal(value_grad(objectives.beyond_log(0.0), z, y)[0], nll)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_target_sft_gradient_forms(eta):
    z, t, y = data()
    p = z.softmax(1)
    r = ((1 - eta) * z + eta * t).softmax(1)
    geometric = p ** (1 - eta) * t.softmax(1) ** eta
    close(r, geometric / geometric.sum(1, keepdim=True))
    py = p.gather(1, y[:, None])
    _, g = value_grad(objectives.target_sft(eta), z, y, t)
    want = p - (1 - py) * r
    want = want.scatter(1, y[:, None], -(1 - py) * r.gather(1, y[:, None]))
    close(g, want)
    close(g, py * (p - delta(y)) + (1 - py) * (p - r))
    assert (g.abs().sum(1) <= 2).all()
    assert (g.gather(1, y[:, None]) <= 0).all()


def test_implied_target():
    z, t, y = data()
    p = z.softmax(1)
    py = p.gather(1, y[:, None])
    q = implied_target(z, y, objectives.dft())
    want = (1 - py) * p
    want.scatter_(1, y[:, None], 2 * py - py**2)
    close(q, want)
    close(implied_target(z, y, objectives.nll()), delta(y))
    for o in (objectives.target_sft(0.5), objectives.gift(2.0), objectives.kd()):
        q = implied_target(z, y, o, teacher=Teacher(logits=t))
        close(q.sum(1), torch.ones(N, dtype=torch.float64))
        assert (q > -1e-12).all()
    q = implied_target(z, y, objectives.gem(0.5))
    close(q.sum(1), torch.ones(N, dtype=torch.float64))
    close(q, delta(y) + p - (z / 0.5).softmax(1))
    assert (q < 0).any()


def test_gem():
    z, _, y = data()
    p = z.softmax(1)
    loss, g = value_grad(objectives.gem(1.0), z, y)
    nll, gn = value_grad(objectives.nll(), z, y)
    close(g, gn)
    close(loss, nll + (p * z.log_softmax(1)).sum(1))
    q = (z / 0.7).softmax(1)
    close(value_grad(objectives.gem(), z, y)[1], q - delta(y))


def test_reference_regularised():
    z, t, y = data()
    p, ref = z.softmax(1), t.softmax(1)
    py = p.gather(1, y[:, None])
    for name in ("asft", "sft_kl"):
        base = {"asft": "dft", "sft_kl": "nll"}[name]
        zero = value_grad(objectives.get(name, lam=0.0), z, y, t)
        plain = value_grad(objectives.get(base), z, y)
        close(zero[0], plain[0])
        close(zero[1], plain[1])
    lam = 0.4
    close(value_grad(objectives.sft_kl(lam), z, y, t)[1], (1 + lam) * (p - (delta(y) + lam * ref) / (1 + lam)))
    close(value_grad(objectives.asft(lam), z, y, t)[1], (py + lam) * (p - (py * delta(y) + lam * ref) / (py + lam)))


def test_jsd_limits():
    z, t, y = data(scale=1.0)
    p, big_t = z.softmax(1), t.softmax(1)
    for beta in (1e-3, 1e-4):
        g = value_grad(objectives.jsd(beta), z, y, t)[1] / beta
        bound = (beta / 2) * (big_t**2 / p + p * (big_t**2 / p).sum(1, keepdim=True))
        assert ((g - (p - big_t)).abs() <= 1.1 * bound + 1e-9).all()
    close(value_grad(objectives.jsd(0.0), z, y, t)[1], p - big_t)
    rkl = value_grad(objectives.reverse_kl(), z, y, t)
    end = value_grad(objectives.jsd(1.0), z, y, t)
    close(end[0], rkl[0])
    close(end[1], rkl[1])


def test_reverse_kl_is_the_expected_sampled_gradient():
    z, t, _ = data()
    p = z.softmax(1)
    o = objectives.on_policy_distillation()
    total = torch.zeros_like(z)
    for k in range(V):  # E_{y ~ p}
        total += p[:, k : k + 1] * value_grad(o, z, torch.full((N,), k), t)[1]
    loss, g = value_grad(objectives.reverse_kl(), z, torch.zeros(N, dtype=torch.int64), t)
    close(total, g)
    close(loss, (p * (z.log_softmax(1) - t.log_softmax(1))).sum(1))


def test_kd_temperature():
    z, t, y = data()
    tau = 2.5
    loss, g = value_grad(objectives.kd(tau), z, y, t)
    p, big_t = (z / tau).softmax(1), (t / tau).softmax(1)
    close(g, tau * (p - big_t))
    close(loss, tau**2 * (big_t * (big_t.log() - p.log())).sum(1))


def test_gift_is_a_mixture():
    z, t, y = data()
    beta = 3.0
    target = (t.log_softmax(1) + beta * delta(y)).softmax(1)
    loss, g = value_grad(objectives.gift(beta), z, y, t)
    close(g, z.softmax(1) - target)
    close(loss, -(target * z.log_softmax(1)).sum(1))
    ref = t.softmax(1).gather(1, y[:, None])[:, 0]
    gamma = ref * math.expm1(beta) / (1 + ref * math.expm1(beta))
    mixed = gamma[:, None] * delta(y) + (1 - gamma)[:, None] * t.softmax(1)
    close(target, mixed)


def test_psft_clips_only_above():
    z, _, y = data()
    logp = z.log_softmax(1).gather(1, y[:, None])[:, 0]
    for ratio, zero in ((1.5, True), (1.29, True), (1.27, False), (0.5, False)):
        ids, old = y[:, None], (logp - math.log(ratio))[:, None]
        zr = z.clone().requires_grad_()
        loss = row_loss(zr, y, objectives.psft(), teacher=Teacher(ids=ids, logp=old, tail="zero"), reduction="none")
        (g,) = torch.autograd.grad(loss.sum(), zr)
        if zero:
            assert torch.equal(g, torch.zeros_like(g))
            close(loss.detach(), torch.full((N,), -1.28, dtype=torch.float64))
        else:
            close(g, ratio * (z.softmax(1) - delta(y)))


def test_focal_weight_can_exceed_one():
    p = 0.1038
    z = torch.full((1, V), math.log((1 - p) / (V - 1)), dtype=torch.float64)
    z[0, 3] = math.log(p)
    y = torch.tensor([3])
    _, g = value_grad(objectives.focal(2.0), z, y)
    w = g[0, 3] / (p - 1)
    assert abs(float(w) - 1.2246) < 1e-4
    assert (implied_target(z, y, objectives.focal(2.0))[0] < 0).any()


def test_cross_entropy_is_at_least_the_entropy_of_its_target():
    z, t, y = data()
    p = z.softmax(1)
    py = p.gather(1, y[:, None])
    q = py * delta(y) + (1 - py) * (0.5 * z + 0.5 * t).softmax(1)
    loss, _ = value_grad(objectives.target_sft(0.5), z, y, t)
    entropy = -(q * q.log()).sum(1)
    assert (loss >= entropy).all()
    # equality where p = Q: the student equal to the teacher, the label certain
    sure = torch.full((1, V), -40.0, dtype=torch.float64)
    sure[0, 2] = 40.0
    loss, _ = value_grad(objectives.target_sft(0.5), sure, torch.tensor([2]), sure)
    assert abs(float(loss)) < 1e-12


def test_limits_of_the_label_probability():
    y = torch.tensor([4])
    t = torch.randn(1, V, dtype=torch.float64)
    low = torch.randn(1, V, dtype=torch.float64)
    low[0, 4] = -90.0  # p_y < 1e-38
    r = (0.5 * low + 0.5 * t).softmax(1)
    _, g = value_grad(objectives.target_sft(0.5), low, y, t)
    close(g, low.softmax(1) - r)
    assert value_grad(objectives.dft(), low, y)[1].abs().max() < 1e-37
    for seed in range(3):
        high = torch.randn(1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        high[0, 4] = 25.0
        rest = -torch.expm1(high.log_softmax(1)[0, 4])
        for o in (objectives.nll(), objectives.dft(), objectives.target_sft(0.5)):
            _, g = value_grad(o, high, y, t if o.needs else None)
            assert g.abs().max() <= rest * (1 + 1e-5)
            assert abs(g[0, 4]) > 0  # 1 - p is not lost to rounding
    zero = t.clone()
    zero[0, 4] = -torch.inf  # the teacher excludes the label
    _, g = value_grad(objectives.target_sft(0.5), low, y, zero)
    assert g[0, 4] == 0


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_low_precision_keeps_the_labels_gradient(backend):
    """dz_y is formed in fp32 and rounded once: subtracting 1 from a bf16 p_y = 0.999 leaves nothing of it."""
    y = torch.tensor([1])
    for dtype, ulp in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        z = torch.zeros(1, V, dtype=dtype)
        z[0, 1] = 10.0
        t = torch.randn(1, V).to(dtype)
        for o in (objectives.nll(), objectives.dft(), objectives.target_sft(0.5)):
            want = value_grad(o, z.double(), y, t.double() if o.needs else None)[1]
            zr = z.clone().requires_grad_()
            kw = {"teacher": Teacher(logits=t)} if o.needs else {}
            (g,) = torch.autograd.grad(row_loss(zr, y, o, reduction="sum", backend=backend, **kw), zr)
            assert g.dtype == dtype
            # 1.2e-7 of the fp32 sum of exponentials is 1.2e-4 of 1 - p_y = 1e-3
            assert abs(g[0, 1].double() / want[0, 1] - 1) < ulp + 5e-4, (o, dtype)


def test_user_objective_of_the_readme_has_an_exact_gradient():
    import re
    from pathlib import Path

    text = (Path(__file__).parents[2] / "README.md").read_text()
    block = re.search(r"```python\n(# your own objective.*?)```", text, re.S)
    assert block, "the README shows an objective of one's own"
    body = block.group(1)
    scope: dict = {}
    exec(body, scope)
    mine = [v for v in scope.values() if isinstance(v, objectives.Objective)]
    assert len(mine) == 1
    definition = [line for line in body.splitlines() if line.strip() and not line.startswith(("#", "import"))]
    assert len(definition) <= 6
    assert mine[0].name not in objectives.names()
    from burnish import reference

    z, t, y = data()
    zr = z.clone().requires_grad_()
    ref = reference.row_loss(zr, y, mine[0], teacher=t)
    (want,) = torch.autograd.grad(ref.sum(), zr)
    for backend in cases.BACKENDS:
        loss, g = value_grad(mine[0], z, y, t if mine[0].needs else None, backend=backend)
        close(loss, ref.detach())
        close(g, want)
        z32 = z.float().requires_grad_()
        teacher = {"teacher": Teacher(logits=t.float())} if mine[0].needs else {}
        (g32,) = torch.autograd.grad(row_loss(z32, y, mine[0], reduction="sum", backend=backend, **teacher), z32)
        assert (g32.double() - want).norm() <= 1e-5 * want.norm()


def test_user_objective_errors():
    from burnish import Objective, objective

    z, _, y = data()
    with pytest.raises(ValueError, match="unknown statistic 'entropi'"):
        objective("entropi")(lambda s: s.entropi)
    with pytest.raises(AttributeError, match="'mean' was not asked for"):
        row_loss(z, y, Objective("x", lambda s: s.mean, ("logp",)))
    with pytest.raises(ValueError, match="one loss a row"):
        row_loss(z, y, Objective("x", lambda s: s.logp.sum(), ("logp",)))
    with pytest.raises(ValueError, match="needs teacher="):
        row_loss(z, y, objectives.kd())
    with pytest.raises(ValueError, match="needs ids="):
        row_loss(z, y, objectives.unlikelihood())
    with pytest.raises(ValueError, match="token_weight"):
        row_loss(z, y, objectives.cft())
    with pytest.raises(ValueError, match="sequences="):
        row_loss(z, y, objectives.talr())
    with pytest.raises(ValueError, match="unknown objective 'sftt'"):
        objectives.get("sftt")
    with pytest.raises(ValueError, match="eta"):
        objectives.get("target_sft")
    with pytest.raises(ValueError, match=r"eta must lie in \[0.0, 1.0\]; got 2"):
        objectives.get("target_sft", eta=2)


def test_registry_describes_every_objective():
    rows = objectives.describe()
    assert len(rows) == len(objectives.names()) >= 30
    for row in rows:
        assert row["paper"] and row["weight"] and row["trust"]
        assert getattr(objectives, row["name"]).__doc__
