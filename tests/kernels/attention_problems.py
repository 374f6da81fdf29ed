"""Problems for gathered-key attention: operands in normal form, and what the reference makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.kernels.attention import Saved
from burnish.kernels.launch import accumulator
from burnish.reference import attention as reference


@dataclass
class Shape:
    """B, Hq, Hkv, frames, queries a frame, keys, head dimension, entries a list, lists by batch and by head."""

    b: int
    heads: int
    key_heads: int
    frames: int
    queries: int
    keys: int
    d: int
    m: int
    list_b: int = 1
    list_h: int = 1

    def __str__(self) -> str:
        return "-".join(str(x) for x in vars(self).values())


SHAPES = [
    Shape(1, 1, 1, 1, 1, 1, 1, 1),
    Shape(2, 4, 2, 3, 5, 23, 8, 9),
    Shape(2, 4, 2, 3, 17, 71, 12, 40, 2, 2),  # more than one tile of keys, lists by batch and by key head
    Shape(1, 4, 2, 2, 7, 23, 16, 9, 1, 4),  # a list to a query head
    Shape(1, 4, 1, 5, 3, 37, 20, 23, 1, 4),
    Shape(2, 2, 2, 1, 35, 17, 16, 17, 2, 1),  # one list, of every key
    Shape(1, 2, 2, 4, 33, 13, 37, 61),  # keys listed again and again
    Shape(1, 2, 1, 2, 5, 9, 128, 7),
]
EDGES = [
    Shape(1, 2, 2, 3, 0, 5, 8, 4),  # no query
    Shape(1, 2, 2, 3, 4, 5, 8, 0),  # no entry
    Shape(0, 2, 2, 3, 4, 5, 8, 4),
]


@dataclass
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    lists: Tensor
    counts: Tensor
    bias: Tensor | None
    scale: float
    upstream: tuple[Tensor, Tensor, Tensor]

    @property
    def operands(self) -> tuple:
        return self.q, self.k, self.v, self.lists, self.counts, self.bias, self.scale

    def to(self, dtype: torch.dtype) -> Problem:
        """Operands rounded to a dtype; upstream gradients of lse and entropy in the accumulator's."""
        d_out, *rest = self.upstream
        return Problem(
            *(x.to(dtype) for x in (self.q, self.k, self.v)), self.lists, self.counts,
            None if self.bias is None else self.bias.to(accumulator(dtype)), self.scale,
            (d_out.to(dtype), *(x.to(accumulator(dtype)) for x in rest)),
        )  # fmt: skip


def problem(s: Shape, *, bias: bool = False, holes: bool = True, seed: int = 0, device="cpu") -> Problem:
    """In fp64.  Lists without order, each row once where there are enough; an empty one, a full one, -1 in between."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device)

    length, shape = s.frames * s.queries, (s.list_b, s.frames, s.list_h)
    n = s.list_b * s.frames * s.list_h
    if s.m <= s.keys:
        lists = [torch.randperm(s.keys, generator=g)[: s.m] for _ in range(n)]
    else:
        lists = [torch.randint(0, s.keys, (s.m,), generator=g) for _ in range(n)]
    lists = torch.stack(lists).view(*shape, s.m).to(torch.int32)
    counts = torch.randint(0, s.m + 1, shape, generator=g).to(torch.int32)
    counts.view(-1)[-1] = s.m
    if n > 2:
        counts.view(-1)[0] = 0
    if holes and s.m > 4:
        lists[..., 2] = -1
    b = None
    if bias:
        b = rand(s.b, s.key_heads, s.keys)
        b[..., ::7] = -torch.inf
    q, k, v = rand(s.b, s.heads, length, s.d), rand(s.b, s.key_heads, s.keys, s.d), rand(s.b, s.key_heads, s.keys, s.d)
    up = rand(*q.shape), rand(*q.shape[:3]), rand(*q.shape[:3])
    return Problem(q, k, v, lists.to(device), counts.to(device), b, 1.3 * s.d**-0.5, up)


def expected(p: Problem) -> tuple[tuple, tuple]:
    """(out, lse, entropy) and (dq, dk, dv, dbias) of the reference, in the problem's dtype."""
    leaves = [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v)]
    bias = None if p.bias is None else p.bias.detach().clone().requires_grad_()
    out, lse, entropy = reference.selected_attention(*leaves, p.lists, p.counts, bias, p.scale)
    d_out, d_lse, d_entropy = p.upstream
    loss = (out * d_out).sum() + (torch.where(lse > -torch.inf, lse, 0) * d_lse).sum() + (entropy * d_entropy).sum()
    grads = torch.autograd.grad(loss, [*leaves, *([] if bias is None else [bias])], allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, [*leaves, bias], strict=False)]
    return (out.detach(), lse.detach(), entropy.detach()), (*grads, *([None] if bias is None else []))


def run(kernels, p: Problem, *, entropy=True, lse_grad=True) -> tuple[tuple, tuple]:
    got = kernels.forward(*p.operands, entropy=entropy)
    d_out, d_lse, d_entropy = p.upstream
    saved = Saved(*got, d_out, d_lse if lse_grad else None, d_entropy if entropy else None)
    return tuple(got), kernels.backward(*p.operands, saved)
