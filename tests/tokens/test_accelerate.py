"""The drop-in on a mini VGGT: the published method, its neighbours, and the model given back as it was."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from mini_models import MiniPi3, MiniVGGT, sharpen
from oracle import mask, masked
from torch import nn

from burnish.tokens import LayerRule, Layout, accelerate, restore

RULE = LayerRule(1, 3)  # local, stride, stride, frames
KINDS = ("local", "stride", "stride", "frames")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32, another order of sums


def model(**options):
    return sharpen(MiniVGGT(**options)).eval()


def images(batch=1, frames=6, height=16, width=20):
    return torch.randn(batch, frames, 3, height, width)


def masks_of(layout, chosen, stride, kinds=KINDS, **options):
    """A mask (B, 1, L, L) a layer."""
    return [torch.stack([mask(layout, kind, one, stride, **options) for one in chosen])[:, None] for kind in kinds]


def dense_rows(context):
    """A strategy that keeps every key, through lists."""
    return torch.arange(context.layout.frames * context.layout.tokens, dtype=torch.int32)


@pytest.mark.parametrize("batch, size", [(1, (16, 20)), (2, (16, 20)), (2, (24, 8)), (1, (4, 28))])
@pytest.mark.parametrize("stride", [2, 3])
def test_the_published_method_is_the_masked_model(batch, size, stride):
    """B scenes with a set each; grids that are not square."""
    net, x = model(), images(batch, 7, *size)
    with torch.no_grad():
        dense = net(x)
        with accelerate(net, 3, stride, rule=RULE) as handle:
            got = net(x)
        chosen = handle.report().frames
        assert len(chosen) == batch and all(s[0] == 0 and len(set(s)) == 3 for s in chosen)
        layout = Layout(7, size[0] // 4, size[1] // 4, 3)
        with masked(net.aggregator.global_blocks, masks_of(layout, chosen, stride)):
            want = net(x)
    torch.testing.assert_close(got, want, **CLOSE)
    assert (got - dense).abs().max() > 100 * (got - want).abs().max()  # the mask matters
    kept = [layout.tokens, 3 * (3 + -(-size[0] // 4 // stride) * -(-size[1] // 4 // stride))]
    assert [r.keys for r in handle.report().layers] == [kept[0], kept[1], kept[1], 3 * layout.tokens]
    assert [r.kind for r in handle.report().layers] == list(KINDS)


def test_scenes_of_a_batch_do_not_meet():
    net, x = model(), images(3)
    with torch.no_grad(), accelerate(net, 3, 2, rule=RULE) as handle:
        together = net(x)
        sets = handle.report().frames
        assert len(set(sets)) > 1
        for b in range(3):
            torch.testing.assert_close(net(x[b : b + 1])[0], together[b], **CLOSE)
            assert handle.report().frames == (sets[b],)


def test_frames_of_the_set_are_those_of_the_encoders_tokens():
    """And of the frames given, not of others: fact 3 and specs 3.3, defect 4."""
    from burnish.ops.farthest_frames import farthest_frames

    net, x = model(), images(2, 9)
    tokens = net.aggregator.patch_embed(x.flatten(0, 1))["x_norm_patchtokens"].unflatten(0, (2, 9))
    want = farthest_frames(tokens.mean(2).detach(), 4, start=2)
    with torch.no_grad(), accelerate(net, 4, start=2, rule=RULE) as handle:
        net(x)
        assert handle.report().frames == tuple(map(tuple, want.tolist()))
        net(x[:, ::2])
        fewer = farthest_frames(tokens[:, ::2].mean(2).detach(), 4, start=2)
        assert handle.report().frames == tuple(map(tuple, fewer.tolist()))


def test_every_key_kept_is_the_dense_model():
    """Fact 1: bit-exact where the model's own code runs, to rounding through gather and lists."""
    net, x = model(), images(2)
    with torch.no_grad():
        dense = net(x)
        for frames in (6, 99):
            with accelerate(net, frames, 1, rule=LayerRule(0, 2)) as handle:
                assert torch.equal(net(x), dense)
                assert [r.kind for r in handle.report().layers] == ["dense"] * 4 and handle.report().saved == 0
        for strategy in ("diverse_self", "nearest", "heads"):
            with accelerate(net, 6, 1, rule=LayerRule(0, 2), strategy=strategy):
                assert torch.equal(net(x), dense)
        with accelerate(net, rule=LayerRule(0, 2), strategy=dense_rows) as handle:
            torch.testing.assert_close(net(x), dense, **CLOSE)
        with accelerate(net, rule=LayerRule(0, 2), strategy=lambda c: dense_rows(c).expand(6, 1, -1)) as handle:
            torch.testing.assert_close(net(x), dense, **CLOSE)
            assert [r.kind for r in handle.report().layers] == ["stride"] * 2 + ["frames"] * 2


