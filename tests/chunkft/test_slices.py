"""Row ranges as leaves: the dense gradient to the bit, no more saved or computed than the rows need, no trace left."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from chunk_models import Block, Net, loss_of, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from burnish.chunkft import plan
from burnish.chunkft.slices import CONTAINER, Slices, attach

pytestmark = pytest.mark.usefixtures("one_thread")


def dense(net, x):
    net.zero_grad()
    loss_of(net, x).backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return grads


def chunked(net, x, cut, *, flat=True, run=loss_of):
    """Every parameter's gradient, put together from the chunks' (NaN where none had it)."""
    found = {p.name: torch.full(p.shape, torch.nan) for p in cut.parameters}
    slices = Slices(net, cut)
    try:
        for chunk in cut.chunks:
            active = slices.activate(chunk)
            if flat:
                memory = torch.full((sum(s.segment.numel for s in active),), torch.nan)
                at = 0
                for s in active:
                    s.use(memory[at : at + s.segment.numel].view(s.leaf.shape))
                    at += s.segment.numel
            run(net, x).backward()
            for s in active:
                if s.leaf.grad is not None:
                    assert s.leaf.grad.shape == s.segment.shape
                    found[s.segment.name][s.segment.start : s.segment.stop] = s.leaf.grad
            for s in cut.always:
                if slices.parameters[s.name].grad is not None:
                    found[s.name] = slices.parameters[s.name].grad.clone()
            net.zero_grad()
            assert all(s.leaf.grad is None for s in active)
    finally:
        slices.detach()
    return found


def tiny(name):
    import tiny_models
    from transformers import MixtralConfig, MixtralForCausalLM

    if name == "gpt2":
        return tiny_models.gpt2()
    if name == "mixtral":
        torch.manual_seed(0)
        return MixtralForCausalLM(MixtralConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
        ))  # fmt: skip
    return tiny_models.llama(tied=name == "tied llama")


MODELS = {
    "net": Net, "tied": lambda: Net(tied=True), "padded": lambda: Net(padding_idx=3),
    **{name: lambda name=name: tiny(name) for name in ("llama", "tied llama", "gpt2", "mixtral")},
}  # fmt: skip


@pytest.mark.parametrize("small", ["always", "chunk"])
@pytest.mark.parametrize("name", MODELS)
def test_the_chunks_gradients_make_the_dense_one_to_the_bit(name, small):
    """T2, T3, T12: odd cuts, tied weights, padding_idx, Conv1D, experts."""
    net, x = MODELS[name](), tokens()
    want = dense(net, x)
    for align in (False, True):
        found = chunked(net, x, plan(net, 5, small=small, align=align), flat=align)
        assert set(found) == set(want)
        for key, grad in want.items():
            assert torch.equal(found[key], grad), (key, (found[key] - grad).abs().max())
    if name == "padded":
        assert not want["embed.weight"][3].any() and (x == 3).any()


def test_inputs_get_their_gradient_in_every_state_of_the_chunks():
    """T5: dX is the plain layer's to the bit."""
    net, x = Block(), torch.randn(3, 5, 32, requires_grad=True)
    (want,) = torch.autograd.grad(net(x).square().sum(), x)
    cut = plan(net, 6, align=False)
    for chunk in range(6):
        with attach(net, cut, chunk):
            (got,) = torch.autograd.grad(net(x).square().sum(), x)
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 4, 5, 32), (0, 32)])
def test_inputs_of_any_number_of_dimensions(shape):
    layer, x = nn.Linear(32, 24), torch.randn(*shape)
    layer(x).square().sum().backward()
    want = layer.weight.grad[:12].clone()
    with attach(layer, plan(layer, 2, align=False)) as slices:
        layer(x).square().sum().backward()
        assert torch.equal(slices.active[0].leaf.grad, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_fp32_and_err_less_than_torchs(dtype):
    net, x = Net().to(dtype), tokens()
    exact = dense(copy.deepcopy(net).double(), x)
    plain = dense(net, x)
    cut = plan(net, 3)
    found = chunked(net, x, cut)
    for s in cut.parameters:
        if len(s.shape) < 2:
            continue
        error = (found[s.name].double() - exact[s.name]).norm()
        torchs = (plain[s.name].double() - exact[s.name]).norm()
        assert error <= 1.02 * torchs, (s.name, error, torchs)
    with attach(net, cut) as slices:
        loss_of(net, x).backward()
        assert {s.leaf.grad.dtype for s in slices.active} == {torch.float32}
        assert {slices.parameters[s.name].grad.dtype for s in cut.always} == {torch.float32}


def test_micro_batches_add_up_in_fp32():
    """T13, in bf16: eight micro-batches of a leaf against their sum in fp64; bf16 accumulation would fail."""
    layer = nn.Linear(64, 32, bias=False).bfloat16()
    xs = torch.randn(64, 16, 64).bfloat16()
    with attach(layer, plan(layer, 2)) as slices:
        leaf = slices.active[0].leaf
        for x in xs:
            layer(x).float().sum().backward()
        got = leaf.grad
    want = xs.double().sum((0, 1)).expand(got.shape)
    assert (got.double() - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize("flat", [True, False])
def test_two_uses_of_a_weight_in_one_backward_and_a_second_backward(flat):
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(5, 8)
    loss = layer(layer(x)).square().sum()
    loss.backward()
    want = layer.weight.grad[:4].clone()
    with attach(layer, plan(layer, 2, align=False)) as slices:
        (s,) = slices.active
        if flat:
            s.use(torch.full((4, 8), torch.nan))
        loss = layer(layer(x)).square().sum()
        (once,) = torch.autograd.grad(loss, s.leaf, retain_graph=True)
        (twice,) = torch.autograd.grad(loss, s.leaf, retain_graph=True)
        assert torch.equal(once, want) and torch.equal(twice, want)
        loss.backward(retain_graph=True)
        assert torch.equal(s.leaf.grad, want)
        loss.backward()
        assert torch.equal(s.leaf.grad, 2 * want)


def test_an_expanded_gradient_and_int32_tokens():
    net = nn.Embedding(12, 8)
    x = tokens(12, (3, 4)).int()
    net(x).sum().backward()
    want = net.weight.grad[:6].clone()
    with attach(net, plan(net, 2, align=False)) as slices:
        net(x).sum().backward()
        assert torch.equal(slices.active[0].leaf.grad, want)


def test_what_a_layer_gives_may_be_written_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.a, self.b = nn.Embedding(9, 16), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, tokens):
            x = self.table(tokens)
            x *= 2.0
            y = self.b(F.relu(self.a(x), inplace=True))
            y += x
            return y

    net, x = InPlace(), tokens(16, (2, 5))
    net(x).square().sum().backward()
    want = {n: p.grad.clone() for n, p in net.named_parameters()}
    found = chunked(net, x, plan(net, 3, small="chunk", align=False), run=lambda n, x: n(x).square().sum())
    for key, grad in want.items():
        assert torch.equal(found[key], grad), key


def test_a_second_derivative_is_refused():
    layer, x = nn.Linear(8, 8), torch.randn(5, 8)
    with attach(layer, plan(layer, 2, align=False)) as slices:
        (grad,) = torch.autograd.grad(layer(x).square().sum(), slices.active[0].leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()


def test_whoever_reads_an_active_weight_gets_its_gradient():
    """A weight that another module uses directly: the property hands out the leaf's rows."""

    class Reader(Net):
        def forward(self, x):
            y = self.last(self.blocks[1](self.blocks[0](self.embed(x))))
            return y @ self.embed.weight.t() + self.head(y)

    net, x = Reader(), tokens()
    want = dense(net, x)
    found = chunked(net, x, plan(net, 4))
    for key, grad in want.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-5, atol=1e-7)


def test_peft_modules_are_chunked_too():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    net, x = peft.get_peft_model(tiny("llama"), config), tokens()
    want = dense(net, x)
    found = chunked(net, x, plan(net, 3, align=False))
    assert set(found) == set(want)
    for key, grad in want.items():
        assert torch.equal(found[key], grad), key


@pytest.mark.parametrize("threads", [1, 2])
def test_any_rows_of_a_product_are_the_dense_ones_to_the_bit(threads):
    """At cuts like 7:28 the vendor's product alone is another in a third of these cases."""
    from burnish.ops.slice_grad import attach_linear

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(0)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=g))]

    try:
        for _ in range(300):
            m, p, q = draw(5, 36, 64, 200, 1000), draw(24, 32, 61, 64, 100, 176), draw(7, 32, 48, 100)
            x, up = torch.randn(m, q, generator=g), torch.randn(m, p, generator=g)
            w = torch.randn(p, q, generator=g).requires_grad_()
            (want,) = torch.autograd.grad(F.linear(x, w), w, up)
            a, b = sorted(torch.randperm(p + 1, generator=g)[:2].tolist())
            leaf = w.detach()[a:b].requires_grad_()
            (got,) = torch.autograd.grad(attach_linear(F.linear(x, w.detach()), x, leaf, a), leaf, up)
            assert torch.equal(got, want[a:b]), (m, p, q, a, b)
    finally:
        torch.set_num_threads(before)


