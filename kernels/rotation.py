r"""The contract of the block rotation, the input side of orthogonal fine-tuning.

    x            (N, d)                d = blocks * b, unit stride along d; fp32, bf16, fp16 or fp64
    generator    (blocks, b(b-1)/2)    the entries above the diagonal of skew matrices Q, row by row, as HF PEFT packs
                                       them; one row serves all blocks
    delta        (blocks, b, b)        R(Q) - I in the accumulator's dtype

With the row x_r, of b features, of block r:

    y_r = x_r R_r = x_r + x_r delta_r         dx_r = dy_r R_r^T          dR_r = sum over rows of x_r^T dy_r

R is held as its distance from I: a small rotation keeps its digits beside x of any dtype, where R itself, rounded to
bf16, has a diagonal of ones and loses what it turns by.  x is rounded never, y once.

R is what HF PEFT makes of Q.  Its two forms turn in opposite directions:

    terms = n      I + 2Q + ... + 2Q^(n-2) + Q^(n-1), near (I + Q)(I - Q)^-1; 3 terms are what 4 are, 2 are I + 2Q
    terms = 5      (I + Q)^2 (I + Q^2): two products
    terms = None   (I - Q)(I + Q)^-1, exactly orthogonal

``correction`` is one step of Newton-Schulz towards the nearest orthogonal matrix, R <- R (3I - R^T R) / 2:
singular values 1 - e become 1 - 3 e^2 / 2.

Backward makes R again rather than keep it.  Then dQ is dR through the polynomial, and the gradient of a packed entry is
(dQ - dQ^T) above the diagonal, since Q has the entry twice, once negated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .launch import accumulator


def block_size(entries: int) -> int:
    """b of b(b-1)/2 packed entries; 0 where no b has so many."""
    b = (1 + math.isqrt(1 + 8 * entries)) // 2
    return b if b > 1 and b * (b - 1) // 2 == entries else 0


def skew(generator: Tensor, b: int, dtype: torch.dtype) -> Tensor:
    """Q, (blocks, b, b) in ``dtype``."""
    rows, columns = torch.triu_indices(b, b, 1, device=generator.device)
    upper = torch.zeros(len(generator), b * b, dtype=dtype, device=generator.device)
    upper = upper.index_copy_(1, rows * b + columns, generator.to(dtype)).view(-1, b, b)
    return upper - upper.mT


def degree(terms: int) -> int:
    """Of HF PEFT's polynomial: its loop leaves 3 terms what 4 are."""
    return 0 if terms < 2 else 1 if terms == 2 else max(terms, 4) - 1


def make_delta(generator: Tensor, terms: int | None, correction: bool, dtype: torch.dtype) -> Tensor:
    """R - I of each block, without the cancellation of R - I."""
    q = skew(generator, block_size(generator.shape[1]), dtype)
    delta = _delta(q, terms)
    return _corrected(delta) if correction else delta


def _delta(q: Tensor, terms: int | None) -> Tensor:
    if terms is None:
        return torch.linalg.solve(q + _one(q), q).mul(-2).contiguous()  # a solve's result is stored by columns
    if terms == 5:
        square = q @ q
        return torch.baddbmm(2 * (q + square), 2 * q + square, square)
    n = degree(terms)
    return 2 * q if n == 1 else q @ _horner(q, n)[0] if n else torch.zeros_like(q)


def _horner(q: Tensor, n: int) -> list[Tensor]:
    """H_1 to H_n = I with H_k = 2I + Q H_(k+1): the polynomial of degree n, but for its I, is Q H_1."""
    found = [_one(q)]
    while len(found) < n:
        found.insert(0, torch.baddbmm(2 * _one(q), q, found[0]))
    return found


def _one(q: Tensor) -> Tensor:
    return torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)


def _excess(delta: Tensor) -> Tensor:
    """R^T R - I."""
    return torch.baddbmm(delta + delta.mT, delta.mT, delta)


