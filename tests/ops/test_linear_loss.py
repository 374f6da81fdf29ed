"""linear_loss against the reference on whole logits, and everything a training loop may do to it."""

import cases
import pytest
import torch

from burnish import Teacher, linear_loss, objectives, reference, row_loss
from burnish.kernels import dispatch
from burnish.ops import geometry

IDS = [c[0] for c in cases.all_objectives()]


def reference_grads(o, hidden, weight, bias, target, extra, reduction="sum", **kw):
    """Losses and gradients of hidden, weight, bias in fp64 by autograd through the whole logits."""
    leaves = [x.double().detach().requires_grad_() for x in (hidden, weight, bias)]
    z = leaves[0] @ leaves[1].T + leaves[2]
    other = {k: v for k, v in extra.items() if k != "teacher"}
    t = extra.get("teacher")
    tz = None
    if t is not None:
        tz = t.hidden.double() @ t.weight.double().T + (0 if t.bias is None else t.bias.double())
    loss = reference.row_loss(z, target, o, teacher=tz, **other, **kw)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaves)


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def cast(extra, dtype):
    out = dict(extra)
    if (t := extra.get("teacher")) is not None:
        out["teacher"] = Teacher(hidden=t.hidden.to(dtype), weight=t.weight.to(dtype), bias=t.bias.to(dtype))
    if "token_weight" in out:
        out["token_weight"] = out["token_weight"].to(dtype)
    return out


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("ident", "name", "arguments"), list(cases.all_objectives()), ids=IDS)
def test_every_objective(ident, name, arguments, dtype, backend):
    """Relative error of the logits' gradient <= 1e-12 in fp64 and 1e-5 in fp32; and of what follows from it."""
    tol = 1e-12 if dtype == torch.float64 else 1e-5
    o, hidden, weight, bias, target, extra = cases.problem(name, arguments)
    loss, (dx, dw, db) = reference_grads(o, hidden, weight, bias, target, extra)
    z = (hidden @ weight.T + bias).to(dtype).requires_grad_()
    got = row_loss(z, target, o, reduction=cases.summed(o), backend=backend, **cast(extra, dtype))
    (dz,) = torch.autograd.grad(got.sum(), z)
    want = torch.autograd.functional.vjp(
        lambda q: reference.row_loss(
            q, target, o, teacher=cases.dense_teacher(extra), **{k: v for k, v in extra.items() if k != "teacher"}
        ).sum(), z.detach().double())[1]  # fmt: skip
    assert relative(got, loss.sum() if o.joint else loss) <= tol
    assert relative(dz, want) <= tol
    for reduction in ("sum", "none"):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        got = linear_loss(
            *leaves[:2], target, o, bias=leaves[2], reduction=reduction, backend=backend, **cast(extra, dtype)
        )
        assert relative(got.sum(), loss.sum()) <= tol
        # the products round the logits before the objective sees them
        slack = 1 if dtype == torch.float64 else 5
        for a, b in zip(torch.autograd.grad(got.sum(), leaves), (dx, dw, db), strict=True):
            assert a.dtype == dtype
            assert relative(a, b) <= slack * tol


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["nll", "target_sft", "jsd", "gem", "reverse_kl"])
def test_low_precision_beats_plain_torch(name, dtype, backend):
    """fp32 logits and accumulators from low-precision operands: at most plain torch's error in that dtype."""
    arguments = {"eta": 0.5} if name == "target_sft" else {}
    o, hidden, weight, bias, target, extra = cases.problem(name, arguments, n=24, v=61, h=32, dtype=dtype)
    loss, want = reference_grads(o, hidden, weight, bias, target, extra)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    z = leaves[0] @ leaves[1].T + leaves[2]
    t = extra.get("teacher")
    tz = None if t is None else t.hidden @ t.weight.T + t.bias
    plain_loss = reference.row_loss(z, target, o, teacher=tz)
    plain = torch.autograd.grad(plain_loss.sum(), leaves)
    ours = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    got = linear_loss(
        *ours[:2],
        target,
        o,
        bias=ours[2],
        reduction="sum",
        backend=backend,
        budget=_budget(ours, extra, 7, backend=backend),
        **extra,
    )
    assert got.dtype == torch.float32
    assert relative(got, loss.sum()) <= max(relative(plain_loss.sum(), loss.sum()), 1e-5)
    for a, b, p in zip(torch.autograd.grad(got, ours), want, plain, strict=True):
        floor = torch.finfo(dtype).eps
        print(name, dtype, relative(a, b), relative(p, b))
        assert relative(a, b) <= 1.0 * relative(p, b) + 0.5 * floor