# What is saved and computed


def saved_bytes(net, x, run=loss_of):
    """Bytes of activations kept for backward, each storage once, without weights."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    seen = {}

    def pack(t):
        key = t.untyped_storage().data_ptr()
        if key not in own and t.is_floating_point():
            seen[key] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run(net, x)
    return sum(seen.values()), loss


def hidden_loss(net, x):
    return net(x).square().mean()


def swiglu():
    """The issue's network: four SwiGLU blocks, without norms."""
    torch.manual_seed(0)
    return nn.Sequential(*[Block(64, 176, norm=False) for _ in range(4)])


def backward_flops(net, x):
    loss = hidden_loss(net, x)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def test_backward_computes_what_the_chunk_needs_exactly():
    """T17, T18 and the issue's bars: mean over a cycle of FLOPs <= 0.33 and of saved bytes <= 0.45 of dense."""
    net, x = swiglu(), torch.randn(8, 16, 64)
    m = x.shape[0] * x.shape[1]
    dense_flops = backward_flops(net, x)
    dense_bytes, _ = saved_bytes(net, x, hidden_loss)
    net.zero_grad()
    cut = plan(net, 8, small="chunk", align=16)
    flops, kept = [], []
    slices = Slices(net, cut)
    names = [name for name, p in slices.parameters.items() if p.ndim == 2]
    for chunk in cut.chunks:
        active = slices.activate(chunk)
        flops.append(backward_flops(net, x))
        assert all(p.grad is None for p in slices.parameters.values())
        grads = sum(p.grad.numel() for p in net.parameters() if p.grad is not None)
        assert grads == sum(s.numel for s in chunk) <= 1.1 * sum(p.numel for p in cut.parameters) / 8
        net.zero_grad()
        kept.append(saved_bytes(net, x, hidden_loss)[0])
        rows = [s.segment for s in active if len(s.segment.shape) == 2]
        own = sum(2 * m * s.numel for s in rows)
        lowest = min(int(s.name.split(".")[0]) for s in chunk)
        # dX of a layer is made if its input depends on an active row: above the lowest active one
        inside = {s.name for s in chunk}
        first = next(n for n in slices.parameters if n in inside)
        above = [n for n in names if int(n.split(".")[0]) > lowest]
        block = [n for n in names if int(n.split(".")[0]) == lowest]
        needed = {"gate": ["down"], "up": ["down"], "down": []}[first.split(".")[1]]
        through = above + [n for n in block if n.split(".")[1] in needed]
        assert flops[-1] == own + sum(2 * m * slices.parameters[n].numel() for n in through), (chunk, first)
    slices.detach()
    mean_flops, mean_kept = sum(flops) / len(flops) / dense_flops, sum(kept) / len(kept) / dense_bytes
    print(f"backward FLOPs {mean_flops:.3f} of dense, saved bytes {mean_kept:.3f} of dense")
    assert mean_flops <= 0.33 and mean_kept <= 0.45
    assert max(kept) < dense_bytes


