"""Row kernels of every backend against the definition: every statistic, its gradient, every dtype."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from rowcheck import BASE, check, expected, fold, grad, problem, spec_of

import burnish
from burnish import Teacher, objectives
from burnish.kernels import rows_host, rows_torch, rows_triton
from burnish.kernels.contract import DIFFERENTIABLE, STATISTICS
from burnish.ops import core

pytestmark = pytest.mark.usefixtures("small_blocks")

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRANSFORMS = {
    "none": {}, "scale": {"scale": 0.7, "teacher_scale": 1.3}, "softcap": {"softcap": 5.0, "teacher_softcap": 8.0},
    "temperature": {"temperature": True, "teacher_temperature": True},
    "student only": {"scale": 0.5, "softcap": 6.0, "temperature": True},
    "all": {"scale": 1.7, "softcap": 5.0, "temperature": True, "teacher_scale": 0.6, "teacher_softcap": 7.0,
            "teacher_temperature": True},
}  # fmt: skip
ALL = tuple(s for s in STATISTICS if s != "top_entropy")


def compare(kernels, p, spec, **options):
    """Statistics and gradient of a problem within tolerance of the definition; returns both."""
    want, want_grad = expected(p, spec)
    exact = p.tile.dtype == torch.float64
    plain, plain_grad = (want, want_grad) if exact else expected(p, spec, torch.float32)
    stats = fold(kernels, p, spec, slabs=options.get("slabs"))
    for name in sorted(spec.stats - {"top_entropy"}):
        check(name, stats[name], want[name], None if exact else plain[name])
    g = grad(kernels, p, spec, stats, **options)
    assert g.dtype == p.tile.dtype
    check("grad", g, want_grad, None if exact else plain_grad.to(p.tile.dtype))
    return stats, g


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stat", ALL)
def test_each_statistic_alone(kernels, stat, dtype, device):
    """One flag at a time: what a statistic needs is switched on by itself."""
    p = problem(3, 37, dtype=DTYPES[dtype], device=device)
    compare(kernels, p, spec_of(stat))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_all_statistics_under_transforms(kernels, transform, dtype, device):
    p = problem(2, 37, seed=1, dtype=DTYPES[dtype], device=device)
    compare(kernels, p, spec_of(*ALL, **TRANSFORMS[transform]))


@pytest.mark.parametrize("options", [
    {"alpha": 1 / 0.7, "eta": 0.0}, {"alpha": 0.0, "eta": 1.0}, {"alpha": 0.0, "eta": 0.0},
    {"alpha": -0.5, "eta": 0.5}, {"beta": 0.0}, {"beta": 1.0}, {"beta": 1e-6},
])  # fmt: skip
def test_mix_and_jsd_at_their_ends(kernels, options, device):
    """alpha = 0 is gem(beta=inf); 0 * -inf and -1 * -inf must not appear."""
    p = problem(3, 37, seed=2, device=device)
    p.tile[0, 3] = p.tile[1, 30] = p.teacher[2, 5] = float("-inf")
    stats, _ = compare(kernels, p, spec_of("mix", "jsd", **options))
    assert stats["jsd_p"].abs().max() < 100


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_where_the_two_sides_are_far_apart(kernels, beta, device):
    """log p - log T in the thousands: p underflows, log M must not."""
    p = problem(4, 37, seed=3, device=device, dtype=torch.float32, spread=800.0)
    compare(kernels, p, spec_of("jsd", "lse", beta=beta))


def test_block_of_the_real_size(kernels, monkeypatch, device):
    """More than one block of the shipped size."""
    monkeypatch.setattr(rows_triton, "BLOCK", 2048)
    monkeypatch.setattr(rows_torch, "BLOCK_BYTES", 2 << 20)
    monkeypatch.setattr(rows_host, "BLOCK", 1024)
    p = problem(2, 4099, seed=4, dtype=torch.float32, device=device)
    p.target[0] = 4098
    compare(kernels, p, spec_of(*ALL))


def test_ops_fold_forms_top_entropy(kernels, device):
    """top_entropy comes from the ops, around the same kernels."""
    p = problem(4, 37, seed=5, device=device)
    spec = spec_of(*STATISTICS, top_k=5, scale=0.7, softcap=9.0, temperature=True, teacher_temperature=True)
    task = SimpleNamespace(kernels=kernels, dtype=torch.float64, teacher="")
    rows = SimpleNamespace(
        target=p.target, inv_temp=p.inv_temp, teacher_inv_temp=p.teacher_inv_temp, ids=p.ids
    )  # fmt: skip
    got = core.fold(task, spec, p.tile, p.teacher, rows)
    from burnish.reference.row_stats import row_stats, transform

    z = transform(p.tile, scale=0.7, softcap=9.0, temperature=1 / p.inv_temp)
    want = row_stats(z, p.target, teacher=p.teacher * p.teacher_inv_temp[:, None], alpha=0.7, eta=0.3, beta=0.3,
                     top_k=5, ids=p.ids)  # fmt: skip
    for stat in STATISTICS:
        check(stat, got[stat], want[stat])


def test_gradient_at_a_certain_label_keeps_its_digits(kernels, device):
    """p_y = 1 - 2e-6: g (1 - p_y) is -g expm1(log p_y) to the last digit, whatever other terms are switched on."""
    p = problem(2, 16, dtype=torch.float32, device=device)
    p.tile.zero_()
    p.tile[torch.arange(2), p.target] = 16.0
    p.tile -= 16.0  # lse is then near 0, with an absolute error far below 1 - p_y
    p.upstream = {k: torch.zeros(2, device=device) for k in p.upstream}
    p.upstream["logp"] = torch.tensor([-1.0, -0.3], device=device)
    for names in (("logp",), ("logp", "jsd"), ("logp", "mean", "square")):
        spec = spec_of(*names)
        stats = fold(kernels, p, spec)
        got = grad(kernels, p, spec, stats).gather(1, p.target[:, None])[:, 0]
        want = -p.upstream["logp"].double() * torch.expm1(stats["logp"].double())
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_extreme_logits(kernels, dtype, device):
    """|z| up to 1e4, and p_y below the smallest fp32."""
    p = problem(4, 37, seed=6, dtype=DTYPES[dtype], device=device)
    p.tile[0] *= 2000
    p.tile[1, 0], p.target[1] = 300.0, 7
    p.tile[2].fill_(-1e4)
    p.tile[3, 36] = 1e4
    p.teacher[0] *= 2000
    stats, _ = compare(kernels, p, spec_of(*ALL))
    assert stats["logp"][1] < -200


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_runs_are_bit_equal(kernels, dtype, device):
    p, spec = problem(4, 37, dtype=DTYPES[dtype], device=device), spec_of(*ALL)
    runs = [fold(kernels, p, spec) for _ in range(2)]
    for name in spec.stats:
        assert torch.equal(runs[0][name].nan_to_num(), runs[1][name].nan_to_num()), name
    assert torch.equal(*[grad(kernels, p, spec, s) for s in runs])


@pytest.mark.parametrize("v", [37, 97])
def test_batch_invariance(kernels, v, device):
    """A row's statistics and gradient are the same bits alone, among others and in another order."""
    p, spec = problem(4, v, dtype=torch.float32, device=device), spec_of(*ALL, **TRANSFORMS["all"])
    stats = fold(kernels, p, spec)
    g = grad(kernels, p, spec, stats)
    for index in ([3], [2, 3, 0]):
        q = SimpleNamespace(**{k: x[index] for k, x in vars(p).items() if k != "upstream"})
        q.upstream = {k: x[index] for k, x in p.upstream.items()}
        part = fold(kernels, q, spec)
        for name in spec.stats:
            assert torch.equal(part[name].nan_to_num(), stats[name][index].nan_to_num()), name
        assert torch.equal(grad(kernels, q, spec, part), g[index])


