"""The other models: pi3's names on a mini, UniCeption's and Depth-Anything-3's published trunks."""

import pytest
import torch
from mini_models import MiniPi3, Rotary2D, sharpen
from oracle import mask, masked
from real_models import da3, da3_tokens, tokens, uniception, views

from burnish.tokens import AdaptiveRule, LayerRule, Layout, accelerate

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
RULE = LayerRule(1, 2)


def every_row(context):
    return torch.arange(context.layout.frames * context.layout.tokens, dtype=torch.int32)


def masks_of(layout, chosen, kinds, stride=2, **options):
    return [torch.stack([mask(layout, kind, one, stride, **options) for one in chosen])[:, None] for kind in kinds]


class TestPi3:
    layout = Layout(7, 4, 3, 3)

    def net(self):
        return sharpen(MiniPi3()).eval()

    @pytest.mark.parametrize("options", [{}, {"own_frame": True}])
    def test_is_the_masked_model(self, options):
        net, x = self.net(), torch.randn(2, 7, 3, 16, 12)
        with torch.no_grad():
            with accelerate(net, 3, 2, rule=RULE, **options) as handle:
                got = net(x)
            report = handle.report()
            assert handle.family == "pi3" and [r.name for r in report.layers] == [f"decoder.{i}" for i in (1, 3, 5, 7)]
            kinds = ("local", "stride", "frames", "frames")
            assert tuple(r.kind for r in report.layers) == kinds
            with masked(net.decoder[1::2], masks_of(self.layout, report.frames, kinds, own=bool(options))):
                torch.testing.assert_close(got, net(x), **CLOSE)

    def test_every_key_kept_is_the_dense_model(self):
        net, x = self.net(), torch.randn(2, 7, 3, 16, 12)
        with torch.no_grad():
            dense = net(x)
            with accelerate(net, 7, 1, rule=LayerRule(0, 0)):
                assert torch.equal(net(x), dense)
            with accelerate(net, rule=LayerRule(0, 0), strategy=every_row):
                torch.testing.assert_close(net(x), dense, **CLOSE)
            assert torch.equal(net(x), dense) and "decode" not in vars(net)

    def test_moves_with_the_frames_if_the_seed_does(self):
        """Fact 3: no frame is special to pi3; only the seed is to the selection."""
        net, x, order = self.net(), torch.randn(1, 7, 3, 16, 12), torch.tensor([4, 2, 6, 0, 5, 1, 3])
        with torch.no_grad():
            with accelerate(net, 3, 2, rule=RULE, start=0) as handle:
                want = net(x)[:, order]
                frames = handle.report().frames[0]
            with accelerate(net, 3, 2, rule=RULE, start=order.tolist().index(0)) as handle:
                got = net(x[:, order])
                moved = handle.report().frames[0]
            assert sorted(order[list(moved)].tolist()) == list(frames)
            torch.testing.assert_close(got, want, **CLOSE)
            elsewhere = next(k for k in range(7) if order[k].item() not in frames)
            with accelerate(net, 3, 2, rule=RULE, start=elsewhere):
                assert (net(x[:, order]) - want).abs().max() > 1e-2

    def test_descriptors_by_a_function_of_the_images(self):
        net, x = self.net(), torch.randn(2, 7, 3, 16, 12)
        seen = []

        def describe(images):
            seen.append(images)
            return images.flatten(2)

        with torch.no_grad(), accelerate(net, 3, 2, rule=RULE, descriptors=describe):
            net(x)
            assert len(seen) == 1 and seen[0] is x and "forward" in vars(net)
        assert "forward" not in vars(net)

    def test_bf16_keeps_its_place_of_the_cast(self):
        """pi3 casts q and k before it rotates them: to the bit what its own code does, over all keys."""
        net, x = self.net(), torch.randn(1, 7, 3, 16, 12)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            dense = net(x)
            with accelerate(net, rule=LayerRule(0, 0), strategy=every_row):
                got = net(x)
        assert (got - dense).abs().max() <= 0.02 * dense.abs().max()


