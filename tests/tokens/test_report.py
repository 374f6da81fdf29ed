"""What report() says, counted again."""

import pytest
import torch
from mini_models import MiniVGGT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from burnish.tokens import LayerRule, Layout, accelerate
from burnish.tokens.lists import Plan
from burnish.tokens.report import layer_flops
from burnish.tokens.scene import Step


@pytest.mark.parametrize("options", [{}, {"own_frame": True}, {"strategy": "nearest"}, {"strategy": "heads"}])
def test_flops_by_hand(options):
    net, x = MiniVGGT().eval(), torch.randn(2, 6, 3, 16, 20)  # P = 3 + 20, C = 32
    with torch.no_grad(), accelerate(net, 2, 2, rule=LayerRule(1, 2), **options) as handle:
        net(x)
    report = handle.report()
    n, p, c = 6, 23, 32
    dense = 4 * (n * p) ** 2 * c + 4 * n * p * c * c
    strided, own = 2 * (3 + 6), 3 + 6
    keys = {"stride": strided, "frames": 2 * p}
    rows = {"stride": strided, "frames": 2 * p}
    if "own_frame" in options:
        keys, rows = {"stride": strided + own, "frames": 3 * p}, {"stride": n * own, "frames": n * p}
    elif options.get("strategy") == "nearest":
        rows = {"stride": n * own, "frames": n * p}
    elif options.get("strategy") == "heads":
        keys["stride"], rows["stride"] = 2 * (3 + 5), 2 * p
    want = [4 * n * p * p * c + 4 * n * p * c * c]
    want += [4 * n * p * keys[k] * c + 4 * rows[k] * c * c for k in ("stride", "frames", "frames")]
    assert [r.flops for r in report.layers] == [2 * w for w in want]
    assert all(r.dense_flops == 2 * dense and r.all_keys == n * p for r in report.layers)
    assert report.flops == 2 * sum(want) and report.saved == pytest.approx(1 - sum(want) / (4 * dense))


def test_flops_as_torch_counts_them():
    """The difference between dense and accelerated, by FlopCounterMode."""
    net, x = MiniVGGT().eval(), torch.randn(1, 6, 3, 16, 20)
    totals = []
    with torch.no_grad():
        for fast in (False, True):
            handle = accelerate(net, 2, 2, rule=LayerRule(1, 2)) if fast else None
            # the counter knows no fused attention of the CPU
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                net(x)
            totals.append(counter.get_total_flops())
    report = handle.report()
    distances = 2 * 6 * 6 * 32  # between descriptors, once a scene
    assert totals[0] - totals[1] + distances == report.dense_flops - report.flops


def test_flops_of_a_tail_a_probe_and_a_wrapped_projection():
    """Two tail tokens; C = 8 into 3 heads of 4."""
    layout = Layout(5, 2, 3, tail=2)
    length, c, inner = 32, 8, 12
    dense = 4 * length**2 * inner + 4 * length * c * inner
    for rows in (length, 14):  # tail "dense", "selected": its queries see what is projected
        done = 4 * (30 * 14 + 2 * rows) * inner + 4 * rows * c * inner
        step = Step(Plan("stride", keys=14), 3, c, inner, True, keys=14, computed=14, rows=rows)
        assert layer_flops(step, layout) == (done, dense)
        step.sampled = (2, 5)  # heads, queries
        probe = 2 * (length + 5) * c * 8 + 2 * 5 * length * 8
        assert layer_flops(step, layout) == (done + probe, dense)
        step.plain, step.sampled = False, (0, 0)
        extra = 0 if rows == length else 2 * rows * c * inner + 2 * length * c * 2 * inner
        assert layer_flops(step, layout) == (done + extra, dense)
    assert layer_flops(Step(Plan("dense"), 3, c, inner, True), layout) == (dense, dense)


def test_the_table():
    net, x = MiniVGGT().eval(), torch.randn(2, 6, 3, 16, 20)
    with torch.no_grad(), accelerate(net, 2, 2, rule=LayerRule(1, 2)) as handle:
        net(x)
    report = handle.report()
    lines = str(report).splitlines()
    assert lines[0] == "2 x 6 frames of 23 tokens (3 + 4 x 5 + 0), 0 more"
    assert " ".join(lines[1].split()) == "layer module did H_norm top-1 keys of K/V rows FLOP dense saved"
    assert lines[3].split()[:6] == ["1", "global_blocks.1", "stride", "18", "138", "18"]
    assert lines[6].split()[0] == "all" and lines[6].split()[-1] == f"{report.saved:.1%}"
    assert lines[-2] == f"frames of scene 0: {', '.join(map(str, report.frames[0]))}"
