"""How far fine-tuning moved the queries and keys: relative drift, and the angles between what heads read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...paths import Selection, Selector, Tensors
from ...paths.blend import blocks, parts
from .pro import views


@dataclass(frozen=True)
class Drift:
    """One tensor's selected part.

    relative: ||post - pre||_F / ||pre||_F.
    elements: how many are selected; changed: how many of them differ, in post's dtype.
    bytes_changed: of those that differ.
    angle: largest principal angle, in degrees, between the inputs that a head reads before and after, the mean over
        heads; None where it was not asked for, or the part is not cut by heads.
    """

    name: str
    layer: int | None
    part: str
    relative: float
    elements: int
    changed: int
    bytes_changed: int
    angle: float | None = None


def drift(pre: Tensors, post: Tensors, selector: Selector, angles: bool = False) -> list[Drift]:
    """The drift of every selected tensor, two tensors in memory at a time; norms in fp64."""
    return [_one(pre, post, name, selection, angles) for name, selection in selector.items()]


def principal_angles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Angles, in radians and rising, between the row spaces of two (d_h, d) matrices of full row rank.  fp64.

    From sines as well as cosines, so that small angles keep their digits.
    """
    q1, q2 = (torch.linalg.qr(x.double().T).Q for x in (a, b))
    cosines = torch.linalg.svdvals(q1.T @ q2).clamp(0, 1)
    sines = torch.linalg.svdvals(q2 - q1 @ (q1.T @ q2)).clamp(0, 1).flip(0)
    return torch.where(cosines**2 < 0.5, torch.arccos(cosines), torch.arcsin(sines))


def _one(pre: Tensors, post: Tensors, name: str, selection: Selection, angles: bool) -> Drift:
    before, after = pre.tensor(name), post.tensor(name)
    moved = length = torch.zeros((), dtype=torch.float64)
    changed = 0
    for x, y in zip(parts(before, selection), parts(after, selection), strict=True):
        for a, b in blocks(x, y):
            changed += int((a.to(b.dtype) != b).sum())
            start = a.double()
            length = length + start.square().sum()
            moved = moved + start.sub_(b.double()).square_().sum()
    angle = None
    if angles and selection.heads and before.dim() == 2:
        pairs = zip(views(before, selection), views(after, selection), strict=True)
        angle = float(torch.stack([principal_angles(a, b)[-1] for a, b in pairs]).rad2deg().mean())
    relative = float((moved / length).sqrt()) if length > 0 else float("inf" if moved > 0 else 0)
    elements = selection.elements(before.shape)
    return Drift(
        name, selection.layer, selection.part, relative, elements, changed, changed * after.element_size(), angle
    )
