"""The adaptive rule on a model: routes as the definition computed densely, with one wait a layer."""

import math

import pytest
import torch
from mini_models import MiniVGGT, sharpen
from oracle import mask, masked

from burnish.tokens import AdaptiveRule, LayerRule, Layout, Probe, accelerate

LAYOUT = Layout(6, 4, 5, 3)


def model():
    net = sharpen(MiniVGGT(depth=5)).eval()
    with torch.no_grad():  # entropies that fall from layer to layer
        for block, factor in zip(net.aggregator.global_blocks, (0.05, 0.4, 0.8, 2.0, 0.02), strict=True):
            block.attn.q_norm.weight *= factor
    return net


def dense_entropies(net, x, probe, masks):
    """H_norm of each layer's dense attention by its definition, on tokens made with ``masks``."""
    out = []

    def watch(module, args, kwargs):
        attn, u = module, args[0]
        q, k, _ = attn.heads(u, kwargs["pos"])
        if probe.where == "middle":
            begin, count = LAYOUT.frames // 2 * LAYOUT.tokens, LAYOUT.tokens
        else:
            begin, count = 0, LAYOUT.length
        rows = [begin + i * (count - 1) // (probe.queries - 1) for i in range(probe.queries)]
        heads = [i * 3 // (probe.heads - 1) for i in range(probe.heads)]
        scores = (q[:, heads][:, :, rows].double() @ k[:, heads].double().mT) * attn.scale
        p = scores.softmax(-1)
        out.append((-(p * p.log()).sum(-1).mean() / math.log(LAYOUT.length)).item())

    hooks = [b.attn.register_forward_pre_hook(watch, with_kwargs=True) for b in net.aggregator.global_blocks]
    with masked(net.aggregator.global_blocks, masks):
        result = net(x)
    for hook in hooks:
        hook.remove()
    return out, result


@pytest.mark.parametrize("probe", [Probe(4, 12), Probe(4, 12, "all"), Probe(2, 8)])
@pytest.mark.parametrize("batch", [1, 2])
def test_routes_as_the_definition(probe, batch):
    net, x = model(), torch.randn(batch, 6, 3, 16, 20)
    with torch.no_grad():
        seen = []
        for taus in ((0.97, 0.9), (0.99, 0.6), (0.9, 0.9), (1.0, 1.0), (0.0, 0.0)):
            with accelerate(net, 3, 2, rule=AdaptiveRule(*taus, probe)) as handle:
                got = net(x)
            report = handle.report()
            kinds = [r.kind for r in report.layers]
            chosen = report.frames or [[0]] * batch
            masks = [torch.stack([mask(LAYOUT, kind, s, 2) for s in chosen])[:, None] for kind in kinds]
            entropies, want = dense_entropies(net, x, probe, masks)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            state, expected = "local", []
            for h in entropies:
                if state == "local" and h < taus[0]:
                    state = "stride"
                if state == "stride" and h < taus[1]:
                    state = "frames"
                expected.append(state)
            assert kinds == expected
            for r, h, before in zip(report.layers, entropies, ["", *kinds], strict=False):
                if before == "frames":  # the rule has ended: nothing is measured
                    assert r.entropy is None and r.top1 is None
                else:
                    assert r.entropy == pytest.approx(h, abs=1e-5) and 0 < r.top1 <= 1
            seen.append(tuple(kinds))
    assert len(set(seen)) >= 4 and ("local",) * 5 in seen and ("frames",) * 5 in seen


def test_the_host_waits_once_a_layer_and_not_after_the_end(monkeypatch):
    net, x = model(), torch.randn(1, 6, 3, 16, 20)
    waits = []
    real = torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda t: waits.append(tuple(t.shape)) or real(t))
    monkeypatch.setattr(torch.Tensor, "item", lambda t: pytest.fail("item"))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: pytest.fail("tolist"))
    with torch.no_grad():
        with accelerate(net, 3, 2, rule=AdaptiveRule(0.97, 0.9)) as handle:
            net(x)
        probed = len(waits)
        kinds = [step.plan.kind for step in handle._engine.last.steps.values()]  # a report fetches
        assert probed == kinds.index("frames") + 1 < len(kinds) and set(waits) == {()}
        waits.clear()
        with accelerate(net, 3, 2, rule=LayerRule(1, 2, probe=Probe())):
            net(x)
        assert not waits  # measured, not waited for


def test_the_published_rule_can_measure_without_changing_a_bit():
    net, x = model(), torch.randn(2, 6, 3, 16, 20)
    with torch.no_grad():
        with accelerate(net, 3, 2, rule=LayerRule(1, 2)) as handle:
            want, without = net(x), handle.report()
        with accelerate(net, 3, 2, rule=LayerRule(1, 2, probe=Probe(4, 12))) as handle:
            assert torch.equal(net(x), want)
        report = handle.report()
    assert all(r.entropy is None for r in without.layers) and all(0 < r.entropy <= 1 for r in report.layers)
    assert all(a.flops > b.flops for a, b in zip(report.layers, without.layers, strict=True))


def test_the_probe_projects_k_of_its_heads_alone():
    net, x = model(), torch.randn(1, 6, 3, 16, 20)
    seen = []
    net.aggregator.global_blocks[0].attn.k_norm.register_forward_hook(lambda _, a, __: seen.append(tuple(a[0].shape)))
    with torch.no_grad(), accelerate(net, 3, 2, rule=AdaptiveRule(1.0, 0.0, Probe(2, 8))):
        net(x)
    assert seen == [(1, 2, 138, 8), (1, 4, 27, 8)]  # probe, then the strided grid of three frames