def _budget(leaves, extra, rows, backend="auto"):
    hidden, weight = leaves[:2]
    t = extra.get("teacher")
    common = {
        "rows": hidden.shape[0], "vocabulary": weight.shape[0], "hidden": hidden.shape[1], "weight_dtype": weight.dtype,
        "compute_dtype": hidden.dtype, "device": hidden.device, "bias_grad": True, "teacher": t.kind if t else "",
        "teacher_hidden": t.hidden.shape[1] if t and t.kind == "hidden" else 0,
        "ids": extra["ids"].shape[1] if "ids" in extra else 0, "backend": dispatch.resolve(backend, hidden.device),
    }  # fmt: skip
    g = geometry.chunks(**common)
    return g.fixed + rows * g.per_row


@pytest.mark.parametrize("rows", [1, 3, 7, 50])
@pytest.mark.parametrize("name", ["nll", "target_sft", "talr", "rho1", "unlikelihood"])
def test_any_chunking_gives_the_same_result(name, rows, monkeypatch):
    arguments = {"eta": 0.5} if name == "target_sft" else {}
    o, hidden, weight, bias, target, extra = cases.problem(name, arguments, n=23, v=41)
    loss, want = reference_grads(o, hidden, weight, bias, target, extra)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    tiles = {"SLAB": 2 * rows + 1, "TILE_ROWS": 2 * rows, "PRODUCT_ROWS": rows}  # of the vocabulary-outer order
    for constant, size in tiles.items():
        monkeypatch.setattr(geometry, constant, {"cpu": size})
    for reduction, budget in (("sum", _budget(leaves, extra, rows)), ("none", None)):
        got = linear_loss(*leaves[:2], target, o, bias=leaves[2], reduction=reduction, budget=budget, **extra)
        assert relative(got.sum(), loss.sum()) < 1e-13
        for a, b in zip(torch.autograd.grad(got.sum(), leaves), want, strict=True):
            assert relative(a, b) < 1e-12


def small(seed=0, n=9, v=31, h=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, v, (n,), generator=g)


NLL = objectives.nll()


def test_gradcheck_and_per_row_upstream():
    hidden, weight, target = small(n=4, v=7, h=3)
    target[2] = -100
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        for o in (NLL, objectives.gem(0.5), objectives.deft(), objectives.confidence_penalty()):
            if o.name in ("gem", "deft"):  # constants inside: not the derivative of the value
                continue

            def fn(h, w, b, o=o, r=reduction):
                return linear_loss(h, w, target, o, bias=b, reduction=r, softcap=5.0, temperature=1.3)

            assert torch.autograd.gradcheck(fn, (hidden, weight, bias))
    up = torch.randn(4, dtype=torch.float64)
    a = torch.autograd.grad(linear_loss(hidden, weight, target, NLL, reduction="none"), (hidden, weight), up)
    z = hidden @ weight.T
    b = torch.autograd.grad(torch.nn.functional.cross_entropy(z, target, reduction="none"), (hidden, weight), up)
    for x, y in zip(a, b, strict=True):
        assert relative(x, y) < 1e-12