def test_all_frames_are_still_strided():
    """K >= N leaves sigma in force: what the published code does."""
    net, x = model(), images()
    with torch.no_grad():
        with accelerate(net, 6, 2, rule=RULE) as handle:
            got = net(x)
        assert [r.kind for r in handle.report().layers] == ["local", "stride", "stride", "dense"]
        layout = Layout(6, 4, 5, 3)
        with masked(net.aggregator.global_blocks, masks_of(layout, [range(6)], 2, (*KINDS[:3], "dense"))):
            torch.testing.assert_close(got, net(x), **CLOSE)


def test_local_is_the_block_diagonal_mask():
    """Fact 12, and no set is chosen for it."""
    net, x = model(), images(2)
    with torch.no_grad():
        with accelerate(net, 2, rule=LayerRule(4, 4), descriptors=lambda _: 1 / 0) as handle:
            got = net(x)
        assert handle.report().frames is None
        with masked(net.aggregator.global_blocks, masks_of(Layout(6, 4, 5, 3), [[0], [0]], 2, ("local",) * 4)):
            torch.testing.assert_close(got, net(x), **CLOSE)


def test_one_frame_is_the_models_own_code():
    net, x = model(), images(2, 1)
    with torch.no_grad():
        dense = net(x)
        with accelerate(net, 1, rule=RULE) as handle:
            assert torch.equal(net(x), dense)
        assert [r.kind for r in handle.report().layers] == ["dense"] * 4