def test_a_layer_without_active_rows_saves_no_input():
    net, x = nn.Sequential(nn.Linear(16, 40), nn.Linear(40, 24), nn.Linear(24, 8)), torch.randn(6, 16)
    with attach(net, plan(net, 1, small="chunk")) as slices:
        by_name = {s.name: s for s in slices.plan.parameters}
        slices.activate([by_name["0.weight"]])  # the two above it need W alone
        kept, _ = saved_bytes(net, x, lambda n, x: n(x).sum())
        assert kept == x.numel() * 4
        slices.activate([by_name["2.weight"]])  # nothing below it is in the graph
        kept, _ = saved_bytes(net, x, lambda n, x: n(x).sum())
        assert kept == 6 * 24 * 4


# Checkpointing, autocast, compile


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(reentrant):
    """T16: and the intermediate of a block is freed after forward."""
    net, x = Net(), tokens()
    want = dense(net, x)
    cut = plan(net, 5)

    def run(net, x):
        net.wrap = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
        try:
            if reentrant:  # as transformers' enable_input_require_grads
                hook = net.embed.register_forward_hook(lambda m, i, o: o if o.requires_grad else o.requires_grad_())
            return loss_of(net, x)
        finally:
            if reentrant:
                hook.remove()

    found = chunked(net, x, cut, run=run)
    for key, grad in want.items():
        assert torch.equal(found[key], grad), key
    with attach(net, cut):
        net.wrap = lambda block, x: block(x)
        plain, _ = saved_bytes(net, x)
        less, _ = saved_bytes(net, x, run)
    assert less < 0.6 * plain


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_as_transformers_turns_it_on(reentrant):
    net, x = tiny("llama"), tokens()
    want = dense(net, x)
    net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    net.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "None of the inputs have requires_grad=True"
        found = chunked(net, x, plan(net, 5, small="chunk"))
    for key, grad in want.items():
        assert torch.equal(found[key], grad), key


