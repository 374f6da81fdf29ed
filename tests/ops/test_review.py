"""Defects that a hostile review found, each as the smallest case that showed it."""

import copy
import pickle

import pytest
import torch

from burnish import Objective, Teacher, implied_target, linear_loss, objectives, row_loss

N, V, H = 6, 37, 11
G = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(N, H, generator=G), torch.randn(V, H, generator=G)
Y = torch.randint(0, V, (N,), generator=G)
Z = HIDDEN @ WEIGHT.T


def test_loss_scale_meets_the_gradient_before_it_is_rounded():
    """fp16 with GradScaler's scale of 65536, and a mean over so many items that 1 / N alone would underflow."""
    hidden = HIDDEN.half().requires_grad_()
    weight = WEIGHT.half().requires_grad_()
    want = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    for items, scale in ((None, 8192.0), (2**18, 2.0**15), (2**22, 2.0**20)):
        for reduction in ("mean", "none"):
            loss = linear_loss(hidden, weight, Y, objectives.nll(), reduction=reduction, **(
                {"num_items": items} if reduction == "mean" else {}))  # fmt: skip
            loss = loss if reduction == "mean" else loss.sum() / (items or N)
            got = torch.autograd.grad(loss * scale, (hidden, weight))
            exact = torch.nn.functional.cross_entropy(want[0] @ want[1].T, Y, reduction="sum") / (items or N) * scale
            for a, b in zip(got, torch.autograd.grad(exact, want), strict=True):
                assert torch.isfinite(a).all()
                assert (a.double() - b).norm() <= 2e-3 * b.norm()


def test_psft_with_an_impossible_or_very_unlikely_label():
    t = torch.randn(N, V, generator=G)
    t[0, Y[0]], t[1, Y[1]] = -torch.inf, -200.0
    z = Z.clone().requires_grad_()
    row_loss(z, Y, objectives.psft(), teacher=Teacher(logits=t)).backward()
    assert torch.isfinite(z.grad).all()
    assert not z.grad[:2].any()  # clipped


@pytest.mark.parametrize("kind", ["linear", "rows"])
def test_second_derivative_is_refused_not_dropped(kind):
    x = (HIDDEN if kind == "linear" else Z).clone().requires_grad_()
    o = objectives.nll()
    loss = linear_loss(x, WEIGHT, Y, o) if kind == "linear" else row_loss(x, Y, o)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (loss + 10 * g.square().sum()).backward()


def test_unlikelihood_near_certainty():
    """As accurate as fp32 allows: the error of 1 - p_c, not that of a rounded log-sum-exp."""
    for margin in (10.0, 14.0):
        z = torch.zeros(1, V)
        z[0, 5] = margin
        ids, y = torch.tensor([[5]]), torch.tensor([1])
        grads = []
        for x in (z.clone().requires_grad_(), z.double().requires_grad_()):
            grads.append(torch.autograd.grad(row_loss(x, y, objectives.unlikelihood(), ids=ids), x)[0][0, 5].double())
        rest = 36 * torch.tensor(-margin).exp()
        assert abs(grads[0] / grads[1] - 1) < 4e-7 / rest


@pytest.mark.parametrize("name", ["talr", "iw_sft", "rho1"])
def test_zero_weight_rows_count_nowhere_in_a_coupling(name):
    """Dropped before projecting or not: the weights of the others are the same."""
    o = objectives.get(name)
    kw = (
        {"teacher": Teacher(logits=torch.randn(N, V, generator=torch.Generator().manual_seed(1)))}
        if "teacher" in o.needs
        else {}
    )
    weight = torch.ones(N)
    weight[[0, 3]] = 0
    kw["sequences"] = torch.arange(N) // 3
    a, info = linear_loss(HIDDEN, WEIGHT, Y, o, token_weight=weight, metrics=("nll",), **kw)
    b, info_rows = row_loss(Z, Y, o, token_weight=weight, metrics=("nll",), **kw)
    assert torch.allclose(a, b, rtol=1e-5)
    assert torch.allclose(info["nll"], info_rows["nll"], rtol=1e-4, atol=1e-5)
    assert not info_rows["nll"][[0, 3]].any()


@pytest.mark.parametrize("student", [torch.float32, torch.float64])
@pytest.mark.parametrize("teacher", [torch.float32, torch.float64, torch.bfloat16])
def test_teacher_of_another_precision(student, teacher):
    t_hidden, t_weight = torch.randn(N, 5, generator=G).to(teacher), torch.randn(V, 5, generator=G).to(teacher)
    form = Teacher(hidden=t_hidden, weight=t_weight)
    want = (t_hidden.double() @ t_weight.double().T).log_softmax(1)
    kl = (want.exp() * (want - Z.double().log_softmax(1))).sum(1).mean()
    for loss in (
        linear_loss(HIDDEN.to(student), WEIGHT.to(student), Y, objectives.kd(), teacher=form),
        row_loss(Z.to(student), Y, objectives.kd(), teacher=form),
    ):
        assert abs(float(loss) - float(kl)) < 1e-5