@pytest.mark.parametrize("strategy", ["diverse_self", "nearest"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_set_for_each_query_frame(strategy, backend):
    """Fact 11: not the attention over the union of the sets."""
    from burnish.tokens import nearest_sets, seeded_sets

    net, x, given = model(), images(2), torch.randn(2, 6, 7)
    chosen = {"diverse_self": seeded_sets, "nearest": nearest_sets}[strategy](given, 3).tolist()
    layout = Layout(6, 4, 5, 3)
    with torch.no_grad():
        with accelerate(net, 3, 2, rule=RULE, strategy=strategy, descriptors=given, backend=backend) as handle:
            got = net(x)
        assert handle.report().frames is None
        with masked(net.aggregator.global_blocks, masks_of(layout, chosen, 2)):
            torch.testing.assert_close(got, net(x), **CLOSE)
        union = [sorted({f for row in one for f in row}) for one in chosen]
        with masked(net.aggregator.global_blocks, masks_of(layout, union, 2)):
            assert (got - net(x)).abs().max() > 1e-2


@pytest.mark.parametrize("stride", [2, 1])
def test_the_own_frame_is_added_once(stride):
    net, x = model(), images(2)
    layout = Layout(6, 4, 5, 3)
    with torch.no_grad():
        with accelerate(net, 2, stride, rule=RULE, own_frame=True) as handle:
            got = net(x)
        report = handle.report()
        with masked(net.aggregator.global_blocks, masks_of(layout, report.frames, stride, own=True)):
            torch.testing.assert_close(got, net(x), **CLOSE)
        with masked(net.aggregator.global_blocks, masks_of(layout, report.frames, stride)):
            assert (got - net(x)).abs().max() > 1e-2
    # four of the six frames have their own tokens beside those of the two
    assert report.layers[3].keys == pytest.approx(2 * 23 + 4 / 6 * 23)


def test_a_grid_for_each_head():
    """Heads see phases of the grid that differ, and together all of it; FRAMES layers are shared."""
    from burnish.tokens import grid_tokens, head_phases

    net, x = model(), images(2)
    layout = Layout(6, 4, 5, 3)
    with torch.no_grad():
        with accelerate(net, 3, 2, rule=RULE, strategy="heads") as handle:
            got = net(x)
        chosen = handle.report().frames
        phases = head_phases(4, 2, layout)
        assert len(set(phases)) == 4
        added = torch.full((2, 4, layout.length, layout.length), -torch.inf)
        for b, frames in enumerate(chosen):
            for head, phase in enumerate(phases):
                for f in frames:
                    added[b, head, :, f * 23 + grid_tokens(layout, 2, phase=phase)] = 0
        masks = masks_of(layout, chosen, 2)
        with masked(net.aggregator.global_blocks, [masks[0], added, added, masks[3]]):
            torch.testing.assert_close(got, net(x), **CLOSE)
        with masked(net.aggregator.global_blocks, masks):
            assert (got - net(x)).abs().max() > 1e-2
    # grids of 2 x 3, 2 x 2 patches, and 3 special tokens
    assert handle.report().layers[1].keys == pytest.approx(3 * (3 + 5))


def test_lists_of_the_users_own():
    net, x = model(), images(2)
    rows = torch.stack([torch.randperm(6 * 23)[:30] for _ in range(2 * 6 * 4)]).view(2, 6, 4, 30)
    counts = torch.randint(1, 31, (2, 6, 4))
    seen = []

    def mine(context):
        seen.append((context.layer, context.kind, context.batch, context.heads, tuple(context.descriptors.shape)))
        return rows.masked_fill(torch.arange(30) >= counts[..., None], -1), counts

    added = torch.full((2, 4, 6 * 23, 6 * 23), -torch.inf)
    for b, f, h in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(4)).tolist():
        added[b, h, f * 23 : (f + 1) * 23, rows[b, f, h, : counts[b, f, h]]] = 0
    with torch.no_grad():
        with accelerate(net, rule=RULE, strategy=mine) as handle:
            got = net(x)
        first = mask(Layout(6, 4, 5, 3), "local", None, 1)
        with masked(net.aggregator.global_blocks, [first, added, added, added]):
            torch.testing.assert_close(got, net(x), **CLOSE)
    assert seen == [(i, k, 2, 4, (2, 6, 32)) for i, k in ((1, "stride"), (2, "stride"), (3, "frames"))]
    assert handle.report().layers[1].keys == pytest.approx(counts.float().mean().item())


@pytest.mark.parametrize("answer", [lambda rows: rows[:30], lambda rows: (rows, 30)])
def test_one_list_of_the_users_own(answer):
    """Projected for its rows alone where their number is known."""
    net, x, rows = model(), images(2), torch.randperm(6 * 23)[:40]
    added = torch.full((138, 138), -torch.inf)
    added[:, rows[:30]] = 0
    with torch.no_grad():
        with accelerate(net, rule=LayerRule(0, 0), strategy=lambda _: answer(rows)) as handle:
            got = net(x)
        with masked(net.aggregator.global_blocks, [added] * 4):
            torch.testing.assert_close(got, net(x), **CLOSE)
    counted = isinstance(answer(rows), tuple)
    assert all((r.keys, r.rows) == (30, 30 if counted else 138) for r in handle.report().layers)


@pytest.mark.parametrize("options", [{}, {"own_frame": True}, {"strategy": "nearest"}, {"strategy": "heads"}])
def test_gradients_are_those_of_the_masked_model(options):
    net, x = model(), images(2)
    given, weight = torch.randn(6, 5), torch.randn(2, 6, 23, 64)
    layout = Layout(6, 4, 5, 3)

    def gradients():
        net.zero_grad()
        y = x.clone().requires_grad_()
        (net(y) * weight).sum().backward()
        return [y.grad, *(p.grad.clone() for p in net.parameters())]

    with accelerate(net, 2, 2, rule=RULE, descriptors=given, **options) as handle:
        got = gradients()
        chosen = handle.report().frames
    if options.get("strategy") == "nearest":
        from burnish.tokens import nearest_sets

        chosen = nearest_sets(given.expand(2, 6, 5), 2).tolist()
    masks = masks_of(layout, chosen, 2, own=options.get("own_frame", False))
    if options.get("strategy") == "heads":
        from burnish.tokens import grid_tokens, head_phases

        added = torch.full((2, 4, layout.length, layout.length), -torch.inf)
        for head, phase in enumerate(head_phases(4, 2, layout)):
            for f in chosen[0]:
                added[:, head, :, f * 23 + grid_tokens(layout, 2, phase=phase)] = 0
        masks[1] = masks[2] = added
    with masked(net.aggregator.global_blocks, masks):
        want = gradients()
    for one, other in zip(got, want, strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=float(scale) * 1e-4)
    assert all(g.abs().max() > 0 for g in got)


@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"qk_norm": False}, {"fused_attn": False}])
def test_attention_modules_that_differ(options):
    net, x = model(**options), images(2)
    with torch.no_grad():
        with accelerate(net, 3, 2, rule=RULE) as handle:
            got = net(x)
        with masked(net.aggregator.global_blocks, masks_of(Layout(6, 4, 5, 3), handle.report().frames, 2)):
            torch.testing.assert_close(got, net(x), **CLOSE)


