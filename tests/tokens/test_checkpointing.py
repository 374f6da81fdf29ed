"""Layers that are run again in backward do what they did in forward, whichever scene is under way."""

import gc

import pytest
import torch
from mini_models import MiniVGGT, sharpen
from real_models import tokens, uniception, views
from torch.utils.checkpoint import checkpoint

from burnish.tokens import AdaptiveRule, LayerRule, accelerate

RULE = LayerRule(1, 3)


def model(**options):
    return sharpen(MiniVGGT(**options)).train()


def gradients(net, losses):
    net.zero_grad()
    for loss in losses:
        loss.backward()
    return [p.grad.clone() for p in net.parameters()]


def close(got, want):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"strategy": "nearest"}, {"rule": AdaptiveRule(0.9, 0.85)}])
def test_recomputed_layers_do_what_they_did(reentrant, options):
    net = model(use_reentrant=reentrant)
    x = torch.randn(2, 6, 3, 8, 12).requires_grad_()
    with accelerate(net, 2, 2, **{"rule": RULE, **options}) as handle:
        got = gradients(net, [net(x).square().sum()])
        kinds = [r.kind for r in handle.report().layers]
        net.aggregator.checkpointing = False
        close(got, gradients(net, [net(x).square().sum()]))
        assert [r.kind for r in handle.report().layers] == kinds
    dense = gradients(net, [net(x).square().sum()])
    assert any((a - b).abs().max() > 1e-2 * b.abs().max() for a, b in zip(got, dense, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_nothing_is_decided_twice(reentrant):
    """A strategy that draws its lists, and a rule with a state, are asked once a layer."""
    net, drawn = model(use_reentrant=reentrant), []
    x = torch.randn(1, 6, 3, 8, 12).requires_grad_()

    def draw(context):
        drawn.append(torch.randint(0, 6 * 9, (6, 1, 20), dtype=torch.int32))
        return drawn[-1], 20

    with accelerate(net, rule=AdaptiveRule(1.0, 1.0), strategy=draw):
        got = gradients(net, [net(x).square().sum()])
    assert len(drawn) == 4
    lists = iter(list(drawn))
    net.aggregator.checkpointing = False
    with accelerate(net, rule=AdaptiveRule(1.0, 1.0), strategy=lambda _: (next(lists), 20)):
        close(got, gradients(net, [net(x).square().sum()]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), "sum"])
def test_two_scenes_in_flight(reentrant, order):
    """Each recomputation finds its own scene: other frames are selected in each."""
    net = model(use_reentrant=reentrant)
    xs = [torch.randn(1, 8, 3, 8, 12).requires_grad_() for _ in range(2)]
    with accelerate(net, 2, 2, rule=RULE) as handle:
        losses = []
        sets = []
        for x in xs:
            losses.append(net(x).square().sum())
            sets.append(handle.report().frames)
        assert sets[0] != sets[1]
        got = gradients(net, [sum(losses)] if order == "sum" else [losses[i] for i in order])
        net.aggregator.checkpointing = False
        close(got, gradients(net, [net(x).square().sum() for x in xs]))


def test_two_scenes_of_two_sizes_in_flight():
    net = model()
    xs = [torch.randn(1, n, 3, 8, 12) for n in (5, 8)]
    with accelerate(net, 2, 2, rule=RULE):
        got = gradients(net, [net(x).square().sum() for x in xs])
        net.aggregator.checkpointing = False
        close(got, gradients(net, [net(x).square().sum() for x in xs]))


def test_attention_alone_and_the_whole_trunk():
    """Other cuts of what is run again."""
    net, x = model(), torch.randn(1, 6, 3, 8, 12).requires_grad_()
    net.aggregator.checkpointing = False
    with accelerate(net, 2, 2, rule=RULE):
        want = gradients(net, [net(x).square().sum()])
        close(gradients(net, [checkpoint(net, x, use_reentrant=False).square().sum()]), want)
        inner = {}
        for block in net.aggregator.global_blocks:
            inner[block] = block.attn.forward
            attn = block.attn

            def again(u, *args, attn=attn, patched=block.attn.forward, **kwargs):
                return checkpoint(patched, u, *args, use_reentrant=False, **kwargs)

            vars(attn)["forward"] = again
        other = torch.randn(1, 6, 3, 8, 12)
        loss = net(x).square().sum()
        with torch.no_grad():
            net(other)
        close(gradients(net, [loss]), want)
        for block, forward in inner.items():
            vars(block.attn)["forward"] = forward


def test_torchs_wrapper_around_blocks():
    """What FSDP's examples wrap blocks in: names are looked up through it."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net, x = model(), torch.randn(1, 6, 3, 8, 12).requires_grad_()
    net.aggregator.checkpointing = False
    with accelerate(net, 2, 2, rule=RULE):
        want = gradients(net, [net(x).square().sum()])
    for i, block in enumerate(net.aggregator.global_blocks):
        net.aggregator.global_blocks[i] = checkpoint_wrapper(block)
    with accelerate(net, 2, 2, rule=RULE) as handle:
        close(gradients(net, [net(x).square().sum()]), want)
        assert [r.kind for r in handle.report().layers] == ["local", "stride", "stride", "frames"]


def test_tensors_kept_elsewhere_in_between():
    """Offloading moves what a block was given: with one scene in flight that is no matter; with two it is said."""
    net, x = model(), torch.randn(1, 6, 3, 8, 12).requires_grad_()

    class Away(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self):
            super().__init__(lambda t: t.clone(), lambda t: t.clone())

    with accelerate(net, 2, 2, rule=RULE):
        want = gradients(net, [net(x).square().sum()])
        for _ in range(2):
            with Away():
                loss = net(x).square().sum()
            close(gradients(net, [loss]), want)


def test_nothing_is_kept_of_scenes_that_are_over():
    net, x = model(), torch.randn(1, 6, 3, 8, 12)
    with accelerate(net, 2, 2, rule=RULE) as handle:
        recall = handle._engine.recall
        for _ in range(3):
            net(x).square().sum().backward()
        gc.collect()
        net(x).square().sum().backward()
        gc.collect()
        recall._prune()
        assert not recall.entries
        net.eval()
        with torch.no_grad():
            net(x)
        last = handle._engine.last
        assert not recall.entries and not last._plans and all(s.plan.project is None for s in last.steps.values())


@pytest.mark.parametrize("train", [True, False])
def test_uniceptions_wrapper(train):
    """Its blocks are of a class that checkpoints itself, in evaluation too."""
    net, make = uniception(gradient_checkpointing=True)
    plain, _ = uniception()
    plain.load_state_dict(net.state_dict())
    net.train(train), plain.train(train)
    given = views(make, batch=2)
    results = []
    for one in (net, plain):
        sharpen(one)
        with accelerate(one, 2, 2, rule=LayerRule(1, 2)) as handle:
            results.append(gradients(one, [tokens(one(given)).square().sum()]))
            assert [r.kind for r in handle.report().layers] == ["local", "stride", "frames"]
    close(*results)