GRADCHECK = {
    "nll": (objectives.nll(), {}),
    "target_sft": (objectives.target_sft(0.3), {}),
    "gem": (objectives.gem(), {}),
    "jsd": (objectives.jsd(0.3), {}),
    "reverse_kl": (objectives.reverse_kl(), {}),
    "confidence_penalty": (objectives.confidence_penalty(), {}),
    "unlikelihood": (objectives.unlikelihood(likelihood=1.0), {"softcap": 4.0, "temperature": 1.3, "scale": 0.8}),
}
#: Objectives that hold a distribution constant: their gradient is not that of their value.
CONSTANT_TARGET = ("target_sft", "gem")


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck_through_the_triton_source(name, device, monkeypatch):
    o, arguments = GRADCHECK[name]
    monkeypatch.setattr(rows_triton, "BLOCK", 8)
    p = problem(2, 11, seed=7, device=device, spread=1.0)
    extra = dict(arguments)
    if "teacher" in o.needs:
        extra["teacher"] = Teacher(logits=p.teacher)
    if "ids" in o.needs:
        extra["ids"] = p.ids
    weight = torch.tensor([0.7, 1.9], dtype=torch.float64, device=device)

    def run(z):
        return burnish.row_loss(z, p.target, o, reduction="none", token_weight=weight, backend="triton", **extra)

    if name not in CONSTANT_TARGET:
        assert torch.autograd.gradcheck(run, p.tile.clone().requires_grad_())
        return
    # numerically: only the statistics that are not held constant may move with z
    z = p.tile.clone().requires_grad_()
    (g,) = torch.autograd.grad(run(z).sum(), z)
    t = None if "teacher" not in extra else p.teacher
    q = (o.alpha * p.tile + (o.eta * t if o.eta else 0.0)).softmax(1)
    gamma = p.tile.log_softmax(1).exp().gather(1, p.target[:, None])[:, 0]

    def frozen(z):
        logp = z.log_softmax(1).gather(1, p.target[:, None])[:, 0]
        label, mix, lse = z.gather(1, p.target[:, None])[:, 0], (q * z).sum(1), z.logsumexp(1)
        loss = mix - label if name == "gem" else -gamma * logp + (1 - gamma) * (lse - mix)
        return (loss * weight).sum()

    step = 1e-6
    for i, j in ((0, 0), (0, int(p.target[0])), (1, 10), (1, int(p.target[1]))):
        d = torch.zeros_like(p.tile)
        d[i, j] = step
        slope = (frozen(p.tile + d) - frozen(p.tile - d)) / (2 * step)
        torch.testing.assert_close(g[i, j], slope, rtol=1e-6, atol=1e-8)


def test_every_statistic_has_a_test():
    """A statistic that is added to the contract is added here."""
    assert set(ALL) | {"top_entropy"} == set(STATISTICS) and set(DIFFERENTIABLE) <= set(ALL)
    for other in (rows_triton, rows_host):
        for name in ("fold", "fold_jsd", "grad"):
            assert inspect.signature(getattr(rows_torch, name)) == inspect.signature(getattr(other, name))
    assert set(STATISTICS) > BASE