class Adapter(nn.Linear):
    """A linear layer that is more than its weight: half as much again in rank one, as LoRA does."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.down = nn.Parameter(torch.randn(1, linear.in_features) * 0.3)
        self.up = nn.Parameter(torch.randn(linear.out_features, 1) * 0.3)

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


def test_a_wrapped_projection_is_called_whole():
    net, x = model(), images()
    for block in net.aggregator.global_blocks:
        block.attn.qkv = Adapter(block.attn.qkv)
    with torch.no_grad():
        with accelerate(net, 3, 2, rule=RULE) as handle:
            got = net(x)
        with masked(net.aggregator.global_blocks, masks_of(Layout(6, 4, 5, 3), handle.report().frames, 2)):
            torch.testing.assert_close(got, net(x), **CLOSE)
    plain = model()
    with torch.no_grad(), accelerate(plain, 3, 2, rule=RULE) as cheaper:
        plain(x)
    assert cheaper.report().flops < handle.report().flops


def test_only_kept_rows_are_projected():
    """The K and V projection, k_norm and RoPE see the kept rows alone."""
    net, x = model(), images(2)
    seen = []
    attn = net.aggregator.global_blocks[1].attn
    attn.k_norm.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
    with torch.no_grad(), accelerate(net, 3, 2, rule=RULE) as handle:
        net(x)
    assert seen == [(2, 4, 3 * (3 + 2 * 3), 8)] and handle.report().layers[1].rows == 27


def test_autocast_keeps_the_value_dtype():
    """Under autocast LayerNorm hands on fp32 (on CUDA): q and k go to v's dtype, specs 3.4."""
    net, x = model(), images(2)
    attn = net.aggregator.global_blocks[2].attn
    attn.q_norm.register_forward_hook(lambda _, __, out: out.float())
    attn.k_norm.register_forward_hook(lambda _, __, out: out.float())
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **options):
        seen.append((q.dtype, k.dtype, v.dtype))
        return real(q, k, v, **options)

    torch.nn.functional.scaled_dot_product_attention = watched
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), accelerate(net, 3, 2, rule=RULE) as handle:
            got = net(x)
    finally:
        torch.nn.functional.scaled_dot_product_attention = real
    globals_ = seen[1::2]
    assert len(globals_) == 4 and all(s == (torch.bfloat16,) * 3 for s in globals_)
    masks = masks_of(Layout(6, 4, 5, 3), handle.report().frames, 2)
    with torch.no_grad(), masked(net.aggregator.global_blocks, masks):
        exact = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(x)
    # fact 13: no further from fp32 than plain torch in bf16
    error, theirs = (got - exact).abs().mean(), (rounded - exact).abs().mean()
    assert error <= 1.5 * theirs and theirs > 0


def test_autocast_gives_gradients_to_every_weight():
    """A probe without gradients leaves no cast weights behind for the layer itself."""
    from burnish.tokens import AdaptiveRule

    net, x = model(), images()
    for block in net.aggregator.global_blocks:
        block.attn.qkv = Adapter(block.attn.qkv)  # called whole, by the probe too
    with accelerate(net, 3, 2, rule=AdaptiveRule(0.5, 0.4)), torch.autocast("cpu", torch.bfloat16):
        net(x).square().sum().backward()
    for block in net.aggregator.global_blocks:
        for name, p in block.attn.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name


def test_dropout_of_attention_weights():
    """Training with attention dropout: drawn as in the dense model over the same keys; refused where it cannot be."""
    net, x = model(attn_drop=0.3), images()
    net.train()
    net.aggregator.checkpointing = False
    with accelerate(net, 3, 2, rule=RULE):
        torch.manual_seed(1)
        one = net(x)
        torch.manual_seed(1)
        assert torch.equal(net(x), one)
        assert not torch.equal(net(x), one)
        net.eval()
        assert torch.equal(net(x), net(x))
        net.train()
    for options in ({"own_frame": True}, {"strategy": "nearest"}):
        with accelerate(net, 3, 2, rule=RULE, **options), pytest.raises(ValueError, match=r"attn_drop must be 0.*0\.3"):
            net(x)
    dense = LayerRule(0, 0)
    torch.manual_seed(2)
    want = net(x)
    with accelerate(net, 6, rule=dense):
        torch.manual_seed(2)
        assert torch.equal(net(x), want)


