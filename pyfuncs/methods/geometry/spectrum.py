"""Singular values without a singular value decomposition: Lanczos for the largest, the smaller Gram matrix for all.

Gram matrices are formed and solved in fp64.  Singular values s_i of an (m, n) matrix come as the roots of the
eigenvalues of its (r, r) Gram matrix, r = min(m, n), with an error of about eps (s_1 / s_i) s_1: for weights of
fp32 and bf16 that is below the weights' own rounding down to s_i = 1e-8 s_1.  What lies below ``floor`` is not
determined by such a matrix and counts as zero.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ...paths.blend import working

EPS = torch.finfo(torch.float64).eps


def floor(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Below it an eigenvalue of an (r, r) Gram matrix is rounding: r eps times the largest."""
    largest = eigenvalues.max().clamp_min(0) if eigenvalues.numel() else eigenvalues.new_zeros(())
    return largest * eigenvalues.numel() * EPS


def gram_values(gram: torch.Tensor) -> torch.Tensor:
    """(r,) singular values, falling, of a matrix M with this (r, r) Gram matrix M^T M; zero below ``floor``."""
    values = torch.linalg.eigvalsh(gram).flip(0)
    return values.where(values > floor(values), 0).sqrt()


def gram_vectors(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values (r,), vectors (r, r)): singular values of M, falling, and in columns the singular vectors on the side of
    this Gram matrix M^T M.  Values below ``floor`` are zero, and their vectors some basis of the rest."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.flip(0)
    return values.where(values > floor(values), 0).sqrt(), vectors.flip(1)


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """(min(m, n),) singular values in fp64, falling, to about eps s_1: the Gram matrix, refined.

    Each level solves the Gram matrix of what is left, takes the values of its upper five decades as the lengths
    ||M v||, and goes on with M times the other vectors, cleared of the directions just found: a matrix whose Gram
    matrix has a scale of its own.
    """
    rest = matrix.double()
    if rest.shape[0] < rest.shape[1]:
        rest = rest.T
    done: list[torch.Tensor] = []
    while rest.shape[1]:
        vectors = torch.linalg.eigh(rest.T @ rest).eigenvectors
        rest = rest @ vectors.flip(1)
        lengths = rest.norm(dim=0)
        small = lengths <= 1e-5 * lengths.max()
        done.append(lengths[~small])
        if not lengths.max() > 0:
            done[-1] = lengths
            break
        found = rest[:, ~small] / lengths[~small]
        rest = rest[:, small]
        rest = rest - found @ (found.T @ rest)
    return torch.cat(done).sort(descending=True).values if done else rest.new_zeros(0)


def nuclear_norm(matrix: torch.Tensor) -> float:
    """||M||_*, the sum of ``singular_values``."""
    return float(singular_values(matrix).sum())


def smaller_gram(matrix: torch.Tensor) -> torch.Tensor:
    """(r, r) in fp64: M^T M, or M M^T where M is wider than tall."""
    x = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    out = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for rows in x.split(max(1, (1 << 19) // max(1, x.shape[1]))):
        wide = rows.double()
        out.addmm_(wide.T, wide)
    return out


def spectral_norm(matrix: torch.Tensor, *, tol: float = 1e-6, steps: int = 200, seed: int = 0) -> float:
    """||M||_2 of an (m, n) matrix by Golub-Kahan-Lanczos, in fp64 for fp64 and otherwise in fp32.

    Stops where the residual of the leading singular pair is below tol times the value; the value's own error is of the
    residual's square over the gap to the next one, at most the residual.  Every vector is orthogonalised against all
    before it: steps (m + n) numbers are held beside the matrix.  Where it has not converged after ``steps`` the exact
    value is computed from the smaller Gram matrix instead.
    """
    if matrix.dim() != 2:
        raise ValueError(f"matrix: two dimensions are needed; got {tuple(matrix.shape)}")
    if matrix.numel() == 0:
        return 0.0
    matrix = matrix.to(working(matrix.dtype))
    steps = min(steps, *matrix.shape)
    tol = max(tol, 32 * torch.finfo(matrix.dtype).eps)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64).to(matrix)
    left, right = (matrix.new_empty(steps, n) for n in matrix.shape)
    right[0] = v / v.norm()
    band = torch.zeros(steps, steps, dtype=torch.float64)
    for k in range(steps):
        u, band[k, k] = _against(matrix @ right[k], left[:k])
        if band[k, k] == 0:
            # the start lies in a subspace that M maps onto `left`: what is found so far is all there is
            return float(torch.linalg.matrix_norm(band[: k + 1, : k + 1], 2))
        left[k] = u
        w, beta = _against(matrix.T @ u, right[: k + 1])
        p, values, _ = torch.linalg.svd(band[: k + 1, : k + 1])  # at most (steps, steps)
        if beta * p[k, 0].abs() <= tol * values[0]:
            return float(values[0])
        if k + 1 < steps:
            band[k, k + 1] = beta
            right[k + 1] = w
    return float(gram_values(smaller_gram(matrix))[0])


def _against(x: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(x made orthogonal to the rows of the basis, of length 1; its length before), length 0 where nothing but rounding
    is left."""
    size = float(x.norm())
    for _ in range(2):
        x = x - basis.T @ (basis @ x)
    length = float(x.norm())
    if length <= 8 * torch.finfo(x.dtype).eps * size or length == 0:
        return torch.zeros_like(x), 0.0
    return x / length, length


def fluctuation(profile: torch.Tensor, window: int = 5) -> float:
    """mean |x - moving average of x|, the ends continued by reflection: PEFT-Arena's roughness of a profile.

    0 for a profile too short to be reflected (window // 2 values or fewer).  ValueError for a window that is not odd.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and positive; got {window}")
    half = window // 2
    if profile.numel() <= half:
        return 0.0
    x = profile.double()
    padded = pad(x[None, None], (half, half), mode="reflect")[0, 0]
    return float((x - padded.unfold(0, window, 1).mean(1)).abs().mean())


def clusters(values: torch.Tensor, gap: float) -> torch.Tensor:
    """(r,) int64, the cluster of each of the falling ``values``: a new one begins where the fall to the next value
    is more than ``gap`` times the larger.  Inside a cluster the singular vectors are one subspace; single vectors of it
    mean little."""
    falls = values[:-1] - values[1:] > gap * values[:-1]
    return torch.cat([values.new_zeros(1), falls.to(values.dtype)]).cumsum(0).long()[: values.numel()]