def test_second_backward_gives_the_same_gradient_and_double_backward_is_refused():
    for reduction in ("mean", "none"):
        hidden, weight, target = small()
        loss = linear_loss(hidden, weight, target, NLL, reduction=reduction).sum() * 2
        loss.backward(retain_graph=True)
        first = (hidden.grad.clone(), weight.grad.clone())
        hidden.grad = weight.grad = None
        loss.backward(retain_graph=True)
        assert torch.equal(hidden.grad, first[0])
        assert torch.equal(weight.grad, first[1])
        hidden.grad = weight.grad = None
        loss.backward()
        assert torch.equal(hidden.grad, first[0])
        assert torch.equal(weight.grad, first[1])
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    (g,) = torch.autograd.grad(linear_loss(hidden, weight, target, NLL).square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_inputs_are_never_written(poison):
    for reduction in ("mean", "none"):
        o, hidden, weight, bias, target, extra = cases.problem("target_sft", {"eta": 0.5}, dtype=torch.float32)
        t = extra["teacher"]
        inputs = [hidden, weight, bias, target, t.hidden, t.weight, t.bias]
        before = [x.clone() for x in inputs]
        versions = [x._version for x in inputs]
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        loss = linear_loss(*leaves[:2], target, o, bias=leaves[2], reduction=reduction, **extra).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
        assert [x._version for x in inputs] == versions
        assert all(torch.isfinite(x.grad).all() for x in leaves)


def test_frozen_sides_are_skipped_and_the_other_is_right():
    hidden, weight, target = small()
    z = hidden @ weight.T
    want = torch.autograd.grad(torch.nn.functional.cross_entropy(z, target), (hidden, weight))
    for reduction in ("mean", "none"):
        loss = linear_loss(hidden.detach(), weight, target, NLL, reduction=reduction)
        (dw,) = torch.autograd.grad(loss.sum() / (9 if reduction == "none" else 1), weight)
        assert relative(dw, want[1]) < 1e-12
        loss = linear_loss(hidden, weight.detach(), target, NLL, reduction=reduction)
        (dx,) = torch.autograd.grad(loss.sum() / (9 if reduction == "none" else 1), hidden)
        assert relative(dx, want[0]) < 1e-12
    assert not linear_loss(hidden.detach(), weight.detach(), target, NLL).requires_grad
    bias = torch.zeros(31, dtype=torch.float64, requires_grad=True)
    (db,) = torch.autograd.grad(linear_loss(hidden.detach(), weight.detach(), target, NLL, bias=bias), bias)
    zb = (hidden @ weight.T).detach() + bias
    assert relative(db, torch.autograd.grad(torch.nn.functional.cross_entropy(zb, target), bias)[0]) < 1e-12
    with torch.no_grad():
        assert torch.isfinite(linear_loss(hidden, weight, target, NLL))


def test_frozen_weight_costs_no_gemm():
    """The weight's product is really not computed: counted, not assumed."""
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight, target = small(n=16, v=64, h=32)
    one = 2 * 16 * 64 * 32
    for h, w, count in ((hidden, weight, 3), (hidden.detach(), weight, 2), (hidden, weight.detach(), 2),
                        (hidden.detach(), weight.detach(), 1)):  # fmt: skip
        with FlopCounterMode(display=False) as flops:
            loss = linear_loss(h, w, target, NLL)
            if loss.requires_grad:
                loss.backward()
        assert flops.get_total_flops() == count * one
    dropped = target.clone()
    dropped[:12] = -100
    with FlopCounterMode(display=False) as flops:
        linear_loss(hidden, weight, dropped, NLL).backward()
    assert flops.get_total_flops() == 3 * one // 4  # ignored rows are not projected


def test_tied_embedding_accumulates_both_gradients():
    embedding = torch.nn.Embedding(31, 8, dtype=torch.float64)
    tokens = torch.randint(0, 31, (9,))
    target = torch.randint(0, 31, (9,))
    linear_loss(torch.tanh(embedding(tokens)), embedding.weight, target, NLL).backward()
    got = embedding.weight.grad.clone()
    embedding.weight.grad = None
    z = torch.tanh(embedding(tokens)) @ embedding.weight.T
    torch.nn.functional.cross_entropy(z, target).backward()
    assert relative(got, embedding.weight.grad) < 1e-12


@pytest.mark.parametrize("ignored", ["some", "all", "none"])
def test_ignored_rows(ignored):
    hidden, weight, target = small()
    if ignored != "none":
        target[slice(None) if ignored == "all" else slice(None, None, 2)] = -100
    for reduction in ("mean", "sum", "none"):
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss, info = linear_loss(h, w, target, NLL, reduction=reduction, metrics=("entropy", "hit", "nll"))
        loss.sum().backward()
        if ignored == "all":
            assert torch.equal(loss, torch.zeros_like(loss))  # torch says nan; an all-masked micro-batch adds nothing
            assert not h.grad.any() and not w.grad.any()
        else:
            z = h.detach() @ w.detach().T
            want = torch.nn.functional.cross_entropy(z, target, reduction=reduction)
            assert torch.allclose(loss, want, atol=1e-13)
            assert not h.grad[target == -100].any()
            assert h.grad[target != -100].any(1).all()
        for value in info.values():
            assert value.shape == target.shape
            assert not value[target == -100].any()


def test_other_ignore_index_and_a_label_that_would_be_one():
    hidden, weight, target = small()
    target[0] = 3
    want = torch.nn.functional.cross_entropy(hidden @ weight.T, target, ignore_index=3)
    assert torch.allclose(linear_loss(hidden, weight, target, NLL, ignore_index=3), want)


def test_num_items_and_gradient_accumulation():
    hidden, weight, target = small(n=12)
    target[::5] = -100
    count = (target != -100).sum()
    whole = torch.autograd.grad(linear_loss(hidden, weight, target, NLL), (hidden, weight))
    for given in (count, int(count), count.double()):
        parts = sum(
            linear_loss(hidden[i : i + 4], weight, target[i : i + 4], NLL, num_items=given) for i in range(0, 12, 4)
        )
        split = torch.autograd.grad(parts, (hidden, weight))
        for a, b in zip(split, whole, strict=True):
            assert relative(a, b) < 1e-12


def test_token_weight():
    hidden, weight, target = small()
    target[1] = -100
    w = torch.tensor([0, 1.0, 2, 0, 0.5, 3, 1, 1, 0.25], dtype=torch.float64)
    per = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="none")
    want = (per * w).sum() / 8  # weights scale, labels that count divide
    got = linear_loss(hidden, weight, target, NLL, token_weight=w)
    assert torch.allclose(got, want)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
    ):
        assert relative(a, b) < 1e-12
    bad = hidden.detach().clone()
    bad[0] = float("nan")  # weight 0: not even read
    assert torch.isfinite(linear_loss(bad, weight.detach(), target, NLL, token_weight=w))