class TestUniCeption:
    """Global layers first, extras after a view's patches, a scale token at the very end."""

    kinds = ("local", "stride", "frames")

    def net(self, **options):
        net, make = uniception(**options)
        return sharpen(net), make

    def run(self, options, given, model_options, height=4, width=6):
        net, make = self.net(**model_options)
        x = views(make, **given, height=height, width=width)
        net.double()  # a temperature of log N makes much of rounding
        x.features = [f.double() for f in x.features]
        if x.additional_input_tokens is not None:
            x.additional_input_tokens = x.additional_input_tokens.double()
        if x.additional_input_tokens_per_view is not None:
            x.additional_input_tokens_per_view = [e.double() for e in x.additional_input_tokens_per_view]
        layout = Layout(
            len(x.features), height, width, trailing=given.get("extras", 2), tail=given.get("tail", 1)
        )
        with torch.no_grad():
            with accelerate(net, 3, 2, rule=RULE, **options) as handle:
                got = tokens(net(x))
            report = handle.report()
            assert handle.family == "uniception" and [r.kind for r in report.layers] == list(self.kinds)
            assert [r.name for r in report.layers] == [f"self_attention_blocks.{i}" for i in (0, 2, 4)]
            more = {"own": options.get("own_frame", False), "tail": options.get("tail", "dense")}
            masks = masks_of(layout, report.frames, self.kinds, **more)
            blocks = list(net.self_attention_blocks)[::2]
            with masked(blocks, masks, rope="custom_positional_encoding"):
                torch.testing.assert_close(got, tokens(net(x)), **CLOSE)
        return report, layout

    @pytest.mark.parametrize("given", [{"batch": 2}, {"extras": 0}, {"tail": 0}, {"tail": 3, "batch": 2}])
    @pytest.mark.parametrize("options", [{}, {"tail": "selected"}, {"own_frame": True}])
    def test_is_the_masked_model(self, given, options):
        report, layout = self.run(options, given, {"qk_norm": True})
        t = layout.tail
        assert report.layers[1].keys == pytest.approx(
            3 * (6 + layout.trailing) + t + (2 / 5 * (6 + layout.trailing) if options.get("own_frame") else 0)
        )
        rows = report.layers[1].rows
        if options.get("own_frame"):
            assert rows == (layout.length if t else 5 * (6 + layout.trailing))
        else:
            assert rows == (layout.length if t and options.get("tail") != "selected" else 3 * (6 + layout.trailing) + t)

    @pytest.mark.parametrize(
        "model_options",
        [{"use_scalable_softmax": True}, {"use_entropy_scaling": True}, {"qkv_bias": False}, {"init_values": None}],
    )
    def test_options_of_the_model(self, model_options):
        """A temperature that depends on the number of tokens stays that of the dense model."""
        self.run({}, {"batch": 2}, model_options, height=3, width=7)

    def test_custom_positions(self):
        self.run({}, {"extras": 0, "tail": 0, "batch": 2}, {"custom_positional_encoding": Rotary2D()})

    @pytest.mark.parametrize("strategy", ["nearest", "diverse_self", "heads"])
    @pytest.mark.parametrize("given", [{"batch": 2}, {"extras": 0, "tail": 0}])
    def test_lists_beside_a_tail(self, strategy, given):
        from burnish.tokens import grid_tokens, head_phases, nearest_sets, pooled, seeded_sets

        net, make = self.net()
        x = views(make, **given)
        n, batch = 5, given.get("batch", 1)
        layout = Layout(n, 4, 6, trailing=given.get("extras", 2), tail=given.get("tail", 1))
        with torch.no_grad():
            with accelerate(net, 3, 2, rule=RULE, strategy=strategy) as handle:
                got = tokens(net(x))
            if strategy == "heads":
                chosen = handle.report().frames
                added = torch.full((batch, 4, layout.length, layout.length), -torch.inf)
                for b in range(batch):
                    for head, phase in enumerate(head_phases(4, 2, layout)):
                        for f in chosen[b]:
                            added[b, head, :, f * layout.tokens + grid_tokens(layout, 2, phase=phase)] = 0
                end = n * layout.tokens
                added[..., end:] = 0
                added[:, :, end:] = 0
                masks = masks_of(layout, chosen, self.kinds)
                masks[1] = added
            else:
                described = torch.stack([pooled(f.flatten(2).mT) for f in x.features], 1)
                sets = {"nearest": nearest_sets, "diverse_self": seeded_sets}[strategy](described, 3).tolist()
                masks = masks_of(layout, sets, self.kinds)
            with masked(list(net.self_attention_blocks)[::2], masks):
                torch.testing.assert_close(got, tokens(net(x)), **CLOSE)

    @pytest.mark.parametrize("unfused", [False, True])
    def test_every_key_kept_is_the_dense_model(self, unfused):
        net, make = self.net(qk_norm=True)
        for block in net.self_attention_blocks:
            block.attn.fused_attn = not unfused
        x = views(make, batch=2)
        with torch.no_grad():
            dense = tokens(net(x))
            with accelerate(net, 5, 1, rule=LayerRule(0, 1)) as handle:
                assert torch.equal(tokens(net(x)), dense)
                assert [r.kind for r in handle.report().layers] == ["dense"] * 3
            with accelerate(net, rule=LayerRule(0, 1), strategy=every_row) as handle:
                torch.testing.assert_close(tokens(net(x)), dense, **CLOSE)
                assert [r.kind for r in handle.report().layers] == ["stride", "frames", "frames"]
            assert torch.equal(tokens(net(x)), dense)

    def test_one_view(self):
        net, make = self.net()
        x = views(make, batch=2, frames=1)
        with torch.no_grad():
            dense = tokens(net(x))
            with accelerate(net, 3, 2, rule=RULE):
                assert torch.equal(tokens(net(x)), dense)

    def test_intermediate_features(self):
        net, make = uniception("MultiViewAlternatingAttentionTransformerIFR", indices=[1, 3])
        x = views(make)
        with torch.no_grad():
            dense = net(x)
            with accelerate(net, 3, 2, rule=RULE) as handle:
                got = net(x)
            assert [r.kind for r in handle.report().layers] == list(self.kinds)
            assert not torch.equal(tokens(got[0]), tokens(dense[0])) and len(got[1]) == 2
            assert torch.equal(tokens(net(x)[0]), tokens(dense[0]))

    def test_its_global_sibling_is_another_model(self):
        module = pytest.importorskip("uniception.models.info_sharing.global_attention_transformer")
        shape = {"input_embed_dim": 32, "depth": 2, "dim": 64, "num_heads": 4}
        net = module.MultiViewGlobalAttentionTransformer(name="t", **shape)
        with pytest.raises(ValueError, match="model must hold the trunk"):
            accelerate(net)


