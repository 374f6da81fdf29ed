"""``linear_stats`` and the vocabulary-outer order: every form of the head, sinks, and invariance."""

import cases
import pytest
import torch

from burnish import HostSink, LoRAHead, Objective, Teacher, linear_loss, linear_stats, objectives
from burnish.ops import geometry
from burnish.ops.live_bytes import LiveBytes
from burnish.ops.sinks import CallbackSink
from burnish.ops.streams import COMPUTE, COPY, HOST, RecordedStreams

N, V, H, R = 23, 41, 8, 3
EVERY = ("lse", "label", "logp", "mean", "square", "uniform", "mix", "mix_lse", "cross", "other", "jsd", "ids")


def leaves(*shapes, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def labels(n=N, v=V, ignored=True):
    y = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(9))
    if ignored:
        y[::5] = -100
    return y


@pytest.fixture
def small_tiles(monkeypatch):
    """Several slabs, tiles and padded products at test sizes."""
    for name, size in (("SLAB", 12), ("TILE_ROWS", 10), ("PRODUCT_ROWS", 5)):
        monkeypatch.setattr(geometry, name, {"cpu": size})


def plain(z, t, y, ids):
    """Every statistic by plain torch, differentiable."""
    logp, logt = z.log_softmax(-1), t.log_softmax(-1)
    p, m_z = logp.exp(), 0.6 * z + 0.4 * t
    q = m_z.softmax(-1).detach()
    pick = lambda x: torch.where(y >= 0, x.gather(1, y.clamp(min=0)[:, None])[:, 0], 0.0)  # noqa: E731
    m = (0.3 * logt.exp() + 0.7 * p).log()
    return {
        "lse": z.logsumexp(-1), "label": pick(z), "logp": pick(logp), "mean": (p * z).sum(-1),
        "square": (p * p).sum(-1), "uniform": z.mean(-1), "mix": (q * z).sum(-1), "cross": (logt.exp() * z).sum(-1),
        "mix_lse": m_z.logsumexp(-1), "other": (p * t).sum(-1), "ids": z.gather(1, ids),
        "jsd": 0.3 * (logt.exp() * (logt - m)).sum(-1) + 0.7 * (p * (logp - m)).sum(-1),
    }  # fmt: skip


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_each_statistic_and_any_upstream(backend, small_tiles):
    hidden, weight, bias, th, tw = leaves((N, H), (V, H), (V,), (N, H + 1), (V, H + 1))
    y, ids = labels(), torch.randint(0, V, (N, 2), generator=torch.Generator().manual_seed(3))
    teacher = Teacher(hidden=th, weight=tw)
    s = linear_stats(
        hidden, weight, y, stats=EVERY, bias=bias, teacher=teacher, ids=ids, alpha=0.6, eta=0.4, beta=0.3,
        softcap=9.0, temperature=1.4, scale=0.8, backend=backend,
    )  # fmt: skip
    z = 9.0 * ((hidden @ weight.T + bias) * 0.8 / 9.0).tanh() / 1.4
    want = plain(z, (th @ tw.T).detach(), y, ids)
    for i, name in enumerate(EVERY):
        got, exact = getattr(s, name), want[name]
        assert torch.allclose(got, exact, rtol=1e-11, atol=1e-12), name
        up = torch.randn(got.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        a = torch.autograd.grad(got, (hidden, weight, bias), up, retain_graph=True)
        b = torch.autograd.grad(exact, (hidden, weight, bias), up, retain_graph=True)
        for x, w in zip(a, b, strict=True):
            assert torch.allclose(x, w, rtol=1e-10, atol=1e-12), name


def test_gradcheck():
    hidden, weight, bias = leaves((4, 3), (7, 3), (7,))

    def fn(h, w, b):
        s = linear_stats(h, w, labels(4, 7), stats=("logp", "entropy", "square", "uniform"), bias=b, softcap=5.0)
        return s.logp, s.entropy * s.square, s.uniform

    assert torch.autograd.gradcheck(fn, (hidden, weight, bias))


@pytest.mark.parametrize(
    ("ident", "name", "arguments"), list(cases.all_objectives()), ids=[c[0] for c in cases.all_objectives()]
)
def test_both_orders_agree(ident, name, arguments, small_tiles):
    o, hidden, weight, bias, target, extra = cases.problem(name, arguments, n=N, v=V)
    ours = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    out = []
    if o.joint:
        with pytest.raises(ValueError, match=f"no objective whose rows interact; got objective '{name}'"):
            linear_loss(*ours[:2], target, o, bias=ours[2], plan="tokens", **extra)
        return
    for plan in ("tokens", "vocab"):
        loss, info = linear_loss(
            *ours[:2], target, o, bias=ours[2], plan=plan, metrics=("entropy", "hit", "nll"), softcap=7.0, **extra
        )
        assert loss.ndim == 0
        out.append((loss, *info.values(), *torch.autograd.grad(loss, ours)))
    for a, b in zip(*out, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)


def test_row_blocks_form_only_the_gradients_that_are_asked_for(small_tiles):
    hidden, weight, bias = leaves((N, H), (V, H), (V,))
    y = labels()
    whole = linear_loss(hidden, weight, y, objectives.gem(), bias=bias, plan="vocab")
    dx, dw, db = torch.autograd.grad(whole, (hidden, weight, bias))
    w = weight.detach()
    leaf = w[10:29].requires_grad_()  # aliases the weight's rows
    blocks = [w[:10], leaf, w[29:]]
    part = linear_loss(hidden, blocks, y, objectives.gem(), bias=bias)
    assert torch.allclose(part, whole, rtol=1e-14)
    got = torch.autograd.grad(part, (hidden, leaf, bias))
    for a, b in zip(got, (dx, dw[10:29], db), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)
    hidden = torch.randn(64, 32)
    w = torch.randn(4096, 32)
    leaf = w[:16].requires_grad_()
    y, peaks = torch.zeros(64, dtype=torch.int64), []
    for blocks in ([leaf, w[16:]], [w.clone().requires_grad_()]):
        with LiveBytes() as counter:
            linear_loss(hidden, blocks, y, objectives.nll(), backend="host").backward()
        peaks.append(counter.peak)
    assert peaks[1] - peaks[0] > 0.9 * (w.numel() - leaf.numel()) * 4  # the rest of dW was never formed
    assert leaf.grad.shape == (16, 32)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_get_gradients_and_a_frozen_base_none(dora, small_tiles):
    hidden, weight, bias, a, b, m = leaves((N, H), (V, H), (V,), (R, H), (V, R), (V,))
    y = labels()
    head = LoRAHead(weight, a, b, 0.7, m if dora else None)
    wanted = (hidden, bias, a, b, m)[: 5 if dora else 4]
    for o in (objectives.nll(), objectives.confidence_penalty()):
        merged = weight + 0.7 * b @ a
        if dora:
            merged = merged * (m / merged.detach().norm(dim=1))[:, None]
        exact = linear_loss(hidden, merged, y, o, bias=bias)
        got = linear_loss(hidden, head, y, o, bias=bias)
        assert torch.allclose(got, exact, rtol=1e-13)
        expected = torch.autograd.grad(exact, wanted, retain_graph=True)
        for x, w in zip(torch.autograd.grad(got, wanted), expected, strict=True):
            assert w.abs().max() > 0
            assert torch.allclose(x, w, rtol=1e-11, atol=1e-14)
        base = torch.autograd.grad(linear_loss(hidden, head, y, o, bias=bias), weight)[0]  # where it is not frozen
        assert torch.allclose(base, torch.autograd.grad(exact, weight)[0], rtol=1e-11, atol=1e-14)
    head = LoRAHead(weight.detach(), a, b)
    linear_loss(hidden, head, y, objectives.nll()).backward()
    assert head.weight.grad is None


def test_the_base_gradient_is_never_formed():
    """Live bytes of a LoRA backward stay below one dW; a product (V, H) is never asked for."""
    big_v, big_h = 8192, 256
    hidden, weight, a, b = leaves((32, big_h), (big_v, big_h), (4, big_h), (big_v, 4), dtype=torch.float32)
    y = torch.zeros(32, dtype=torch.int64)
    with LiveBytes() as counter:
        linear_loss(hidden, LoRAHead(weight.detach(), a, b), y, objectives.nll(), backend="host").backward()
    assert counter.peak < big_v * big_h * 4


def test_adapter_errors_are_clear_and_dropout_is_on():
    hidden, weight, a, b = leaves((N, H), (V, H), (R, H), (V, R))
    with pytest.raises(ValueError, match=r"a must be \(r, 8\) and b \(41, r\)|a must be \(r, 8\) and b \(41, 3\)"):
        LoRAHead(weight, a, b[:-1])
    with pytest.raises(ValueError, match="dropout must lie in"):
        LoRAHead(weight, a, b, dropout=1.0)
    torch.manual_seed(0)
    dropped = linear_loss(hidden, LoRAHead(weight, a, b, dropout=0.5), labels(), objectives.nll())
    assert dropped != linear_loss(hidden, LoRAHead(weight, a, b), labels(), objectives.nll())


# Sinks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_sink_receives_the_gradient_in_order(dtype, small_tiles):
    hidden, weight = leaves((N, H), (V, H), dtype=dtype)
    y = labels()
    want_x, want = torch.autograd.grad(linear_loss(hidden, weight, y, objectives.nll(), plan="vocab"), (hidden, weight))
    seen, parts = [], torch.full((V, H), torch.nan, dtype=torch.float64)

    def take(rows, slab):
        assert slab.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        seen.append((rows.start, rows.stop))
        parts[rows] = slab.double()

    tensor = torch.full((V, H), torch.nan, dtype=dtype)
    for sink in (take, tensor, CallbackSink(take)):
        hidden.grad = None
        linear_loss(hidden, weight, y, objectives.nll(), sink=sink).backward()
        assert weight.grad is None
        assert torch.equal(hidden.grad, want_x)
        result = tensor if sink is tensor else parts.to(dtype)
        assert torch.equal(result, want)
        parts.fill_(torch.nan)
    assert seen[:4] == [(0, 12), (12, 24), (24, 36), (36, 41)]


def test_a_sink_over_blocks_counts_the_heads_rows(small_tiles):
    hidden, weight = leaves((N, H), (V, H))
    y, w = labels(), weight.detach()
    (want,) = torch.autograd.grad(linear_loss(hidden, weight, y, objectives.nll(), plan="vocab"), weight)
    out = torch.zeros(V, H, dtype=torch.float64)
    leaf = w[15:33].requires_grad_()
    linear_loss(hidden, [w[:15], leaf, w[33:]], y, objectives.nll(), sink=out).backward()
    assert torch.allclose(out[15:33], want[15:33], rtol=1e-12)
    assert not out[:15].any() and not out[33:].any()
    assert leaf.grad is None


def test_sink_errors():
    hidden, weight = leaves((N, H), (V, H))
    with pytest.raises(TypeError, match="sink must be a tensor, a callable or a sink; got int"):
        linear_loss(hidden, weight, labels(), objectives.nll(), sink=3)
    with pytest.raises(ValueError, match="no part of weight requires a gradient"):
        linear_loss(hidden, weight.detach(), labels(), objectives.nll(), sink=print)
    with pytest.raises(ValueError, match="HostSink needs a head on a CUDA device"):
        linear_loss(hidden, weight, labels(), objectives.nll(), sink=HostSink(torch.empty(V, H))).backward()
    for wrong in (torch.empty(V, H + 1), torch.empty(V + 2, H), torch.empty(V, H, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"sink: the tensor must be \(41, 8\) of a floating dtype"):
            linear_loss(hidden, weight, labels(), objectives.nll(), sink=wrong)
    out = HostSink(torch.empty(V + 1, H))
    with pytest.raises(ValueError, match="sink: the tensor must be"):
        linear_loss(hidden, weight, labels(), objectives.nll(), sink=out)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_host_copies_are_ordered_after_their_slab_and_before_its_buffer_is_used_again(slots, dtype, small_tiles):
    """The copies run as late as the events allow: a missing wait would copy the next slab's numbers."""
    hidden, weight = leaves((N, H), (V, H), dtype=torch.float32)
    y = labels()
    (want,) = torch.autograd.grad(linear_loss(hidden, weight, y, objectives.nll(), plan="vocab"), weight)
    streams = RecordedStreams()
    out = torch.full((V, H), torch.nan, dtype=dtype)
    sink = HostSink(out, slots=slots, streams=streams)
    for _ in range(2):  # a second backward uses the ring again
        linear_loss(hidden, weight, y, objectives.nll(), sink=sink).backward()
        assert streams.pending[COPY], "the copies were not put off: the test proves nothing"
    sink.wait()
    streams.run(HOST, lambda: None, reads=[out])
    assert torch.equal(out, want.to(dtype))
    assert streams.check() == []
    assert {a.stream for a in streams.accesses} == {COMPUTE, COPY, HOST}


@pytest.mark.parametrize("forgotten", ["compute waits", "copy waits", "host waits"])
def test_the_recorder_sees_each_wait_that_is_left_out(forgotten, small_tiles):
    """The proof can fail: without any one of the three waits a race is named."""

    class Careless(RecordedStreams):
        def wait(self, name, event):
            if name != forgotten.split()[0]:
                super().wait(name, event)

    hidden, weight = leaves((N, H), (V, H), dtype=torch.float32)
    streams = Careless()
    sink = HostSink(torch.zeros(V, H), streams=streams)
    linear_loss(hidden, weight, labels(), objectives.nll(), sink=sink).backward()
    streams.run(HOST, lambda: None, reads=[sink.wait()])
    assert streams.check()


# Invariance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["host", "torch"])
def test_a_row_does_not_depend_on_the_others(dtype, backend):
    """Bit for bit: alone, among others, in another order, on another side of a tile's edge."""
    n, v, h = 300, 2500, 33
    hidden, weight, th, tw = (x.detach() for x in leaves((n, h), (v, h), (n, h), (v, h), dtype=dtype))
    y = labels(n, v, ignored=False)
    names = (
        "lse", "label", "logp", "mean", "square", "uniform", "mix", "mix_lse", "cross", "other", "jsd", "hit",
        "top_entropy",
    )  # fmt: skip

    def stats(rows):
        s = linear_stats(
            hidden[rows], weight, y[rows], stats=names, teacher=Teacher(hidden=th[rows], weight=tw), eta=0.4, alpha=0.6,
            backend=backend,
        )  # fmt: skip
        return torch.stack([getattr(s, name) for name in names])

    every = stats(torch.arange(n))
    assert torch.equal(every, stats(torch.arange(n)))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    for rows in (torch.tensor([7]), torch.arange(3, 9), torch.arange(n).flip(0), order, torch.arange(120, 140)):
        assert torch.equal(every[:, rows], stats(rows)), rows[:3]


def test_geometry_does_not_depend_on_the_number_of_rows():
    common = {"vocabulary": 49152, "hidden": 576, "weight_dtype": torch.float32, "compute_dtype": torch.float32,
              "device": torch.device("cpu")}  # fmt: skip
    shapes = [geometry.slabs(rows=n, **common) for n in (1, 100, 1000, 100000)]
    assert len({(s.columns, s.product) for s in shapes}) == 1
    assert shapes[-1].rows == geometry.TILE_ROWS["cpu"]
    floor = 10**5
    with pytest.raises(ValueError, match="budget must be at least"):
        geometry.slabs(rows=1, **common, budget=floor)


def test_every_form_of_the_head_is_invariant():
    n, v, h = 300, 300, 256
    hidden, weight, a, b, m = (x.detach() for x in leaves((n, h), (v, h), (8, h), (v, 8), (v,), dtype=torch.float32))
    for head in ([weight[:100], weight[100:]], LoRAHead(weight, a, b), LoRAHead(weight, a, b, 0.5, m)):
        every = linear_stats(hidden, head, stats=("lse", "mean"))
        for rows in (torch.tensor([7]), torch.arange(n).flip(0), torch.arange(60, 65)):
            part = linear_stats(hidden[rows], head, stats=("lse", "mean"))
            assert torch.equal(every.lse[rows], part.lse) and torch.equal(every.mean[rows], part.mean)


@pytest.mark.parametrize("n", [1, 130, 257, 300, 384, 600, 1025])
def test_any_budget_that_is_taken_works_and_holds(n):
    """From the least that is allowed upwards: tiles, products and slabs shrink together."""
    v, h = 600, 16
    hidden, weight = leaves((n, h), (v, h), dtype=torch.float32)
    y = torch.zeros(n, dtype=torch.int64)
    common = {"rows": n, "vocabulary": v, "hidden": h, "weight_dtype": torch.float32, "compute_dtype": torch.float32,
              "device": hidden.device, "backend": "host"}  # fmt: skip
    most = geometry.slabs(**common).budget
    with pytest.raises(ValueError, match="budget must be at least") as error:
        geometry.slabs(**common, budget=0)
    least = int(str(error.value).split("at least ")[1].split()[0])
    want = torch.autograd.grad(linear_loss(hidden, weight, y, objectives.nll()), (hidden, weight))
    seen = set()
    for i in range(1 if n > 1 else 0, 9):  # the very least goes number by number
        budget = least + (most - least) * i // 8
        shape = geometry.slabs(**common, budget=budget)
        seen.add((shape.rows, shape.columns))
        assert shape.rows % shape.product == 0
        with LiveBytes() as counter:
            loss = linear_loss(hidden, weight, y, objectives.nll(), plan="vocab", budget=budget, backend="host")
            got = torch.autograd.grad(loss, (hidden, weight))
        assert counter.peak - sum(g.numel() * 4 for g in got) <= budget
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)
    assert len(seen) > 2 or n == 1


# Edges


def test_batched_rows_and_ids():
    hidden, weight = leaves((2, 3, H), (V, H))
    ids = torch.randint(0, V, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    s = linear_stats(hidden, weight, labels(6).reshape(2, 3), stats=("ids_logp", "logp", "entropy"), ids=ids)
    exact = (hidden @ weight.T).log_softmax(-1).gather(2, ids)
    assert torch.allclose(s.ids_logp, exact, rtol=1e-12)
    up = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad(s.ids_logp, (hidden, weight), up, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(exact, (hidden, weight), up), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert s.logp.shape == s.entropy.shape == s.valid.shape == (2, 3)
    assert linear_stats(hidden, weight, stats=("lse",)).valid is None


def test_a_label_of_minus_one_is_an_error_that_is_seen(monkeypatch):
    hidden, weight = leaves((3, H), (V, H))
    y = torch.tensor([0, -1, -100])
    with pytest.raises(ValueError, match="got -1 at row 1"):
        linear_stats(hidden, weight, y)
    from burnish.ops import linear_stats as module

    monkeypatch.setattr(module, "check_labels", lambda *a: None)  # a GPU cannot look
    s = linear_stats(hidden, weight, y)
    assert s.logp[1].isnan() and s.logp[2] == 0 and s.logp[0].isfinite()
    # an ignored label that is the number of a column is no label
    assert linear_stats(hidden, weight, torch.tensor([0, 5, 0]), ignore_index=0).logp[0] == 0


def test_couplings_and_users_may_write_in_place():
    hidden, weight = leaves((6, H), (V, H))
    o = Objective("own", lambda s: s.weight * -s.logp, ("logp",), couple=lambda s: s.logp.exp_(),
                  couple_stats=("logp",))  # fmt: skip
    y = labels(6, ignored=False)
    both = [torch.autograd.grad(linear_loss(hidden, weight, y, o, plan=p), weight)[0] for p in ("tokens", "vocab")]
    assert torch.allclose(*both, rtol=1e-12)
    s = linear_stats(hidden, weight, y, stats=("lse", "mean"))
    (s.lse.mul_(2) + s.mean.add_(1)).sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(("n", "v"), [(0, 5), (1, 1), (3, 0), (257, 3)])
def test_empty_and_odd_shapes(n, v):
    hidden, weight = leaves((n, 4), (v, 4), dtype=torch.float32)
    s = linear_stats(hidden, weight, stats=("lse", "mean"))
    assert s.lse.shape == (n,)
    if v:
        assert torch.allclose(s.lse, (hidden @ weight.T).logsumexp(-1))
        grads = torch.autograd.grad(s.lse.sum() + s.mean.sum(), (hidden, weight))
        assert all(g.isfinite().all() for g in grads)
        assert [g.shape for g in grads] == [hidden.shape, weight.shape]


def test_masked_entries_and_a_teacher_without_support(small_tiles):
    """-inf logits through the bias: gradients are finite and exactly zero where masked."""
    hidden, weight, bias = leaves((N, H), (V, H), (V,))
    masked = bias.detach().clone()
    masked[::3] = -torch.inf
    y = torch.full((N,), 1)
    s = linear_stats(hidden, weight, y, stats=("logp", "entropy", "square", "uniform"), bias=masked)
    keep = masked > -torch.inf
    z = (hidden @ weight.T + masked)[:, keep]
    assert torch.allclose(s.logp, (z.log_softmax(-1))[:, 0])
    grads = torch.autograd.grad(s.logp.sum() + s.entropy.sum(), (hidden, weight))
    assert all(g.isfinite().all() for g in grads)
    assert not grads[1][~keep].any()


def test_tied_and_frozen_and_second_backward(small_tiles):
    table, y = leaves((V, H))[0], labels()
    tokens = torch.arange(N) % V
    loss = linear_stats(table[tokens], table, y).logp.sum()
    exact = torch.where(y >= 0, (table[tokens] @ table.T).log_softmax(-1).gather(1, y.clamp(min=0)[:, None])[:, 0], 0.0)
    first = torch.autograd.grad(loss, table, retain_graph=True)[0]
    assert torch.allclose(first, torch.autograd.grad(exact.sum(), table)[0], rtol=1e-10, atol=1e-12)
    assert torch.equal(first, torch.autograd.grad(loss, table)[0])
    hidden, weight = leaves((N, H), (V, H))
    assert linear_stats(hidden.detach(), weight.detach(), y).logp.grad_fn is None
    (dw,) = torch.autograd.grad(linear_stats(hidden.detach(), weight, y).logp.sum(), weight)
    assert dw.abs().max() > 0
    out = linear_stats(hidden, weight, y).logp.sum()
    (dx,) = torch.autograd.grad(out, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.sum(), hidden)


def test_arguments_that_do_not_fit():
    hidden, weight = leaves((N, H), (V, H))
    with pytest.raises(ValueError, match="stats logp need target"):
        linear_stats(hidden, weight)
    with pytest.raises(ValueError, match="unknown statistic 'entrop'"):
        linear_stats(hidden, weight, labels(), stats=("entrop",))
    with pytest.raises(ValueError, match="needs teacher="):
        linear_stats(hidden, weight, labels(), stats=("cross",))
    with pytest.raises(TypeError, match="weight must be a tensor, a list of row blocks or a LoRAHead; got dict"):
        linear_stats(hidden, {}, labels())
    with pytest.raises(ValueError, match="row blocks must be"):
        linear_stats(hidden, [weight, weight[:, 1:]], labels())
    with pytest.raises(ValueError, match="plan='tokens' makes its gradients in forward"):
        linear_loss(hidden, weight, labels(), objectives.nll(), plan="tokens", reduction="none")
    for bad, message in (
        ({"beta": 2.0}, "beta must lie"),
        ({"top_k": 0}, "top_k must be"),
        ({"eta": float("nan")}, "fini"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_stats(hidden, weight, labels(), **bad)
    with pytest.raises(AttributeError, match="was not asked for"):
        linear_stats(hidden, weight, labels()).square  # noqa: B018
    s = linear_stats(hidden, weight, labels(), stats=("hit", "logp"))
    assert not s.hit.requires_grad
    assert s.logp.requires_grad