def test_restore_leaves_nothing_behind():
    net, x = model(), images()
    modules = dict(net.named_modules())
    before = {name: (dict(vars(m)), set(dir(m))) for name, m in modules.items()}
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        dense = net(x)
        handle = accelerate(net, 3, 2, rule=RULE)
        assert handle.active and handle.family == "vggt" and handle.trunk is net.aggregator
        assert list(net.state_dict()) == list(state) and len(list(net.parameters())) == len(list(state))
        assert not torch.equal(net(x), dense)
        handle.restore()
        assert torch.equal(net(x), dense)
    for name, m in modules.items():
        now, (attributes, names) = dict(vars(m)), before[name]
        assert now.keys() == attributes.keys() and set(dir(m)) == names, name
        assert all(now[k] is attributes[k] for k in now), name
    assert not handle.active and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    handle.restore()  # nothing to do
    assert handle.report().layers  # of the last pass


def test_a_forward_of_its_own_is_given_back():
    net, x = model(), images()
    attn = net.aggregator.global_blocks[0].attn
    own = attn.forward
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    attn.forward = counted
    with torch.no_grad():
        with accelerate(net, 6, rule=LayerRule(0, 0)):
            net(x)  # every key: the original, that is ours
            assert calls == [1]
        assert attn.forward is counted
        net(x)
    assert calls == [1, 1]


def test_restore_sees_a_later_patch():
    net, x = model(), images()
    handle = accelerate(net, 3, 2, rule=RULE)
    attn = net.aggregator.global_blocks[2].attn
    ours = attn.forward
    attn.forward = lambda *a, **k: ours(*a, **k)
    with pytest.raises(RuntimeError, match="forward was replaced after accelerate"):
        handle.restore()
    assert handle.active
    attn.forward = ours
    handle.restore()
    with torch.no_grad():
        assert torch.equal(net(x), net(x)) and "forward" not in vars(attn)


def test_twice_is_refused():
    net = model()
    with accelerate(net, rule=RULE):
        with pytest.raises(ValueError, match="model is accelerated already"):
            accelerate(net, rule=RULE)
        with pytest.raises(ValueError, match="model is accelerated already"):
            accelerate(net.aggregator, rule=RULE)
    accelerate(net.aggregator, rule=RULE).restore()


def test_copies_are_accelerated_on_their_own():
    net, x = model(), images()
    with torch.no_grad():
        dense = net(x)
        handle = accelerate(net, 3, 2, rule=RULE)
        fast = net(x)
        twin = copy.deepcopy(net)
        again = pickle.loads(pickle.dumps(net))
        stream = io.BytesIO()
        torch.save(net, stream)
        stream.seek(0)
        loaded = torch.load(stream, weights_only=False)
        handle.restore()
        for other in (twin, again, loaded):
            assert torch.equal(other(x), fast)
            for p in other.parameters():
                p.zero_()
            assert not torch.equal(other(x), fast)  # its own weights
        assert torch.equal(net(x), dense)
        second = copy.deepcopy(net)
        accelerate(second, 3, 2, rule=RULE)
        third = copy.deepcopy(second)
        restore(third)
        assert torch.equal(third(x), dense) and torch.equal(second(x), fast)
        assert not [k for m in third.modules() for k in vars(m) if k == "forward"]


def test_a_forwards_signature_is_still_told():
    net = model()
    before = inspect.signature(net.aggregator.forward)
    with accelerate(net, rule=RULE):
        assert inspect.signature(net.aggregator.forward) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_under_torch_compile():
    """In pieces: the graph breaks where a scene begins and where lists are made."""
    net, x = model(depth=2), images(2)
    with torch.no_grad(), accelerate(net, 3, 2, rule=LayerRule(1, 1)) as handle:
        want = net(x)
        fast = torch.compile(net, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(fast(x), want, **CLOSE)
        assert [r.kind for r in handle.report().layers] == ["local", "frames"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"frames": 0}, ValueError, "frames must be at least 1; got 0"),
        ({"frames": 2.5}, TypeError, "frames must be a whole number; got 2.5"),
        ({"stride": 0}, ValueError, "stride must be at least 1; got 0"),
        ({"phase": (3, 0)}, ValueError, "phase must be below stride = 3"),
        ({"edge": "x"}, ValueError, "edge must be one of ceil, floor; got 'x'"),
        ({"rule": "published"}, TypeError, "rule must be a LayerRule or an AdaptiveRule; got str"),
        ({"strategy": "topk"}, ValueError, "strategy must be one of diversity, heads, diverse_self, nearest"),
        ({"strategy": "nearest", "own_frame": True}, ValueError, "own_frame goes with strategy='diversity'"),
        ({"strategy": "heads", "phase": (1, 0)}, ValueError, "strategy='heads' has a phase for each head"),
        ({"tail": "none"}, ValueError, "tail must be one of dense, selected; got 'none'"),
        ({"tail": "selected", "strategy": "heads"}, ValueError, "tail='selected' goes with strategy='diversity'"),
        ({"descriptors": [1]}, TypeError, "descriptors must be a tensor or a function; got list"),
        ({"start": -1}, ValueError, "start must be at least 0; got -1"),
    ],
)
def test_errors_name_the_argument(options, error, words):
    net = model()
    with pytest.raises(error, match=words):
        accelerate(net, **{"rule": RULE, **options})
    assert not [k for m in net.modules() for k in vars(m) if k == "forward"]