def test_autocast_saves_and_multiplies_in_its_dtype():
    net, x = Net(), tokens()

    def run(net, x):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(net, x)

    net.zero_grad()
    run(net, x).backward()
    want = {name: p.grad.clone() for name, p in net.named_parameters()}
    exact = dense(copy.deepcopy(net).double(), x)
    net.zero_grad()
    found = chunked(net, x, plan(net, 5), run=run)
    for key, grad in want.items():
        error, torchs = (found[key] - exact[key]).norm(), (grad - exact[key]).norm()
        assert error <= 1.05 * torchs, (key, error, torchs)
    layer = nn.Linear(32, 32)
    with attach(layer, plan(layer, 2)), torch.autocast("cpu", torch.bfloat16):
        kept, _ = saved_bytes(layer, torch.randn(8, 32), lambda n, x: n(x).sum())
    assert kept == 8 * 32 * 2


@pytest.mark.parametrize("chunk", range(3))
def test_compiled_whole_graph_equals_eager(chunk):
    net, x = Net(), tokens()
    with attach(net, plan(net, 3), chunk) as slices:
        loss_of(net, x).backward()
        want = [s.leaf.grad.clone() for s in slices.active]
        net.zero_grad()
        torch._dynamo.reset()
        compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
        compiled(net, x).backward()
        for s, grad in zip(slices.active, want, strict=True):
            torch.testing.assert_close(s.leaf.grad, grad, rtol=1e-5, atol=1e-7)


# Nothing is left behind


def test_the_state_dict_and_an_optimizers_step_see_the_weights():
    net, x = Net(), tokens()
    keys = list(net.state_dict())
    with attach(net, plan(net, 3), 1) as slices:
        assert list(net.state_dict()) == keys
        net.load_state_dict(net.state_dict())
        loss_of(net, x).backward()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        leaves = [p for p in net.parameters() if p.requires_grad]
        assert {id(s.leaf) for s in slices.active} <= {id(p) for p in leaves}
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        torch.optim.SGD(leaves, lr=1.0).step()
        changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == {s.segment.name for s in slices.active} | {s.name for s in slices.plan.always}
        for s in slices.active:
            rows = slice(s.segment.start, s.segment.stop)
            now, then = net.state_dict()[s.segment.name], before[s.segment.name]
            assert not torch.equal(now[rows], then[rows])
            rest = torch.ones(len(now), dtype=torch.bool)
            rest[rows] = False
            assert torch.equal(now[rest], then[rest])


