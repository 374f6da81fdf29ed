"""The torch twin of the block rotation; the contract is in ``rotation``.

Batched products over blocks, a share of the rows at a time where x must be cast up: a share's copies take
``BLOCK_BYTES`` each, and the order of the shares is a function of the shapes alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rotation import check, check_backward

#: Bytes of a share of x in the accumulator's dtype.
BLOCK_BYTES = 8 << 20


def _shares(x: Tensor, delta: Tensor):
    step = max(1, BLOCK_BYTES // max(1, x.shape[1] * delta.element_size()))
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))


def _blocked(x: Tensor, delta: Tensor) -> Tensor:
    """(blocks, rows, b) in delta's dtype."""
    return x.to(delta.dtype).unflatten(1, (-1, delta.shape[1])).transpose(0, 1)


def forward(x: Tensor, delta: Tensor) -> Tensor:
    """y (N, d) in x's dtype; see the contract."""
    check(x, delta)
    return _rotate(x, delta)


def _rotate(x: Tensor, delta: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows in _shares(x, delta):
        cut = _blocked(x[rows], delta)
        turned = torch.baddbmm(cut, cut, delta.expand(len(cut), -1, -1))
        out[rows].unflatten(1, (-1, delta.shape[1])).copy_(turned.transpose(0, 1))
    return out


def backward(x: Tensor, delta: Tensor, dy: Tensor, *, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """dx in x's dtype and dR in delta's, None where not wanted; see the contract."""
    check_backward(x, delta, dy)
    dx = _rotate(dy, delta.mT) if wanted[0] else None
    if not wanted[1]:
        return dx, None
    b = delta.shape[1]
    dr = torch.zeros(x.shape[1] // b, b, b, dtype=delta.dtype, device=x.device)
    for rows in _shares(x, delta):
        dr.baddbmm_(_blocked(x[rows], delta).mT, _blocked(dy[rows], delta))
    return dx, dr if len(delta) == len(dr) else dr.sum(0, keepdim=True)