def test_errors_of_models():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got str"):
        accelerate("vggt")
    with pytest.raises(ValueError, match="model must hold the trunk of one of vggt, pi3, uniception, da3; got Linear"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"one trunk; got Aggregator \(vggt\), MiniPi3 \(pi3\)"):
        accelerate(nn.ModuleList([model(), MiniPi3()]))
    net = model()
    del net.aggregator.global_blocks[1].attn.qkv
    with pytest.raises(ValueError, match=r"model must have qkv in global_blocks\.1\.attn; got Attention"):
        accelerate(net, rule=RULE)


def test_errors_of_a_forward_pass():
    net, x = model(), images()
    with torch.no_grad():
        with accelerate(net, rule=RULE) as handle:
            with pytest.raises(ValueError, match=r"report\(\) needs a forward pass"):
                handle.report()
            with pytest.raises(RuntimeError, match="outside the model's forward pass"):
                net.aggregator.global_blocks[1](torch.randn(1, 23, 32), pos=torch.zeros(1, 23, 2))
            with pytest.raises(ValueError, match=r"images must be \(B, N, 3, H, W\); got \(6, 3, 16, 20\)"):
                net(x[0])
        wrong = pytest.raises(ValueError, match=r"descriptors must be \(6, D\) or \(1, 6, D\)")
        with accelerate(net, 2, rule=RULE, descriptors=torch.randn(5, 3)), wrong:
            net(x)
        wrong = pytest.raises(ValueError, match="start must be one of the scene's 6 frames; got 6")
        with accelerate(net, 2, rule=RULE, start=6), wrong:
            net(x)
        for answer, words in (
            (torch.randn(3), r"strategy must return an int32 or int64 tensor of rows; got torch\.float32"),
            (torch.zeros(4, 3, dtype=torch.int32), r"strategy must return \(M,\), \(6, M\).*; got \(4, 3\)"),
            (torch.tensor([0, 138]), r"strategy must return rows in \[0, 138\).*; got 138"),
            ((torch.tensor([0, -1]), 2), r"strategy must return rows in \[0, 138\).*; got -1"),
            ((torch.tensor([0, 1]), 3), r"strategy must return kv_counts in \[0, 2\]; got 3"),
        ):
            wrong = pytest.raises(TypeError if "rows;" in words else ValueError, match=words)
            with accelerate(net, rule=RULE, strategy=lambda _, answer=answer: answer), wrong:
                net(x)


def test_stochastic_depth_over_a_batch_is_refused():
    """Which scenes of the batch are left is not told."""
    net = model(drop_path=0.5).train()
    net.aggregator.checkpointing = False
    with accelerate(net, 2, rule=RULE):
        with pytest.raises(ValueError, match=r"tokens must be \(2, 138, C\): 6 frames of 3 \+ 4 x 5 .*stochastic"):
            net(images(2))
        net(images(1))


def test_a_stray_argument_of_attention_is_refused():
    net = MiniPi3().eval()
    with accelerate(net, 2, rule=RULE):
        attn = net.decoder[1].attn
        vars(net.decoder[1])["forward"] = lambda x, xpos: attn(x, torch.zeros(1), xpos=xpos)
        with pytest.raises(ValueError, match="attn_bias must be None on an accelerated model; got Tensor"):
            net(torch.randn(1, 4, 3, 8, 8))


def test_the_default_rule_warns_where_it_was_not_published():
    with pytest.warns(UserWarning, match="for 18 or 24 global layers; this model has 4"):
        accelerate(model()).restore()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model(), rule=RULE).restore()
        accelerate(MiniPi3(depth=36, dim=8, num_heads=2)).restore()
