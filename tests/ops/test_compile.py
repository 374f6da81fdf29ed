"""torch.library registration: opcheck, and torch.compile(fullgraph=True) equal to eager."""

import cases
import pytest
import torch

from burnish import LoRAHead, Teacher, linear_loss, linear_stats, objectives, row_loss
from burnish.ops import linear_loss as linear_module
from burnish.ops import linear_stats as stats_module
from burnish.ops import row_loss as row_module


@pytest.fixture(autouse=True)
def fresh_compilation():
    """Inductor's disk cache does not see a change in an op's fake kernel: a stale entry would be tested."""
    import torch._inductor.config

    with torch._inductor.config.patch(force_disable_caches=True):
        torch._dynamo.reset()
        yield


NAMES = [("nll", {}), ("target_sft", {"eta": 0.5}), ("jsd", {}), ("iw_sft", {}), ("unlikelihood", {}),
         ("grpo", {"beta": 0.1, "entropy": 0.01})]  # fmt: skip


def problem(name, arguments):
    o, hidden, weight, bias, target, extra = cases.problem(name, arguments, n=10, v=50, dtype=torch.float32)
    target[::3] = -100  # ignored rows: where a compiled peer is silently wrong
    return o, [x.requires_grad_() for x in (hidden, weight, bias)], target, extra


# the slow compiler on one graph without a teacher and one with
CASES = [(*case, "aot_eager") for case in [*NAMES, ("gspo", {})]] + [(*case, "inductor") for case in NAMES[:2]]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("name", "arguments", "backend"), CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES])
def test_compiled_equals_eager(name, arguments, reduction, backend):
    o, leaves, target, extra = problem(name, arguments)

    def step(hidden, weight, bias, target):
        loss, info = linear_loss(
            hidden * 1.5, weight, target, o, bias=bias, reduction=reduction, metrics=("entropy", "hit"), **extra
        )
        return loss.sum() * 2 + 0 * info["entropy"].sum()

    eager = step(*leaves, target)
    want = torch.autograd.grad(eager, leaves)
    compiled = torch.compile(step, fullgraph=True, backend=backend)(*leaves, target)
    got = torch.autograd.grad(compiled, leaves)
    assert torch.allclose(compiled, eager, rtol=1e-6)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    if backend == "aot_eager":
        assert torch.equal(compiled, eager)


def test_compiled_row_loss_equals_eager():
    torch._dynamo.reset()
    o = objectives.confidence_penalty()
    z = torch.randn(6, 20, requires_grad=True)
    y = torch.tensor([1, -100, 4, -100, 0, 19])

    def step(z):
        return row_loss(z * 2, y, o)

    eager, compiled = step(z), torch.compile(step, fullgraph=True, backend="aot_eager")(z)
    assert torch.equal(eager, compiled)
    assert torch.equal(torch.autograd.grad(eager, z)[0], torch.autograd.grad(compiled, z)[0])


def arguments_of(module, op, call):
    """The flat arguments that the public function hands to a registered op."""
    seen = []
    name = {"linear": "_LinearLoss", "stats": "_Stats", "row": "_RowLoss"}[op]
    function = getattr(module, name)

    class Spy:
        @staticmethod
        def apply(*args):
            seen.append(args)
            return function.apply(*args)

    setattr(module, name, Spy)
    try:
        call()
    finally:
        setattr(module, name, function)
    return seen[0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("name", "arguments"), NAMES, ids=[n for n, _ in NAMES])
def test_opcheck(name, arguments, reduction):
    o, leaves, target, extra = problem(name, arguments)
    args = arguments_of(
        linear_module, "linear",
        lambda: linear_loss(*leaves[:2], target, o, bias=leaves[2], reduction=reduction, metrics=("hit",), **extra),
    )  # fmt: skip
    torch.library.opcheck(linear_module._linear_loss, args)
    z = torch.randn(10, 50, requires_grad=True)
    args = arguments_of(
        row_module, "row", lambda: row_loss(z, target, o, reduction=reduction, metrics=("entropy",), **extra)
    )
    torch.library.opcheck(row_module._row_loss, args)


FORMS = ("plain", "blocks", "dora", "topk")


def stats_call(form):
    """A step on ``linear_stats`` in one of the head's forms, and its leaves."""
    g = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=g).requires_grad_()

    hidden, weight, bias, a, b, m = leaf(10, 8), leaf(50, 8), leaf(50), leaf(2, 8), leaf(50, 2), leaf(50)
    target = torch.randint(0, 50, (10,), generator=g)
    target[::3] = -100
    ids = torch.randint(0, 50, (10, 3), generator=g)
    teacher = Teacher(ids=torch.arange(4).expand(10, 4), logp=torch.full((10, 4), -2.0), tail="student")
    leaves = {"dora": [hidden, bias, a, b, m], "blocks": [hidden, weight, bias]}.get(form, [hidden, weight, bias])

    def step(*leaves):
        hidden, *rest = leaves
        names, options = ("logp", "entropy", "top_entropy"), {}
        if form == "dora":
            head, bias = LoRAHead(weight, rest[1], rest[2], 0.5, rest[3]), rest[0]
        else:
            head, bias = rest
        if form == "blocks":
            head = [head[:7].detach(), head[7:30], head[30:].detach()]
        if form == "topk":
            names, options = ("cross", "ids_logp", "jsd"), {"teacher": teacher, "ids": ids}
        s = linear_stats(hidden, head, target, stats=names, bias=bias, **options)
        if form == "topk":
            return s.cross.sum() + (s.ids_logp * s.jsd[:, None]).sum()
        return (s.logp * s.top_entropy).sum() + (s.entropy**2).sum()

    return step, leaves


@pytest.mark.parametrize("form", FORMS)
def test_linear_stats_compiled_equals_eager(form):
    step, leaves = stats_call(form)
    eager, compiled = step(*leaves), torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.allclose(compiled, eager, rtol=1e-6)
    wanted = torch.autograd.grad(eager, leaves)
    for a, b in zip(torch.autograd.grad(compiled, leaves), wanted, strict=True):
        assert b.abs().max() > 0
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_linear_stats_opcheck(form):
    step, leaves = stats_call(form)
    *tensors, teacher, _, options, blocks = _split(arguments_of(stats_module, "stats", lambda: step(*leaves)))
    torch.library.opcheck(stats_module._linear_stats, (*tensors, teacher, blocks, *options))


def _split(args):
    head, (teacher, sink, options, *blocks) = args[: stats_module._TENSORS], args[stats_module._TENSORS :]
    # opcheck runs backward more than once: leaves instead of what was computed from them
    fresh = [x if x is None or x.is_leaf else x.detach().requires_grad_() for x in (*head, *blocks)]
    return (*fresh[: len(head)], teacher, sink, options, fresh[len(head) :])


def test_custom_op_leaves_autocast_off():
    """Autograd comes back inside the op for the objective; autocast, excluded there as well, must not."""
    from burnish.ops.core import autograd_inside_op

    seen = {}

    @torch.library.custom_op("burnish_test::probe", mutates_args=())
    def probe(x: torch.Tensor) -> torch.Tensor:
        with autograd_inside_op(), torch.enable_grad():
            leaf = x.detach().requires_grad_()
            seen["grad"] = torch.autograd.grad((leaf * leaf).sum(), leaf)[0]
            seen["product"] = x @ x.T
        return x.clone()

    x = torch.rand(16, 16, requires_grad=True)
    probe(x)
    assert torch.equal(seen["grad"], 2 * x.detach())
    assert torch.equal(seen["product"].detach(), (x @ x.T).detach())  # not a product in bf16
