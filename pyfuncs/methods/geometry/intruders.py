"""Intruder dimensions (arXiv 2410.21228): leading directions of a fine-tuned matrix that the matrix before had not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...paths import Tensors, as_tensors
from .spectrum import clusters, gram_vectors
from .weights import matrices, read_pair, tall


@dataclass(frozen=True)
class Intruders:
    """One matrix's.

    indices: of the intruders among the leading left singular vectors of the matrix after, from 0.
    cosines: of each of those leading vectors, the largest |cos| to a left singular vector of the matrix before.
    """

    indices: tuple[int, ...]
    cosines: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.indices)


def intruder_dimensions(
    pre, post, *, eps: float = 0.5, top: int = 10, names: Iterable[str] | None = None, gap: float | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Intruders]:  # fmt: skip
    """Left singular vectors among the first ``top`` of each matrix of ``post`` whose largest |cos| with all those of
    ``pre`` is below ``eps``: the rule of HF PEFT's ``reduce_intruder_dimension``, for any method, not for LoRA only.

    Args:
        pre, post, names, device: as in ``weight_geometry``.
        gap: None compares with vectors one by one, as HF PEFT does.  A number compares with the subspaces of
            clusters (``geometry.clusters``): inside one the single vectors are arbitrary, and a direction spread
            over four of them looks like an intruder, |cos| = 0.5, without being one.

    Memory is that of ``weight_geometry``: two tensors, blocks, and (r, r) matrices in fp64.  ValueError as there.
    """
    if not 0 <= eps <= 1:
        raise ValueError(f"eps must lie in [0, 1]; got {eps}")
    if top < 1:
        raise ValueError(f"top must be at least 1; got {top}")
    before, after = as_tensors(pre), as_tensors(post)
    return {n: _one(n, before, after, eps, top, gap, device) for n in matrices(before, after, names)}


def _one(name: str, before: Tensors, after: Tensors, eps, top, gap, device) -> Intruders:
    a, b = read_pair(before, after, name)
    size, left_is_wide = min(a.shape), a.shape[0] >= a.shape[1]
    first, second, cross = (torch.zeros(size, size, dtype=torch.float64, device=device) for _ in range(3))
    for x, y in tall(a, b, device):
        first.addmm_(x.T, x)
        second.addmm_(y.T, y)
        cross.addmm_(x.T, y)
    del a, b
    if not bool(torch.isfinite(first.trace() + second.trace())):
        raise ValueError(f"{name} has values that are not finite")
    s, z = gram_vectors(first)
    t, w = gram_vectors(second)
    old, new = (int((v > 0).sum()) for v in (s, t))
    s, z, t, w = s[:old], z[:, :old], t[:new][:top], w[:, :new][:, :top]
    # a left vector of a tall matrix T is T z / s
    cosines = z.T @ cross @ w / s[:, None] / t if left_is_wide else z.T @ w
    if gap is not None and old:
        cluster = clusters(s, gap)
        sums = cosines.new_zeros(int(cluster[-1]) + 1, cosines.shape[1])
        cosines = sums.index_add_(0, cluster, cosines.square()).sqrt()
    best = cosines.abs().max(0).values if old else cosines.new_zeros(cosines.shape[1])
    return Intruders(tuple(torch.where(best < eps)[0].tolist()), tuple(best.tolist()))
