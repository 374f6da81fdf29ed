r"""How the tokens of a scene lie, and the strided grid of a frame (arXiv 2605.23892, section 3.3).

    scene   = frame 0, frame 1, ..., frame N-1, tail                    L = N P + tail tokens
    frame   = special tokens, patches row by row, trailing tokens       P = special + h w + trailing
    T_sigma = special tokens + {patch (y, x): y = p, p + sigma, ... < h, x = q, q + sigma, ... < w} + trailing tokens

Special and trailing tokens (camera, registers) are kept; ``tail`` are tokens of the whole scene, such as MapAnything's
scale token.  h and w come from the image: a grid is seldom square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: What becomes of the last row and column where sigma does not divide h or w.
EDGES = ("ceil", "floor")


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a scene are.

    ``frames`` (N): frames; ``height``, ``width`` (h, w): of a frame, in patches; ``special``: tokens before a frame's
    patches; ``trailing``: tokens after them; ``tail``: tokens after the last frame.  ValueError where one is negative,
    or ``frames``, ``height`` or ``width`` is not positive.
    """

    frames: int
    height: int
    width: int
    special: int = 0
    trailing: int = 0
    tail: int = 0

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("special", 0), ("trailing", 0), ("tail", 0)):
            check_count(name, getattr(self, name), least)

    @property
    def patches(self) -> int:
        """h w, of a frame."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """P, of a frame."""
        return self.special + self.patches + self.trailing

    @property
    def length(self) -> int:
        """L, of the scene."""
        return self.frames * self.tokens + self.tail


def check_count(name: str, value: int, least: int) -> None:
    """TypeError or ValueError unless ``value`` is a whole number, at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def check_grid(stride: int, phase: tuple[int, int], edge: str) -> None:
    """ValueError or TypeError where ``grid_tokens`` cannot be given these, whatever the layout."""
    check_count("stride", stride, 1)
    if not isinstance(phase, (tuple, list)) or len(phase) != 2:
        raise TypeError(f"phase must be a pair (row, column); got {phase!r}")
    for value in phase:
        check_count("phase", value, 0)
        if value >= stride:
            raise ValueError(f"phase must be below stride = {stride}; got {tuple(phase)}")
    if edge not in EDGES:
        raise ValueError(f"edge must be one of {', '.join(EDGES)}; got {edge!r}")


def _steps(size: int, stride: int, phase: int, edge: str) -> int:
    """Rows, or columns, of the grid."""
    if edge == "floor":
        return size // stride
    return max(-(-(size - phase) // stride), 0)


def grid_size(
    layout: Layout, stride: int, *, phase: tuple[int, int] = (0, 0), edge: str = "ceil", specials: bool = True
) -> int:
    """|T_sigma|, as ``grid_tokens`` has it."""
    check_grid(stride, phase, edge)
    kept = layout.special + layout.trailing if specials else 0
    rows, columns = (
        _steps(size, stride, offset, edge) for size, offset in zip((layout.height, layout.width), phase, strict=True)
    )
    return kept + rows * columns


def grid_tokens(
    layout: Layout, stride: int, *, phase: tuple[int, int] = (0, 0), edge: str = "ceil", specials: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:  # fmt: skip
    """T_sigma: which tokens of a frame are keys in the strided layers.

    Args:
        layout: of the scene.
        stride: sigma; the paper has 2 and 3.  1 keeps every patch.
        phase: (row, column) of the first patch, each below ``stride``.  The paper and its code have (0, 0).
        edge: "ceil", as the published code: every sigma-th row and column from ``phase`` on, which are
            ceil(h / sigma) ceil(w / sigma) patches at phase (0, 0).  "floor": whole cells of sigma x sigma patches
            only, floor(h / sigma) floor(w / sigma) of them.  (The paper writes floor(h / sigma x w / sigma), which is
            the size of no such grid.)
        specials: keep special and trailing tokens; the published command does (``ds_keep_register``).
        device: of the result.

    Returns: int64 (|T_sigma|,), strictly increasing, in [0, P).
    Source: arXiv 2605.23892, section 3.3, and its code.  ValueError, TypeError: an argument out of range.
    """
    check_grid(stride, phase, edge)
    rows, columns = (
        torch.arange(_steps(size, stride, offset, edge), device=device) * stride + offset
        for size, offset in zip((layout.height, layout.width), phase, strict=True)
    )
    patches = layout.special + (rows[:, None] * layout.width + columns).flatten()
    if not specials:
        return patches
    first = torch.arange(layout.special, device=device)
    last = torch.arange(layout.special + layout.patches, layout.tokens, device=device)
    return torch.cat([first, patches, last])


def head_phases(heads: int, stride: int, layout: Layout) -> list[tuple[int, int]]:
    """A phase for each of ``heads`` heads, in turn over all sigma^2, so that sigma^2 heads together see every patch.

    On a grid with fewer than sigma rows or columns only phases that hold a patch are used.  Ours, after RegimeVGGT's
    phase-shifted grid (arXiv 2606.18439); the paper's grid is the same for all heads.
    """
    check_count("heads", heads, 1)
    check_count("stride", stride, 1)
    rows, columns = min(stride, layout.height), min(stride, layout.width)
    return [divmod(head % (rows * columns), columns) for head in range(heads)]


def frame_rows(frames: Tensor, tokens: Tensor, pitch: int) -> Tensor:
    """Rows of the scene: frames int64 (..., K) and tokens int64 (T,) of each -> (..., K T), frame f's from f pitch on.

    Strictly increasing where both are.  ``pitch`` is P, or the tokens that are left of each frame.
    """
    return (frames[..., None] * pitch + tokens).flatten(-2)