@pytest.mark.parametrize("name", ["tied", "llama", "gpt2"])
def test_detach_gives_the_model_back(name):
    net = MODELS[name]()
    frozen = next(n for n, p in net.named_parameters() if p.ndim == 2)
    net.get_parameter(frozen).requires_grad_(False)

    def picture():
        return (
            {n: (type(m), set(m.__dict__), set(m._modules), len(m._forward_hooks)) for n, m in net.named_modules()},
            {n: (p.requires_grad, p.data_ptr()) for n, p in net.named_parameters()}, repr(net), set(vars(net)),
        )  # fmt: skip

    before = picture()
    slices = Slices(net, plan(net, 3))
    for chunk in slices.plan.chunks:
        slices.activate(chunk)
    assert CONTAINER in net._modules
    slices.detach()
    assert picture() == before


def test_an_error_inside_the_block_detaches_as_well():
    net = Net()
    with contextlib.suppress(KeyError), attach(net, plan(net, 3)):
        raise KeyError
    assert CONTAINER not in net._modules and all(p.requires_grad for p in net.parameters())
    assert {type(m) for m in net.modules()} >= {nn.Linear, nn.Embedding}


def test_a_copy_of_an_attached_model_is_one_of_its_own():
    net, x = Net(), tokens()
    with attach(net, plan(net, 3)) as slices:
        twin = copy.deepcopy(net)
        loss_of(twin, x).backward()
        assert all(s.leaf.grad is None for s in slices.active)
        theirs = dict(twin.get_submodule(CONTAINER).named_parameters())
        assert len(theirs) == len(slices.active)
        loss_of(net, x).backward()
        for s, p in zip(slices.active, theirs.values(), strict=True):
            assert torch.equal(p.grad, s.leaf.grad) and p.data_ptr() != s.leaf.data_ptr()


# Refusals


def test_a_weight_that_no_known_layer_owns_is_named():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Parameter(torch.randn(40, 8)), nn.Linear(8, 8)

        def forward(self, x):
            return self.out(x @ self.table)

    net = Table()
    with pytest.raises(ValueError, match=r"'table' \(40, 8\) belongs to a Table.*whole=\('table',\).*requires_grad_"):
        Slices(net, plan(net, 4))
    assert all(p.requires_grad for p in net.parameters()) and CONTAINER not in net._modules
    x = torch.randn(3, 40)
    net(x).sum().backward()
    want = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    found = chunked(net, x, plan(net, 2, whole=("table",)), run=lambda n, x: n(x).sum())
    for key, grad in want.items():
        assert torch.equal(found[key], grad), key


def test_other_refusals():
    net = Net()
    with attach(net, plan(net, 2)), pytest.raises(ValueError, match="detach"):
        Slices(net, plan(net, 2))
    counted = nn.Sequential(nn.Embedding(10, 4, scale_grad_by_freq=True))
    with pytest.raises(ValueError, match="scale_grad_by_freq"):
        Slices(counted, plan(counted, 2))
    turned = nn.Linear(8, 16, bias=False)
    turned.weight = nn.Parameter(torch.randn(8, 16).t())
    with pytest.raises(ValueError, match="contiguous"):
        Slices(turned, plan(turned, 2))


def test_hooks_on_a_leaf_are_called_in_every_turn_of_its_chunk():
    net, x, calls = Net(), tokens(), []
    slices = Slices(net, plan(net, 2))
    (s, *_) = slices.activate(slices.plan.chunks[0])
    s.leaf.register_hook(lambda g: calls.append("gradient") or 2 * g)
    s.leaf.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    loss_of(net, x).backward()
    once = s.leaf.grad.clone()
    slices.activate(slices.plan.chunks[1])
    loss_of(net, x).backward()
    assert calls == ["gradient", "accumulated"]
    (again, *_) = slices.activate(slices.plan.chunks[0])
    loss_of(net, x).backward()
    assert again.leaf is s.leaf and calls == 2 * ["gradient", "accumulated"]
    assert torch.equal(s.leaf.grad, once)
    slices.detach()
    net.zero_grad()
    loss_of(net, x).backward()
    rows = slice(s.segment.start, s.segment.stop)
    assert torch.equal(once, 2 * net.get_parameter(s.segment.name).grad[rows])
