"""Problems for the block rotation, and what the reference makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from burnish.kernels.launch import accumulator
from burnish.kernels.rotation import make_delta
from burnish.reference.block_rotation import block_rotation as reference

#: N, blocks, b: one row, odd sizes, several blocks a tile, a ragged last tile, one block in several tiles.
SHAPES = [(1, 1, 2), (5, 3, 6), (67, 5, 20), (33, 9, 16), (40, 2, 32), (19, 2, 37)]
EDGES = [(0, 3, 6), (1, 2, 16)]


@dataclass
class Problem:
    x: Tensor
    generator: Tensor
    dy: Tensor

    def delta(self, terms: int | None = 5, correction: bool = False) -> Tensor:
        return make_delta(self.generator, terms, correction, accumulator(self.x.dtype))

    def to(self, dtype: torch.dtype, generator: torch.dtype | None = None) -> Problem:
        return replace(
            self, x=self.x.to(dtype), dy=self.dy.to(dtype), generator=self.generator.to(generator or accumulator(dtype))
        )


def problem(shape, *, shared: bool = False, size: float = 0.1, seed: int = 0, device="cpu") -> Problem:
    """In fp64; generators of ``size`` an entry."""
    n, blocks, b = shape
    g = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(device)

    return Problem(rand(n, blocks * b), size * rand(1 if shared else blocks, b * (b - 1) // 2), rand(n, blocks * b))


def expected(p: Problem, **options) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and the generator's gradient by autograd through the definition, in the problem's own dtypes."""
    x, generator = p.x.detach().requires_grad_(), p.generator.detach().requires_grad_()
    y = reference(x, generator.to(x.dtype), **options)
    if not y.requires_grad:
        return y, torch.zeros_like(x), torch.zeros_like(generator)
    grads = torch.autograd.grad(y, (x, generator), p.dy, allow_unused=True)
    return y.detach(), *(torch.zeros_like(z) if g is None else g for z, g in zip((x, generator), grads, strict=True))


def expected_dr(p: Problem) -> Tensor:
    """dR of every block, or of the one that serves all."""
    delta = p.delta()
    b = delta.shape[1]
    x, dy = (z.view(len(z), z.shape[1] // b, b) for z in (p.x, p.dy))
    dr = torch.einsum("nri,nrj->rij", x, dy).to(delta.dtype)
    return dr if len(delta) == len(dr) else dr.sum(0, keepdim=True)
