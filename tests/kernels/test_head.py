"""A slab of a bf16 head whose logits stay in the caches of CPUs with tile registers: ``host/head.cpp``."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_gemm import pytestmark  # noqa: F401  the same machines

from burnish import Teacher, linear_loss, linear_stats, objectives
from burnish.kernels import gemm_host, head_host, rows_host
from burnish.kernels.contract import RowSpec, coefficients, finalize, new_state
from burnish.ops.slabs import Walk

SHAPES = [(1, 1, 1), (5, 16, 40), (33, 31, 513), (129, 70, 1100), (300, 100, 512), (260, 352, 600)]


def operands(n, h, v, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, h, generator=g).bfloat16(), (torch.randn(v, h, generator=g) / h**0.5 * 3).bfloat16()
    return x, w, torch.randint(0, v, (n,), generator=g), g


def spec_of(names, **options):
    return RowSpec(frozenset(names) | {"lse", "label", "logp"}, **options)


CASES = {
    "plain": (("logp",), {}),
    "moments": (("mean", "square", "uniform", "hit"), {}),
    "softcap": (("logp", "mean"), {"softcap": 3.0, "scale": 0.7}),
    "temperature": (("logp", "mean"), {"temperature": True}),
    "teacher": (("cross", "other", "teacher_entropy", "teacher_logp"), {}),
    "mix": (("mix",), {"alpha": 0.5, "eta": 0.5}),
    "second temperature": (("mix_lse",), {"alpha": 0.5, "eta": 0.0}),
}


@pytest.mark.parametrize("case", [*CASES, "teacher's head", "mix of heads"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fold_and_grad_are_those_of_the_row_kernels_on_the_same_logits(shape, case):
    """The same kernels over logits made by the same products: statistics agree up to the blocks they are summed in."""
    n, h, v = shape
    x, w, y, g = operands(*shape)
    names, options = CASES[{"teacher's head": "teacher", "mix of heads": "mix"}.get(case, case)]
    own = case not in CASES
    spec = spec_of(names, **options)
    bias = torch.randn(v, generator=g)
    bias[::5] = -torch.inf
    bias[y] = 0.5
    t = torch.randn(n, v + 3, generator=g).bfloat16()[:, 1 : v + 1] if case in ("teacher", "mix") else None
    tx = tw = tb = None
    if own:  # a teacher of another width, whose logits are made beside the student's
        tx, tw = (torch.randn(k, h + 9, generator=g).bfloat16() for k in (n, v))
        t, tb = torch.empty(n, v), torch.randn(v, generator=g)
        gemm_host.product(tx, tw.t(), t)
        t += tb
    temps = {"inv_temp": torch.rand(n, generator=g) + 0.5} if spec.temperature else {}
    z = torch.empty(n, v)
    gemm_host.product(x, w.t(), z)
    z += bias
    tile = head_host.Tile(x, head_host.workspace(n, h, h + 9 if own else 0), tx)
    states = [new_state(n, torch.float32, x.device) for _ in range(2)]
    start, cut = 7, v // 3
    rows_host.fold(z, t, states[0], y + start, spec, start=start, **temps)
    for first, last in ((0, cut), (cut, v)):  # two slabs
        part = (tw[first:last], tb[first:last].contiguous()) if own else None if t is None else t[:, first:last]
        head = (w[first:last], bias[first:last].contiguous())
        tile.fold(head, part, states[1], y + start, spec, start=start + first, **temps)
    stats = [finalize(s, spec) for s in states]
    for name, want in stats[0].items():
        torch.testing.assert_close(stats[1][name], want, rtol=2e-5, atol=2e-5, msg=lambda m, k=name: f"{k}: {m}")
    upstream = {k: torch.randn(n, generator=g) for k in names if k in stats[0] and k not in _CONSTANT}
    coef = coefficients(stats[0], upstream | {"logp": torch.ones(n)}, spec)
    dz = torch.empty(n, v, dtype=torch.bfloat16)
    rows_host.grad(z, t, dz, coef, y + start, spec, start=start, **temps)
    before, teacher = torch.randn(n, h, generator=g), (tw, tb) if own else t
    dx, dw, out = before.clone(), torch.full((v, h), torch.nan), torch.full((v + 1, h), 7.0)
    tile.grad((w, bias), teacher, dx, dw, coef, y + start, spec, start=start, **temps)
    tile.grad((w, bias), teacher, None, None, coef, y + start, spec, out=out[:v], factor=0.5, start=start, **temps)
    for got, want, size in (
        (dx - before, dz.double() @ w.double(), dz.double().abs() @ w.double().abs() + before.abs().max()),
        (dw, dz.double().t() @ x.double(), dz.double().t().abs() @ x.double().abs()),
    ):
        assert ((got - want).abs() <= 2**-22 * max(n, v) ** 0.5 * size + 1e-30).all()
    assert torch.equal(out[:v], 0.5 * dw) and (out[v] == 7.0).all()


_CONSTANT = ("hit", "teacher_entropy", "teacher_logp")


def test_what_is_not_asked_for_is_not_written():
    x, w, y, _ = operands(40, 48, 600)
    spec = spec_of(())
    tile = head_host.Tile(x, head_host.workspace(40, 48))
    state = new_state(40, torch.float32, x.device)
    tile.fold((w, None), None, state, y, spec)
    coef = coefficients(finalize(state, spec), {"logp": torch.ones(40)}, spec)
    dx, again, dw = torch.zeros(40, 48), torch.zeros(40, 48), torch.empty(600, 48)
    tile.grad((w, None), None, dx, None, coef, y, spec)
    tile.grad((w, None), None, again, dw, coef, y, spec)
    assert torch.equal(dx, again)
    twice, low = dw.clone(), torch.empty(600, 48, dtype=torch.bfloat16)
    tile.grad((w, None), None, None, twice, coef, y, spec, add=True)
    torch.testing.assert_close(twice, 2 * dw)
    tile.grad((w, None), None, None, None, coef, y, spec, out=low)
    assert torch.equal(low, dw.bfloat16())
    tile.grad((w, None), None, None, dw.clone(), coef, y, spec, add=True, out=low, factor=0.25)
    assert torch.equal(low, (0.25 * twice).bfloat16())


def test_hidden_states_of_any_strides():
    x, w, y, _ = operands(70, 60, 300)
    views = [x.t().contiguous().t(), torch.cat([x, x], 1)[:, :60], x.repeat_interleave(2, 0)[::2]]
    spec, found = spec_of(()), []
    for v in (x, *views):
        tile, state = head_host.Tile(v, head_host.workspace(70, 60)), new_state(70, torch.float32, x.device)
        tile.fold((w, None), None, state, y, spec)
        coef = coefficients(finalize(state, spec), {"logp": torch.ones(70)}, spec)
        dw = torch.empty(300, 60)
        tile.grad((w, None), None, None, dw, coef, y, spec)
        found.append((state.nan_to_num(), dw))
    for state, dw in found[1:]:
        assert torch.equal(state, found[0][0]) and torch.equal(dw, found[0][1])


def test_bits_do_not_depend_on_other_rows_or_on_the_number_of_threads():
    x, w, y, _ = operands(300, 96, 3000)
    stats = ("logp", "entropy", "square")
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    whole = linear_stats(x, w, y, stats=stats, backend="host")
    few = linear_stats(x[order][:37], w, y[order][:37], stats=stats, backend="host")
    for name in stats:
        assert torch.equal(getattr(whole, name)[order][:37], getattr(few, name))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            leaves = [v.clone().requires_grad_() for v in (x, w)]
            loss = linear_loss(*leaves, y, objectives.nll(), backend="host")
            found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("n", [0, 5, 1500])  # none, one and two tiles of rows
@pytest.mark.parametrize("frozen", ["", "hidden", "weight"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])  # dz is brought to size 1 first, and dW back at the end
def test_a_loss_of_any_number_of_tiles_is_the_twin_s(n, frozen, reduction):
    x, w, y, _ = operands(n, 40, 2500)
    y[::7] = -100
    found = {}
    for kind, backend in ((torch.bfloat16, "auto"), (torch.float64, "torch")):
        leaves = {"hidden": x.clone().to(kind), "weight": w.clone().to(kind)}
        for name, v in leaves.items():
            v.requires_grad_(name != frozen)
        loss = linear_loss(*leaves.values(), y, objectives.nll(), reduction=reduction, backend=backend)
        loss.backward()
        found[kind] = [loss.detach()] + [v.grad for k, v in leaves.items() if k != frozen]
    for got, want in zip(found[torch.bfloat16], found[torch.float64], strict=True):
        assert (got.double() - want).norm() <= 2**-8 * want.norm()


@pytest.mark.parametrize("teacher", [False, True])
def test_heads_of_any_strides(teacher):
    """A head is read as it lies where its rows are contiguous, and copied slab by slab where they are not."""
    x, w, y, g = operands(90, 40, 2500)
    views = [w, w.t().contiguous().t(), torch.cat([w, w], 1)[:, :40], w.repeat_interleave(2, 1)[:, ::2]]
    states, found = torch.randn(90, 40, generator=g).bfloat16(), []
    for v in views:
        v = v.detach().requires_grad_()
        hidden = x.clone().requires_grad_()
        more = {"teacher": Teacher(hidden=states, weight=v.detach()), "objective": objectives.kd()} if teacher else {}
        loss = linear_loss(hidden, v, y, **({"objective": objectives.nll(), "plan": "vocab"} | more))
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, v))))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def count_products(monkeypatch):
    """Calls of the fused kernel, by name."""
    calls = []
    for name in ("fold", "grad"):
        own = getattr(head_host.Tile, name)
        monkeypatch.setattr(
            head_host.Tile, name, lambda *a, _own=own, _name=name, **k: (calls.append(_name), _own(*a, **k))[1]
        )
    return calls


def test_which_calls_take_it(monkeypatch):
    """auto takes the vocabulary-outer order where the fused kernel serves it, and the token-outer one elsewhere."""
    calls = count_products(monkeypatch)
    x, w, y, g = operands(64, 32, 300)
    t = torch.randn(64, 300, generator=g)
    given, second = Teacher(logits=t), Teacher(hidden=x, weight=w)
    wide = Teacher(hidden=x.float(), weight=w.float())
    bias = torch.zeros(300, dtype=torch.bfloat16)

    def took(*, objective=None, kind=torch.bfloat16, b=None, **options):
        calls.clear()
        leaves = [v.clone().to(kind).requires_grad_() for v in (x, w)]
        loss = linear_loss(*leaves, y, objective or objectives.nll(), bias=b, **options)
        (loss[0] if isinstance(loss, tuple) else loss).backward()
        return sorted(set(calls))

    both = ["fold", "grad"]
    assert took() == took(b=bias) == took(metrics=("entropy", "hit")) == both
    assert took(objective=objectives.kd(), teacher=given) == took(objective=objectives.kd(), teacher=second) == both
    assert took(budget=1 << 30) == []
    assert took(plan="tokens") == took(kind=torch.float32) == took(kind=torch.float16) == took(backend="torch") == []
    assert took(b=bias.clone().requires_grad_()) == took(metrics=("top_entropy",)) == []
    assert took(objective=objectives.kd(), teacher=wide) == took(objective=objectives.jsd(), teacher=second) == []
    assert took(plan="vocab", b=bias.clone().requires_grad_()) == ["fold"]  # dz as a whole, for the bias


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_teachers_and_masks_are_those_of_the_unfused_order(monkeypatch, kind):
    x, w, y, g = operands(90, 64, 1300)
    t, bias = torch.randn(90, 1300, generator=g), torch.zeros(1300)
    states, head = torch.randn(90, 33, generator=g).bfloat16(), torch.randn(1307, 33, generator=g).bfloat16()
    teacher = {"logits": Teacher(logits=t), "hidden": Teacher(hidden=states, weight=head, temperature=2.0)}[kind]
    bias[::3] = -torch.inf
    bias[y] = 0.0
    found = []
    for fused in (True, False):
        if not fused:
            real = Walk.__init__

            def plain(self, *args, _real=real, **kwargs):
                _real(self, *args, **kwargs)
                self.fused = False

            monkeypatch.setattr(Walk, "__init__", plain)
        leaves = [v.clone().requires_grad_() for v in (x, w)]
        loss = linear_loss(*leaves, y, objectives.target_sft(0.5), bias=bias.bfloat16(), teacher=teacher, plan="vocab")
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-5)
        assert (a.float() - b.float()).norm() <= 1e-3 * b.float().norm()


def test_a_compiled_graph_agrees():
    """It is traced without a look at the machine, in token-outer order."""
    x, w, y, _ = operands(64, 32, 300)
    y[3] = -100
    found = []
    for call in (linear_loss, torch.compile(linear_loss, fullgraph=True)):
        leaves = [v.clone().requires_grad_() for v in (x, w)]
        loss = call(*leaves, y, objectives.nll())
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)


def test_a_workspace_that_is_too_small_is_not_used():
    x, w, y, _ = operands(200, 64, 600)
    spec, found = spec_of(()), []
    for work in (head_host.workspace(200, 64), head_host.workspace(1, 1)):
        state = new_state(200, torch.float32, x.device)
        head_host.Tile(x, work).fold((w, None), None, state, y, spec)
        found.append(state.nan_to_num())
    assert torch.equal(*found)


@pytest.mark.parametrize("shape", [(33, 31, 513), (129, 70, 1100)], ids=str)
def test_what_the_workspace_holds_is_of_no_matter(shape):
    """NaN in it, where a ragged slab or tile leaves entries unwritten, reaches no result."""
    n, h, v = shape
    x, w, y, _ = operands(*shape)
    spec, found = spec_of(()), []
    for byte in (0, 255):
        tile = head_host.Tile(x, head_host.workspace(n, h).fill_(byte))
        state = new_state(n, torch.float32, x.device)
        tile.fold((w, None), None, state, y, spec)
        coef = coefficients(finalize(state, spec), {"logp": torch.ones(n)}, spec)
        dx, dw = torch.zeros(n, h), torch.empty(v, h)
        tile.grad((w, None), None, dx, dw, coef, y, spec)
        found.append((state.nan_to_num(), dx, dw))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[1][1].isfinite().all()


def test_empty_slabs_and_tiles():
    spec = spec_of(())
    for n, v in itertools.product((0, 3), (0, 4)):
        if n and v:
            continue
        tile = head_host.Tile(torch.ones(n, 8).bfloat16(), head_host.workspace(n, 8))
        state = new_state(n, torch.float32, torch.device("cpu"))
        before = state.clone()
        tile.fold((torch.ones(v, 8).bfloat16(), None), None, state, torch.zeros(n, dtype=torch.int64), spec)
        assert torch.equal(state.nan_to_num(), before.nan_to_num())
