"""What the block rotation means: a skew matrix a block, HF PEFT's rotation of it, a product."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotation(generator: Tensor, *, terms: int | None = 5, correction: bool = False) -> Tensor:
    """R of each block, (blocks, b, b), differentiable by autograd: power by power, as HF PEFT sums it."""
    b = (1 + math.isqrt(1 + 8 * generator.shape[1])) // 2
    rows, columns = torch.triu_indices(b, b, 1)
    q = generator.new_zeros(len(generator), b, b)
    q[:, rows, columns] = generator
    q = q - q.mT
    one = torch.eye(b, dtype=q.dtype, device=q.device).expand_as(q)
    if terms is None:
        r = (one - q) @ torch.linalg.inv(one + q)
    else:
        # 3 terms are what 4 are
        last = 0 if terms < 2 else 1 if terms == 2 else max(terms, 4) - 1
        r, power = one, one
        for k in range(1, last + 1):
            power = power @ q
            r = r + (2 if k < last or last == 1 else 1) * power
    return r @ (3 * one - r.mT @ r) / 2 if correction else r


def block_rotation(x: Tensor, generator: Tensor, *, terms: int | None = 5, correction: bool = False) -> Tensor:
    """x (..., d) with each block of b features times its R; one row of the generator serves all blocks."""
    r = rotation(generator, terms=terms, correction=correction)
    cut = x.unflatten(-1, (-1, r.shape[-1]))
    return torch.einsum("...rk,rkc->...rc", cut, r.expand(cut.shape[-2], -1, -1)).flatten(-2)
