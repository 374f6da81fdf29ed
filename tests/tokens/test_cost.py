"""FLOPs of VGGT and pi3 by number of frames: specs/tokens.md 5.1, and the command that prints them."""

import pytest
import torch
from mini_models import MiniVGGT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from burnish.cli import main
from burnish.tokens import LayerRule
from burnish.tokens.cost import PUBLISHED_SECONDS, SHAPES, Shape, cost

# N: dense PF, (local, stride, frames) TF, attention ratio, linear TF, frame TF, whole-net ratio
TABLE = {
    100: (1.07, (0.9, 10, 166), 6, 189, 21, 3.3),
    200: (4.26, (1.8, 20, 333), 12, 377, 43, 6.0),
    300: (9.59, (2.7, 30, 499), 18, 566, 64, 8.8),
    500: (26.6, (4.4, 50, 832), 30, 943, 107, 14.3),
}


@pytest.mark.parametrize("frames", TABLE)
def test_the_table_of_the_specification(frames):
    dense, parts, ratio, linear, frame, whole = TABLE[frames]
    c = cost(SHAPES["vggt"], frames, 392, 518)
    assert c.dense / 1e15 == pytest.approx(dense, rel=5e-3)
    assert [x / 1e12 for x in (c.local, c.stride, c.selected)] == pytest.approx(parts, rel=2e-2)
    assert c.attention_ratio == pytest.approx(ratio, rel=1e-2)
    assert c.linear / 1e12 == pytest.approx(linear, rel=2e-3) and c.frame / 1e12 == pytest.approx(frame, rel=2e-2)
    assert round(c.ratio, 1) == whole
    assert c.selected / c.done > 0.93  # the FRAMES layers are what is left


def test_pi3_and_a_budget_of_all_frames():
    vggt, pi3 = (cost(SHAPES[name], 40, 392, 518, keep=60) for name in ("vggt", "pi3"))
    assert pi3.dense * 24 == vggt.dense * 18 and pi3.linear * 72 == vggt.linear * 60
    assert vggt.selected * 24 == vggt.dense * 15  # 15 layers see every key
    assert vggt.local * 40 * 24 == vggt.dense * 2


def test_as_torch_counts_them():
    """A mini VGGT: attention and linear layers, without the patch embedding."""
    net, x = MiniVGGT(depth=3, registers=2).eval(), torch.randn(1, 5, 3, 12, 20)
    # the counter knows no fused attention of the CPU
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x)
    flops = counter.get_flop_counts()["Global"]
    shape = Shape(width=32, global_layers=3, frame_layers=3, encoder_layers=0, special=3, patch=4)
    c = cost(shape, 5, 12, 20, rule=LayerRule(0, 0))
    assert sum(v for k, v in flops.items() if "bmm" in str(k)) == c.dense + c.frame
    # the minis' MLPs are twice as wide as tokens: 16 C^2 a token, not 24
    assert sum(v for k, v in flops.items() if str(k) in ("aten.addmm", "aten.mm")) == c.linear * 16 // 24


def lines(capfd, *arguments):
    assert main(["tokens", "cost", *map(str, arguments)]) == 0
    out, err = capfd.readouterr()
    assert not err
    return out.splitlines()


def test_the_command_prints_table_7(capfd):
    out = lines(capfd)
    assert out[0].startswith("vggt: 5 + 28 x 37 tokens a frame, 24 global layers of width 1024; K = 25, stride 3")
    last = next(line for line in out if line.split()[:1] == ["500"])
    assert " ".join(last.split()) == (
        "500 26.63 PF 887.1 TF 4.4 + 50.4 + 832.3 TF 30.0x 943.1 TF 106.5 TF 27.68 PF 1.94 PF 14.3x 288.0 41.2 7.0x"
    )
    assert any("quoted, not reproduced" in line for line in out)
    for name, seconds in PUBLISHED_SECONDS.items():
        row = next(line for line in out if line.startswith(f"{name} ") and "." in line)
        assert row.split()[-5:] == [f"{s:.1f}" for s in seconds]


def test_published_seconds_stand_beside_the_published_settings_alone(capfd):
    for options in (("--keep", 40), ("--model", "pi3"), ("--stride", 2), ("--channels", 768), ("--sample", 12)):
        assert not any("published" in line for line in lines(capfd, *options))
    small = lines(capfd, "--frames", "7,50", "--height", 28, "--width", 42, "--special", 1, "--patch", 14)
    assert small[0].startswith("vggt: 1 + 2 x 3 tokens a frame") and len(small) == 4


@pytest.mark.parametrize(
    "options, words",
    [
        (("--frames", "1,x"), "--frames must be whole numbers with commas between; got '1,x'"),
        (("--frames", "0"), "frames must be at least 1; got 0"),
        (("--height", "390"), "height must be a multiple of the patch's 14 pixels; got 390"),
        (("--local", "3", "--sample", "2"), "sample must be at least local = 3; got 2"),
        (("--stride", "0"), "stride must be at least 1; got 0"),
        (("--model", "dust3r"), "invalid choice: 'dust3r'"),
        (("--channels", "0"), "width must be at least 1; got 0"),
    ],
)
def test_bad_input_is_one_line(capfd, options, words):
    assert main(["tokens", "cost", *options]) == 2
    out, err = capfd.readouterr()
    assert not out and words in err and err.count("\n") == 1 and err.startswith("burnish: error: ")