def _corrected(delta: Tensor) -> Tensor:
    # R (3I - R^T R) / 2 = R - R E / 2
    excess = _excess(delta)
    return delta - torch.baddbmm(excess, delta, excess).div_(2)


def generator_gradient(generator: Tensor, d_rotation: Tensor, terms: int | None, correction: bool) -> Tensor:
    """dL/dgenerator in the dtype of dR, (blocks, b, b) or (1, b, b) as the generator."""
    b, g = d_rotation.shape[-1], d_rotation
    q = skew(generator, b, g.dtype)
    if correction:
        g = _through_correction(_delta(q, terms), g)
    d = _odd(q, g, terms)
    rows, columns = torch.triu_indices(b, b, 1, device=d.device)
    return d.flatten(1).index_select(1, rows * b + columns)


def _through_correction(delta: Tensor, g: Tensor) -> Tensor:
    # of R - R E / 2: G - (G E + R (R^T G + G^T R)) / 2
    inner = g + delta.mT @ g
    inner = inner + inner.mT
    return g - torch.baddbmm(g @ _excess(delta) + inner, delta, inner).div_(2)


def _odd(q: Tensor, g: Tensor, terms: int | None) -> Tensor:
    """dQ - dQ^T of dR = g."""
    if terms is None:  # R = 2 (I + Q)^-1 - I
        inverse = _one(q) - q  # (I + Q)^T
        d = torch.linalg.solve(inverse, torch.linalg.solve(inverse, g), left=False).mul_(-2)
    elif terms == 5:  # B = I + 2Q + Q^2, C = I + Q^2, R = B C
        square = q @ q
        d_b = torch.baddbmm(g, g, square)
        d_c = torch.baddbmm(g, square - 2 * q, g)  # B^T g
        even = d_b + d_c
        even = even + even.mT
        # of Q^2 only the even part of its gradient counts: S Q + Q S, which is S Q - (S Q)^T
        d = torch.baddbmm(2 * d_b, even, q, alpha=-1)
    else:
        n, d, down = degree(terms), torch.zeros_like(q), g
        for h in _horner(q, n)[:n] if n > 1 else ():
            d, down = torch.baddbmm(d, down, h.mT), q.mT @ down
        d = 2 * g if n == 1 else d
    return d - d.mT


def check(x: Tensor, delta: Tensor) -> None:
    """What must hold for a launch to stay within its operands.  ValueError or TypeError naming the operand."""
    if x.ndim != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(f"x must be (N, d) with unit stride along d; got {tuple(x.shape)}, strides {x.stride()}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating; got {x.dtype}")
    if delta.ndim != 3 or delta.shape[1] != delta.shape[2] or delta.shape[1] < 1 or not delta.is_contiguous():
        raise ValueError(f"delta must be (blocks, b, b), contiguous; got {tuple(delta.shape)}")
    blocks, b = delta.shape[:2]
    if x.shape[1] != blocks * b and (blocks != 1 or x.shape[1] % b):
        raise ValueError(f"x must be of {blocks} blocks of {b}; got {tuple(x.shape)}")
    wanted = accumulator(x.dtype)
    if delta.dtype != wanted:
        raise TypeError(f"delta must be {wanted} beside x of {x.dtype}; got {delta.dtype}")
    if delta.device != x.device:
        raise ValueError(f"delta must be on {x.device}, as x is; got {delta.device}")


def check_backward(x: Tensor, delta: Tensor, dy: Tensor) -> None:
    """The same of the backward pass's own operand."""
    check(x, delta)
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device or (dy.shape[1] > 1 and dy.stride(1) != 1):
        raise ValueError(
            f"dy must be {tuple(x.shape)} of {x.dtype} on {x.device} with unit stride along d; got {tuple(dy.shape)} "
            f"of {dy.dtype} on {dy.device}, strides {dy.stride()}"
        )