class TestDepthAnything3:
    """Odd blocks from alt_start on; the trunk moves its reference view to the front first."""

    kinds = ("local", "stride", "frames")  # blocks 3, 5 and 7

    def net(self, **options):
        return sharpen(da3(**options))

    @pytest.mark.parametrize("batch, size", [(1, (56, 56)), (2, (42, 70))])
    @pytest.mark.parametrize("strategy", ["saddle_balanced", "first"])
    def test_is_the_masked_model(self, batch, size, strategy):
        net, x = self.net(), torch.randn(batch, 6, 3, *size)
        layout = Layout(6, size[0] // 14, size[1] // 14, 1)
        with torch.no_grad():
            with accelerate(net, 3, 2, rule=RULE) as handle:
                got = da3_tokens(net, x, ref_view_strategy=strategy)
            report, scene = handle.report(), handle._engine.last
            assert handle.family == "da3" and [r.name for r in report.layers] == ["blocks.3", "blocks.5", "blocks.7"]
            assert [r.kind for r in report.layers] == list(self.kinds)
            # the seed is the reference view, which is the first of the sequence, wherever it was
            assert scene.chosen[:, 0].tolist() == [0] * batch
            assert all(scene.order[b, 0].item() in report.frames[b] for b in range(batch))
            with masked([net.blocks[i] for i in (3, 5, 7)], masks_of(layout, scene.chosen.tolist(), self.kinds)):
                torch.testing.assert_close(got, da3_tokens(net, x, ref_view_strategy=strategy), **CLOSE)

    def test_given_descriptors_follow_the_reordering(self):
        """Frames as given, selected as they stand in the sequence."""
        from burnish.ops.farthest_frames import farthest_frames

        net, x, given = self.net(), torch.randn(3, 6, 3, 56, 56), torch.randn(3, 6, 5)
        with torch.no_grad(), accelerate(net, 3, 2, rule=RULE, descriptors=given) as handle:
            da3_tokens(net, x, ref_view_strategy="middle")
            order = handle._engine.last.order
            assert order.tolist() == [[3, 0, 1, 2, 4, 5]] * 3
            assert handle.report().frames == tuple(tuple(farthest_frames(g, 3, start=3).tolist()) for g in given)
            # two equal images: either may be called the other
            x[:, 3] = x[:, 1]
            da3_tokens(net, x, ref_view_strategy="middle")
            assert sorted(handle._engine.last.order[0].tolist()) == list(range(6))

    def test_every_key_kept_is_the_dense_model(self):
        net, x = self.net(), torch.randn(2, 6, 3, 42, 70)
        with torch.no_grad():
            dense = da3_tokens(net, x)
            with accelerate(net, 6, 1, rule=LayerRule(0, 1)) as handle:
                assert torch.equal(da3_tokens(net, x), dense)
                assert [r.kind for r in handle.report().layers] == ["dense"] * 3
            with accelerate(net, rule=LayerRule(0, 1), strategy=every_row):
                torch.testing.assert_close(da3_tokens(net, x), dense, **CLOSE)
            assert torch.equal(da3_tokens(net, x), dense)
            assert not {"process_attention", "get_intermediate_layers", "forward"} & set(vars(net))

    @pytest.mark.parametrize("frames", [1, 2])
    def test_few_views_are_not_reordered(self, frames):
        net, x = self.net(), torch.randn(2, frames, 3, 56, 56)
        with torch.no_grad():
            dense = da3_tokens(net, x)
            with accelerate(net, 1, 2, rule=RULE) as handle:
                got = da3_tokens(net, x)
            scene = handle._engine.last
            assert scene.order.tolist() == [list(range(frames))] * 2
            assert torch.equal(got, dense) == (frames == 1)

    def test_gradients_flow(self):
        net, x = self.net(), torch.randn(1, 5, 3, 56, 56).requires_grad_()
        with accelerate(net, 2, 2, rule=RULE) as handle:
            da3_tokens(net, x).square().sum().backward()
            got = [p.grad.clone() for p in net.blocks.parameters()]
        net.zero_grad()
        masks = masks_of(Layout(5, 4, 4, 1), handle._engine.last.chosen.tolist(), self.kinds)
        with masked([net.blocks[i] for i in (3, 5, 7)], masks):
            da3_tokens(net, x).square().sum().backward()
        for one, p in zip(got, net.blocks.parameters(), strict=True):
            torch.testing.assert_close(one, p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()))

    def test_a_mask_of_the_callers_is_refused(self):
        net, x = self.net(), torch.randn(1, 4, 3, 56, 56)
        wrong = pytest.raises(ValueError, match="attn_mask must be None on an accelerated model; got Tensor")
        with torch.no_grad(), accelerate(net, 2, 2, rule=RULE), wrong:
            da3_tokens(net, x, attn_mask=torch.ones(1, 68, 68, dtype=torch.bool))

    def test_adaptive(self):
        net, x = self.net(), torch.randn(1, 4, 3, 56, 56)
        with torch.no_grad(), accelerate(net, 2, 2, rule=AdaptiveRule(1.0, 1.0)) as handle:
            da3_tokens(net, x)
            assert all(0 < r.entropy < 1 for r in handle.report().layers[:1])
