r"""FLOPs of a visual geometry transformer by its number of frames (specs/tokens.md 5.1; forward, multiply-add = 2).

    attention      4 Nq Nk C a layer                   P = special + h w tokens a frame, N P in all
    dense global   4 (N P)^2 C                         x global layers
    LOCAL          4 N P P C                           x local
    STRIDE         4 N P (K |T_sigma|) C               x (sample - local)
    FRAMES         4 N P (K P) C                       x the rest
    frame layers   4 N P P C                           x frame and encoder layers
    linear layers  24 C^2 N P                          x all layers (qkv 6, proj 2, MLP 16, as multiples of C^2)

Seconds are the paper's (table 7: one L40S, VGGT, K = 25, sigma = 3), quoted and not reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass

from .grid import Layout, check_count, grid_size
from .report import align, attention_flops, in_units
from .rule import FRAMES, LOCAL, STRIDE, LayerRule

#: Table 7 of arXiv 2605.23892: end-to-end seconds on an NVIDIA L40S, VGGT, K = 25, sigma = 3.
PUBLISHED_FRAMES = (100, 200, 300, 400, 500)
PUBLISHED_SECONDS = {
    "VGGT": (13.6, 47.4, 101.3, 179.8, 288.0),
    "FastVGGT": (9.4, 23.1, 40.0, 59.5, 84.6),
    "SparseVGGT 50 %": (6.8, 18.3, 35.0, 56.2, 80.3),
    "SparseVGGT 75 %": (5.7, 14.0, 25.6, 39.5, 55.4),
    "LiteVGGT": (4.5, 10.1, 17.8, 26.0, 36.5),
    "Co-Me": (5.5, 16.4, 32.2, 53.3, 84.2),
    "GoToHunt": (7.8, 15.9, 23.8, 31.7, 41.2),
}


@dataclass(frozen=True)
class Shape:
    """``width`` (C); numbers of ``global_layers``, ``frame_layers`` and ``encoder_layers``; ``special`` tokens of a
    frame; ``patch``: pixels a side."""

    width: int = 1024
    global_layers: int = 24
    frame_layers: int = 24
    encoder_layers: int = 24
    special: int = 5
    patch: int = 14

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("global_layers", 1), ("frame_layers", 0), ("encoder_layers", 0),
                            ("special", 0), ("patch", 1)):  # fmt: skip
            check_count(name, getattr(self, name), least)


#: By name: encoder DINOv2-L in both.
SHAPES = {"vggt": Shape(), "pi3": Shape(global_layers=18, frame_layers=18)}


@dataclass(frozen=True)
class Cost:
    """FLOPs of one forward pass of ``frames`` frames, without the heads that decode the tokens.

    ``dense``: of all global attention; ``local``, ``stride``, ``selected``: of what replaces it (LOCAL, STRIDE and
    FRAMES layers); ``frame``: attention within frames, encoder included; ``linear``: of all linear layers.
    """

    frames: int
    dense: int
    local: int
    stride: int
    selected: int
    frame: int
    linear: int

    @property
    def done(self) -> int:
        """Of global attention with selection."""
        return self.local + self.stride + self.selected

    @property
    def attention_ratio(self) -> float:
        """Dense global attention over what replaces it."""
        return self.dense / self.done

    @property
    def ratio(self) -> float:
        """The whole network's FLOPs, dense over selected."""
        rest = self.frame + self.linear
        return (self.dense + rest) / (self.done + rest)


def cost(
    shape: Shape, frames: int, height: int, width: int, *, keep: int = 25, stride: int = 3,
    rule: LayerRule | None = None, edge: str = "ceil",
) -> Cost:  # fmt: skip
    """FLOPs for ``frames`` images of ``height`` x ``width`` pixels, with K = ``keep`` frames selected.

    ``rule``: by default the published one.  K and V of every row are projected, as in the published code; forming them
    for the selected rows alone (``accelerate``) saves 4 C^2 for each of the others.  ValueError: a size that is not a
    multiple of the patch, or an argument out of range.
    """
    rule = LayerRule() if rule is None else rule
    for name, pixels in (("height", height), ("width", width)):
        check_count(name, pixels, 1)
        if pixels % shape.patch:
            raise ValueError(f"{name} must be a multiple of the patch's {shape.patch} pixels; got {pixels}")
    check_count("frames", frames, 1)
    check_count("keep", keep, 1)
    layout = Layout(frames, height // shape.patch, width // shape.patch, shape.special)
    tokens, length = layout.tokens, layout.length
    state = rule.begin()
    kinds = [state.decide(layer, None) for layer in range(shape.global_layers)]
    chosen = min(keep, frames)
    keys = {LOCAL: tokens, STRIDE: chosen * grid_size(layout, stride, edge=edge), FRAMES: chosen * tokens}
    each = {kind: kinds.count(kind) * attention_flops(length, keys[kind], shape.width) for kind in keys}
    within = shape.frame_layers + shape.encoder_layers
    return Cost(
        frames, dense=shape.global_layers * attention_flops(length, length, shape.width), local=each[LOCAL],
        stride=each[STRIDE], selected=each[FRAMES], frame=within * attention_flops(length, tokens, shape.width),
        linear=24 * shape.width**2 * length * (shape.global_layers + within),
    )  # fmt: skip


def table(costs: list[Cost], seconds: bool) -> str:
    """A row for each number of frames; with ``seconds`` those of the paper beside it, where it has them."""
    head = ["frames", "dense global", "selected", "= local + stride + frames", "ratio", "linear", "frame attn",
            "whole net, dense", "selected", "ratio"]  # fmt: skip
    if seconds:
        head += ["published s", "GoToHunt s", "ratio"]
    lines = [head]
    for c in costs:
        rest = c.linear + c.frame
        line = [
            str(c.frames), in_units(c.dense), in_units(c.done),
            f"{_tera(c.local)} + {_tera(c.stride)} + {_tera(c.selected)} TF", f"{c.attention_ratio:.1f}x",
            in_units(c.linear), in_units(c.frame), in_units(c.dense + rest), in_units(c.done + rest), f"{c.ratio:.1f}x",
        ]  # fmt: skip
        if seconds:
            line += _quoted(c.frames)
        lines.append(line)
    return align(lines)


def quoted_table() -> str:
    """Table 7 of the paper: seconds by method."""
    lines = [["published seconds", *map(str, PUBLISHED_FRAMES)]]
    lines += [[name, *(f"{s:.1f}" for s in row)] for name, row in PUBLISHED_SECONDS.items()]
    ratios = zip(PUBLISHED_SECONDS["VGGT"], PUBLISHED_SECONDS["GoToHunt"], strict=True)
    return align([*lines, ["VGGT / GoToHunt", *(f"{dense / ours:.1f}x" for dense, ours in ratios)]], left=(0,))


def _quoted(frames: int) -> list[str]:
    if frames not in PUBLISHED_FRAMES:
        return ["", "", ""]
    at = PUBLISHED_FRAMES.index(frames)
    dense, ours = PUBLISHED_SECONDS["VGGT"][at], PUBLISHED_SECONDS["GoToHunt"][at]
    return [f"{dense:.1f}", f"{ours:.1f}", f"{dense / ours:.1f}x"]


def _tera(value: int) -> str:
    return f"{value / 1e12:.1f}"