def test_batched_shapes_and_strides():
    hidden, weight, target = small(n=12)
    want = linear_loss(hidden, weight, target, NLL, reduction="none")
    got = linear_loss(hidden.reshape(3, 4, 8), weight, target.reshape(3, 4), NLL, reduction="none")
    assert got.shape == (3, 4)
    assert torch.equal(got.flatten(), want)
    h = torch.randn(4, 12, 8, dtype=torch.float64).transpose(0, 1)[:, 1, :].requires_grad_()  # strided rows
    w = torch.randn(8, 31, dtype=torch.float64).t().requires_grad_()  # column-major head
    y = torch.stack([target, target], 1)[:, 0]
    got = linear_loss(h, w, y, NLL)
    ref = torch.nn.functional.cross_entropy(h @ w.T, y)
    for a, b in zip(torch.autograd.grad(got, (h, w)), torch.autograd.grad(ref, (h, w)), strict=True):
        assert relative(a, b) < 1e-12
    shifted = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)  # what a trainer passes: hidden[:, :-1]
    labels = torch.randint(0, 31, (2, 7))
    got = linear_loss(shifted[:, :-1], weight, labels[:, 1:], NLL)
    ref = torch.nn.functional.cross_entropy((shifted[:, :-1] @ weight.T).flatten(0, 1), labels[:, 1:].flatten())
    assert relative(torch.autograd.grad(got, shifted)[0], torch.autograd.grad(ref, shifted)[0]) < 1e-12


@pytest.mark.parametrize(("n", "v", "h"), [(0, 5, 3), (1, 1, 1), (1, 2, 1), (2, 4099, 3), (257, 3, 5)])
def test_odd_shapes(n, v, h):
    hidden = torch.randn(n, h, requires_grad=True)
    weight = torch.randn(v, h, requires_grad=True)
    target = torch.randint(0, v, (n,))
    loss = linear_loss(hidden, weight, target, NLL)
    loss.backward()
    assert hidden.grad.shape == hidden.shape and torch.isfinite(weight.grad).all()
    if n:
        assert torch.allclose(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, target), atol=1e-6)
    else:
        assert loss == 0 and not weight.grad.any()


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_transforms(backend):
    """scale, softcap and temperature (a number, 0-dim, one a token) of student and teacher."""
    o, hidden, weight, bias, target, extra = cases.problem("jsd", {}, n=5, v=19)
    t = extra["teacher"]
    per_token = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
    for temperature in (0.7, torch.tensor(0.7, dtype=torch.float64), per_token):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        teacher = Teacher(hidden=t.hidden, weight=t.weight, bias=t.bias, scale=0.5, softcap=4.0, temperature=1.7)
        kw = {"scale": 1.3, "softcap": 3.0, "temperature": temperature}
        got = linear_loss(
            *leaves[:2], target, o, bias=leaves[2], reduction="sum", teacher=teacher, backend=backend, **kw
        )
        ref_leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        z = ref_leaves[0] @ ref_leaves[1].T + ref_leaves[2]
        want = reference.row_loss(
            z, target, o, teacher=cases.dense_teacher(extra), teacher_scale=0.5, teacher_softcap=4.0,
            teacher_temperature=1.7, **kw).sum()  # fmt: skip
        assert relative(got, want) < 1e-12
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, ref_leaves), strict=True):
            assert relative(a, b) < 1e-11