@pytest.mark.parametrize("name", ["kd", "target_sft", "jsd", "reverse_kl", "gift"])
def test_a_teacher_without_mass_on_the_students_support(name):
    o = objectives.get(name, **({"eta": 0.5} if name == "target_sft" else {}))
    z = Z.clone()
    z[0, 20:] = -torch.inf
    z[0, Y[0]] = 1.0
    t = torch.randn(N, V, generator=G)
    t[0] = -torch.inf
    z.requires_grad_()
    for backend in ("torch", "triton"):
        loss = row_loss(z, Y, o, teacher=Teacher(logits=t), reduction="none", backend=backend)
        (g,) = torch.autograd.grad(loss.sum(), z)
        assert torch.isfinite(loss).all() and torch.isfinite(g).all()
        assert loss[0] == 0 and not g[0].any() and g[1:].any()
    if name != "reverse_kl":
        none = Teacher(ids=torch.full((N, 3), -1), logp=torch.full((N, 3), -2.0), tail="zero")
        assert not row_loss(z, Y, o, teacher=none, reduction="none").any()


def test_implied_target_of_transformed_logits_without_grad_mode():
    with torch.no_grad():
        for kw in ({"temperature": 2.0}, {"softcap": 5.0}, {"scale": 0.5}):
            q = implied_target(Z, Y, objectives.nll(), **kw)
            assert torch.allclose(q, torch.nn.functional.one_hot(Y, V).float(), atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(implied_target(Z, Y, objectives.nll()).sum(1), torch.ones(N), atol=1e-5)
    with pytest.raises(ValueError, match="neither metrics nor reduction"):
        implied_target(Z, Y, objectives.nll(), metrics=("hit",))


def test_objectives_copy_and_pickle():
    o = objectives.target_sft(0.3)
    again = copy.deepcopy(o)
    other = pickle.loads(pickle.dumps(o))
    del o
    t = Teacher(logits=torch.randn(N, V, generator=G))
    assert torch.equal(row_loss(Z, Y, again, teacher=t), row_loss(Z, Y, other, teacher=t))


def test_saved_tensor_hooks_keep_what_they_hold():
    held = []
    hidden = HIDDEN.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or len(held) - 1, lambda i: held[i]):
        loss = linear_loss(hidden, WEIGHT, Y, objectives.nll())
    before = [x.clone() for x in held]
    (3 * loss).backward()
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_no_items_is_no_division_by_zero():
    none = torch.full_like(Y, -100)
    for items in (0, torch.tensor(0)):
        assert linear_loss(HIDDEN, WEIGHT, none, objectives.nll(), num_items=items) == 0
    with pytest.raises(ValueError, match="num_items must be a number >= 0"):
        linear_loss(HIDDEN, WEIGHT, Y, objectives.nll(), num_items=-1)


def test_rho1_keeps_exactly_the_ratio():
    o = objectives.rho1(ratio=0.6)
    t = Teacher(logits=torch.randn(25, 9, generator=G))
    loss = row_loss(torch.randn(25, 9, generator=G), torch.zeros(25, dtype=torch.int64), o, teacher=t, reduction="none")
    assert int((loss != 0).sum()) == 15


def test_metrics_are_taken_before_the_objectives_own_lines():
    o = Objective("in_place", lambda s: s.lse.mul_(2) - s.label, ("lse", "label"))
    with torch.no_grad():
        _, info = linear_loss(HIDDEN, WEIGHT, Y, o, metrics=("lse",))
    assert torch.allclose(info["lse"], Z.logsumexp(1), rtol=1e-5)


def test_errors_name_the_argument():
    ids = torch.full((N, 2), V)
    o = objectives.talr()
    for call, error, text in (
        (
            lambda: row_loss(Z, Y, o, sequences=torch.zeros(N, dtype=torch.int32)),
            TypeError,
            "sequences must be an int64",
        ),
        (lambda: linear_loss(HIDDEN, WEIGHT, Y, objectives.nll(), budget=18e6), ValueError, "budget must be a whole"),
        (lambda: linear_loss(HIDDEN, WEIGHT, Y, objectives.nll(), budget=-5), ValueError, "budget must be a whole"),
        (lambda: row_loss(Z, Y, objectives.nll(), ignore_index=None), TypeError, "ignore_index must be an int"),
        (lambda: row_loss(Z, Y, objectives.unlikelihood(), ids=ids), ValueError, "ids must lie below"),
        (lambda: row_loss(Z, Y, objectives.nll(), temperature=None), TypeError, "temperature must be a number"),
        (lambda: row_loss(Z, Y, objectives.nll(), num_items="3"), ValueError, "num_items must be"),
        (lambda: Teacher(logits=Z, temperature=0.0), ValueError, "temperature must be > 0"),
        (lambda: Teacher(hidden=HIDDEN, weight=WEIGHT, bias=torch.zeros(3)), ValueError, r"bias must be \(37,\)"),
        (lambda: Teacher(logits=Z.numpy()), TypeError, "logits must be a tensor"),
        (lambda: Teacher(ids=ids[:, :0], logp=Z[:, :0], tail="zero"), ValueError, "K >= 1"),
        (
            lambda: Objective("x", lambda s: s.lse, ("lse",), needs=frozenset({"reference"})),
            ValueError,
            "needs may name",
        ),
        (lambda: objectives.get("target_sft", eta="abc"), ValueError, "eta must be a number; got 'abc'"),
        (lambda: objectives.get("eaft", k="3"), ValueError, "k must be a whole number"),
        (lambda: objectives.get("psft", high="abc"), ValueError, "high must be a number"),
        (lambda: objectives.talr(tau=-1), ValueError, "tau must lie"),
    ):
        with pytest.raises(error, match=text):
            call()