def test_metrics_are_those_of_the_distribution():
    hidden, weight, target = small()
    target[4] = -100
    loss, info = linear_loss(hidden, weight, target, NLL, metrics=("nll", "logp", "entropy", "hit", "lse", "square"))
    z = (hidden @ weight.T).detach()
    stats = reference.row_stats(z, target.clamp(min=0))
    keep = target != -100
    want = {**stats, "nll": -stats["logp"], "entropy": stats["lse"] - stats["mean"]}
    for name, value in info.items():
        assert not value.requires_grad
        assert torch.allclose(value[keep], want[name][keep], atol=1e-12), name
    assert torch.allclose(loss, info["nll"].sum() / keep.sum())


def test_autocast_keeps_the_weights_dtype_and_its_accumulator():
    torch.manual_seed(0)
    hidden = torch.randn(40, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    target = torch.randint(0, 50, (40,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = torch.nn.functional.linear(hidden, torch.eye(16))  # bf16 hidden, fp32 weight
        assert low.dtype == torch.bfloat16
        loss = linear_loss(low, weight, target, NLL)
    loss.backward()
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32
    exact = torch.nn.functional.cross_entropy(low.detach().double() @ weight.detach().double().T, target)
    assert abs(float(loss.detach()) - float(exact)) < 1e-5  # the product was not rounded to bf16
    with pytest.raises(TypeError, match="one dtype outside autocast"):
        linear_loss(low, weight, target, NLL)


@pytest.mark.parametrize("tail", ["zero", "uniform", "student"])
@pytest.mark.parametrize("name", ["kd", "target_sft", "jsd", "kd_hybrid"])
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_top_k_teacher(name, tail, backend):
    """The three tails by their definition, on dense teacher logits built here."""
    g = torch.Generator().manual_seed(3)
    n, v, k = 5, 17, 4
    o = objectives.get(name, **({"eta": 0.4} if name == "target_sft" else {}))
    hidden, weight = torch.randn(n, 6, generator=g).double(), torch.randn(v, 6, generator=g).double()
    y = torch.randint(0, v, (n,), generator=g)
    full = torch.randn(n, v, generator=g).double().log_softmax(1)
    logp, ids = full.topk(k, 1)
    ids[1, 2:] = -1  # fewer than K in one row
    ids[2] = ids[2].flip(0)
    logp[2] = logp[2].flip(0)
    z = hidden @ weight.T
    p = z.softmax(1)
    dense = torch.empty(n, v, dtype=torch.float64)
    for i in range(n):
        kept = {int(j): float(x) for j, x in zip(ids[i], logp[i], strict=True) if j >= 0}
        rho = 1 - sum(torch.tensor(list(kept.values()), dtype=torch.float64).exp())
        outside = 1 - sum(p[i, j] for j in kept)
        for j in range(v):
            if j in kept:
                dense[i, j] = kept[j]
            elif tail == "zero":
                dense[i, j] = -torch.inf
            elif tail == "uniform":
                dense[i, j] = torch.log(rho / (v - len(kept)))
            else:
                dense[i, j] = torch.log(rho * p[i, j] / outside)
    if tail != "zero":
        assert torch.allclose(dense.exp().sum(1), torch.ones(n, dtype=torch.float64))
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_loss(h, w, y, o, teacher=Teacher(ids=ids, logp=logp, tail=tail), reduction="none", backend=backend)
    zr = z.clone().requires_grad_()
    want = reference.row_loss(zr, y, o, teacher=dense)
    assert relative(loss, want) < 1e-12
    (gz,) = torch.autograd.grad(want.sum(), zr)
    for a, b in zip(torch.autograd.grad(loss.sum(), (h, w)), (gz @ weight, gz.T @ hidden), strict=True):
        assert relative(a, b) < 1e-12


def test_teacher_forms_agree_and_take_no_gradient():
    o, hidden, weight, bias, target, extra = cases.problem("kd", {})
    t = extra["teacher"]
    full = t.hidden @ t.weight.T + t.bias
    v = weight.shape[0]
    everything = torch.arange(v).expand(len(target), v)
    forms = [
        t,
        Teacher(logits=full),
        Teacher(logits=full.t().contiguous().t()),
        Teacher(ids=everything, logp=full.log_softmax(1), tail="uniform"),
        Teacher(hidden=t.hidden.requires_grad_(), weight=t.weight.requires_grad_(), bias=t.bias),
    ]
    results = []
    for form in forms:
        h = hidden.clone().requires_grad_()
        loss = linear_loss(h, weight, target, o, bias=bias, teacher=form)
        results.append((loss, torch.autograd.grad(loss, h)[0]))
    for loss, g in results[1:]:
        assert relative(loss, results[0][0]) < 1e-12
        assert relative(g, results[0][1]) < 1e-12
    assert t.hidden.grad is None and t.weight.grad is None


def test_larger_teacher_vocabulary_is_cut_with_one_warning(recwarn):
    o, hidden, weight, bias, target, extra = cases.problem("kd", {}, v=29, seed=5)
    t = extra["teacher"]
    want = linear_loss(hidden, weight, target, o, bias=bias, teacher=t)
    wide = torch.cat([t.weight, torch.randn(128, t.weight.shape[1]).double()])
    teacher = Teacher(hidden=t.hidden, weight=wide, bias=torch.cat([t.bias, torch.zeros(128).double()]))
    got = [linear_loss(hidden, weight, target, o, bias=bias, teacher=teacher) for _ in range(3)]
    assert all(torch.equal(g, want) for g in got)
    assert len([w for w in recwarn if "teacher vocabulary" in str(w.message)]) == 1
    with pytest.raises(ValueError, match="teacher vocabulary 20 is smaller than the student's 29"):
        linear_loss(hidden, weight, target, o, bias=bias, teacher=Teacher(hidden=t.hidden, weight=t.weight[:20]))


def test_target_on_the_host_and_num_valid_bound():
    hidden, weight, target = small()
    target[::3] = -100
    want = linear_loss(hidden, weight, target, NLL)
    for bound in ("sync", 6, 9):
        assert torch.equal(linear_loss(hidden, weight, target, NLL, num_valid=bound), want)


def test_bounded_row_dropping_without_a_sync(monkeypatch):
    """The path a GPU takes with num_valid=: nonzero_static, padding rows with weight 0."""
    from burnish.ops import linear_loss as module

    real = module._kept

    def as_on_gpu(target, token_weight, ignore_index, num_valid, device):
        mask = target != ignore_index
        assert num_valid >= 0
        return torch.nonzero_static(mask, size=num_valid, fill_value=0)[:, 0]

    hidden, weight, target = small()
    target[[0, 4, 5]] = -100
    for reduction in ("mean", "none"):
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        want = linear_loss(h, w, target, NLL, reduction=reduction)
        gw = torch.autograd.grad(want.sum(), (h, w))
        for bound in (6, 8):
            monkeypatch.setattr(module, "_kept", as_on_gpu)
            monkeypatch.setattr(module, "_BOUNDED_ON", ("cpu",))
            got = linear_loss(h, w, target, NLL, reduction=reduction, num_valid=bound)
            gg = torch.autograd.grad(got.sum(), (h, w))
            monkeypatch.setattr(module, "_kept", real)
            assert torch.allclose(got, want)
            for a, b in zip(gg, gw, strict=True):
                assert relative(a, b) < 1e-12


def test_no_device_sync(monkeypatch):
    """Without dropping rows (a GPU's default) nothing reads a value on the host."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from burnish.ops import core
    from burnish.ops import linear_loss as module
    from burnish.ops import linear_stats as stats_module

    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name()
            assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"), name
            return func(*args, **(kwargs or {}))

    # as if the labels lay on a GPU: no range check, no dropping
    monkeypatch.setattr(core, "check_labels", lambda *a: None)
    monkeypatch.setattr(module, "check_labels", lambda *a: None)
    monkeypatch.setattr(stats_module, "check_labels", lambda *a: None)
    monkeypatch.setattr(module, "_kept", lambda *a: None)
    for _, name, arguments in cases.all_objectives():
        o, hidden, weight, bias, target, extra = cases.problem(name, arguments, dtype=torch.float32)
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        with NoSync():
            # the twin looks for masked entries, which is free on a CPU: the Triton source is what a GPU runs
            linear_loss(*leaves[:2], target, o, bias=leaves[2], backend="triton", **extra).backward()
        assert all(torch.isfinite(x.grad).all() for x in leaves)


def test_label_outside_the_vocabulary():
    hidden, weight, target = small()
    for bad in (31, 10**9, -1, -99):
        target[3] = bad
        with pytest.raises(ValueError, match=rf"got {bad} at row 3"):
            linear_loss(hidden, weight, target, NLL)


def test_bad_arguments_name_themselves():
    hidden, weight, target = small()
    call = lambda **kw: linear_loss(**{"hidden": hidden, "weight": weight, "target": target, "objective": NLL, **kw})  # noqa: E731
    for kw, error, text in (
        ({"hidden": hidden[:, :5]}, ValueError, r"agree on H; got \(9, 5\) and \(31, 8\)"),
        ({"hidden": hidden.long()}, TypeError, "hidden must be float32"),
        ({"weight": weight.float()}, TypeError, "one dtype outside autocast"),
        ({"target": target.int()}, TypeError, "target must be an int64 tensor; got torch.int32"),
        ({"target": target[:4]}, ValueError, r"target must have shape \(9,\)"),
        ({"objective": "nll"}, TypeError, "objective must be a burnish.Objective .* got str"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \(31,\)"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none; got 'avg'"),
        ({"plan": "x"}, ValueError, "plan must be one of"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"budget": 1000}, ValueError, "budget must be at least .* got 1000"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0; got 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature must have target's shape"),
        ({"softcap": -1.0}, ValueError, "softcap must be > 0 or None; got -1.0"),
        ({"scale": 0.0}, ValueError, "scale must be > 0"),
        ({"token_weight": torch.ones(3)}, ValueError, "token_weight must have target's shape"),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items goes with reduction='mean'"),
        ({"num_items": torch.ones(2)}, ValueError, "num_items must be a number or a 0-dim tensor"),
        ({"num_valid": -3}, ValueError, "num_valid must be a number of rows"),
        ({"metrics": ("ppl",)}, ValueError, "metrics must be among .* got 'ppl'"),
        ({"teacher": hidden, "objective": objectives.kd()}, TypeError, "teacher must be a burnish.Teacher"),
        ({"teacher": Teacher(logits=torch.zeros(3, 31))}, None, ""),  # nll reads no teacher: not looked at
        ({"teacher": Teacher(logits=torch.zeros(3, 31)), "objective": objectives.kd()}, ValueError, "must have 9 rows"),
        ({"ids": target, "objective": objectives.unlikelihood()}, ValueError, r"ids must be int64 of shape \(9, 'K'\)"),
    ):
        if error is None:
            call(**kw)
            continue
        with pytest.raises(error, match=text):
            call(**kw)
    for kw, text in (
        ({}, "exactly one of"),
        ({"logits": hidden, "ids": target}, "exactly one of"),
        ({"hidden": hidden}, "needs both hidden and weight"),
        ({"ids": target[:, None], "logp": torch.zeros(9, 1)}, "needs tail"),
        ({"ids": target[:, None], "logp": torch.zeros(9, 2), "tail": "zero"}, "same shape"),
        ({"logits": hidden, "tail": "zero"}, "tail goes with"),
    ):
        with pytest.raises(ValueError, match=text):
            Teacher(**kw)
    kl = objectives.reverse_kl()
    with pytest.raises(ValueError, match="infinite where a top-K teacher has tail='zero'"):
        call(objective=kl, teacher=Teacher(ids=target[:, None], logp=torch.zeros(9, 1), tail="zero"))


def test_deterministic_and_batch_invariant():
    """The same rows in another order or company: the same losses and the same dX, to the bit."""
    o, hidden, weight, bias, target, extra = cases.problem(
        "target_sft", {"eta": 0.5}, n=12, v=67, dtype=torch.float32, ignored=False
    )
    t = extra["teacher"]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))

    def run(rows):
        z = (hidden @ weight.T + bias)[rows].requires_grad_()
        teacher = Teacher(logits=(t.hidden @ t.weight.T + t.bias)[rows])
        loss = row_loss(z, target[rows], o, teacher=teacher, reduction="none")
        return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]

    everything = run(torch.arange(12))
    again = run(torch.arange(12))
    assert torch.equal(everything[0], again[0]) and torch.equal(everything[1], again[1])
    moved = run(order)
    assert torch.equal(moved[0], everything[0][order]) and torch.equal(moved[1], everything[1][order])
    one = run(torch.tensor([5]))
    assert torch.equal(one[0], everything[0][5:6]) and torch.equal(one[1], everything[1][5:6])


def test_fp16_does_not_underflow_under_a_mean():
    """1 / N stays out of the fp16 gradient of the logits."""
    g = torch.Generator().manual_seed(0)
    n, v, h = 2048, 512, 8
    hidden = (torch.randn(n, h, generator=g) * 0.1).half().requires_grad_()
    weight = (torch.randn(v, h, generator=g) * 0.1).half().requires_grad_()
    target = torch.randint(0, v, (n,), generator=g)
    _, want = reference_grads(NLL, hidden, weight, torch.zeros(v), target, {})
    linear_loss(hidden, weight, target, NLL).backward()
    # one rounding of the result: half an ulp, and fp16's grid of 6e-8 near zero
    exact = want[1] / n
    assert ((weight.grad.double() - exact).abs() <= 2**-11 * exact.abs() + 6e-8).all()
    got = linear_loss(hidden.detach(), weight, target, NLL, reduction="sum")
    (dw,) = torch.autograd.grad(got, weight)
    assert relative(dw, want[1]) < 1e-3


@pytest.mark.parametrize(("ident", "name", "arguments"), list(cases.all_objectives()), ids=IDS)
def test_every_objective_without_a_row_that_counts(ident, name, arguments):
    """All labels ignored, and no labels at all: loss 0 and gradients 0, not NaN."""
    for n in (4, 0):
        o, hidden, weight, bias, target, extra = cases.problem(name, arguments, n=n, dtype=torch.float32)
        target[:] = -100
        for reduction in ("mean", "none"):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
            loss = linear_loss(*leaves[:2], target, o, bias=leaves[2], reduction=reduction, **extra).sum()
            loss.backward()
            assert loss == 0
            assert all(not x.grad.any() for x in leaves)
            z = (hidden @ weight.T + bias).requires_grad_()
            loss = row_loss(
                z, target, o, reduction=cases.summed(o) if reduction == "none" else reduction, **extra
            ).sum()
            loss.backward()
            assert loss == 0 and not z.grad.any()


@pytest.mark.parametrize("name", ["nll", "target_sft", "unlikelihood"])
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_mixed_precision_path_of_a_gpu(name, backend, monkeypatch):
    """fp32 logits out of bf16 products, a bf16 gradient tile beside them: CUDA's branch, its products emulated."""
    from burnish.ops import gemm, slabs
    from burnish.ops import linear_loss as linear_module

    real_mm, real_addmm = torch.mm, torch.addmm

    def mm(a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return real_mm(a, b) if out is None else real_mm(a, b, out=out)
        assert a.dtype == b.dtype == torch.bfloat16
        r = real_mm(a.float(), b.float())
        return r if out is None else out.copy_(r)

    def addmm(c, a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return real_addmm(c, a, b, out=out)
        assert a.dtype == b.dtype == torch.bfloat16 and c.dtype == out_dtype == torch.float32
        return out.copy_(real_addmm(c, a.float(), b.float()))

    o, hidden, weight, bias, target, extra = cases.problem(
        name, {"eta": 0.5} if name == "target_sft" else {}, n=24, v=61, h=32, dtype=torch.bfloat16
    )
    loss, want = reference_grads(o, hidden, weight, bias, target, extra, "mean")
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    modes, init = [], slabs.Walk.__init__

    def spy(self, *args, **options):
        init(self, *args, **options)
        modes.append(self.mode)

    monkeypatch.setattr(slabs.Walk, "__init__", spy)
    monkeypatch.setattr(gemm, "mode", lambda *a: "mixed")
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    for reduction in ("mean", "none"):
        for master in (False, True):  # an fp32 weight under autocast as well
            leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
            if master:
                leaves[1] = weight.float().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=master):
                got = linear_loss(*leaves[:2], target, o, bias=leaves[2], reduction=reduction, backend=backend, **extra)
            scale = 1 / 23 if reduction == "mean" else 1
            assert relative(got.sum(), loss.sum() * scale) < 1e-5
            for a, b, leaf in zip(torch.autograd.grad(got.sum(), leaves), want, leaves, strict=True):
                assert a.dtype == leaf.dtype
                assert relative(a, b * scale) < 2 * 2**-8  # the gradient tile is bf16 here
    assert modes and set(modes) == {"mixed"}
    monkeypatch.setattr(linear_module, "_kept", lambda *a: None)  # as where finding the rows that count would sync
    # an upstream gradient of any size: dz is brought to 1 before it is rounded; a row that does not count may be NaN
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    rows = linear_loss(*leaves[:2], target, o, bias=leaves[2], reduction="none", backend=backend, **extra)
    up = torch.full_like(rows, 1e-12)
    up[target == -100] = torch.nan
    for a, b in zip(torch.autograd.grad(rows, leaves, up), want, strict=True):
        assert relative(a.double() * 1e12, b) < 2 * 2**-8
    # lines that make NaN of a row that does not count: its size must not become that of all gradients
    root = objectives.Objective("root", lambda s: (-s.logp).sqrt(), ("logp",))
    loss = linear_loss(*leaves[:2], target, root, bias=leaves[2], plan="vocab", backend=backend)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves))
