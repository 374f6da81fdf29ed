"""Second moments of activations, token chunk by token chunk, in fp64.

Centred moments are merged as Chan, Golub and LeVeque do: each chunk is centred on its own mean, and the two means'
difference is added.  Sums of raw products would lose mean^2 / variance of their digits.
"""

from __future__ import annotations

import torch


class Moments:
    """Of the columns of one (tokens, d) stream.

    Attributes: ``count``; ``mean`` (d,); ``square``, the sum over tokens of the squared distance to the mean.
    """

    def __init__(self) -> None:
        self.count, self.square = 0, 0.0
        self.mean: torch.Tensor | None = None

    def update(self, x: torch.Tensor) -> None:
        """Add a chunk, (n, d) in fp64."""
        if not len(x):
            return
        mean = x.mean(0)
        self.square += float((x - mean).square().sum())
        if self.mean is None:
            self.mean = torch.zeros_like(mean)
        count, step = self.count + len(x), mean - self.mean
        self.square += float(step.square().sum()) * self.count * len(x) / count
        self.mean = self.mean + step * (len(x) / count)
        self.count = count


class PairMoments:
    """Centred second moments of two streams of the same tokens, X0 and X1, (tokens, d) each.

    Attributes: ``count``; ``means`` (2, d); ``s00``, ``s11``, ``s01`` (d, d), X0c^T X0c and so on.  Memory: three
    (d, d) in fp64.
    """

    def __init__(self) -> None:
        self.count = 0
        self.means: torch.Tensor | None = None

    def update(self, x0: torch.Tensor, x1: torch.Tensor) -> None:
        """Add a chunk of both, (n, d) in fp64."""
        if not len(x0):
            return
        means = torch.stack([x0.mean(0), x1.mean(0)])
        if self.means is None:
            self.means = torch.zeros_like(means)
            self.s00, self.s11, self.s01 = (x0.new_zeros(x0.shape[1], x0.shape[1]) for _ in range(3))
        count, step = self.count + len(x0), means - self.means
        a, b = x0 - means[0], x1 - means[1]
        weight = self.count * len(x0) / count
        for total, left, right, i, j in ((self.s00, a, a, 0, 0), (self.s11, b, b, 1, 1), (self.s01, a, b, 0, 1)):
            total.addmm_(left.T, right).addr_(step[i], step[j], alpha=weight)
        self.means = self.means + step * (len(x0) / count)
        self.count = count


class RawMoments:
    """``second`` (d, d), the sum over tokens of h h^T, not centred, and ``count``: what E ||A h||^2 = tr(A M A^T) of
    any matrix A needs, M = second / count."""

    def __init__(self) -> None:
        self.count = 0
        self.second: torch.Tensor | None = None

    def update(self, h: torch.Tensor) -> None:
        """Add a chunk, (n, d) in fp64."""
        if self.second is None:
            self.second = h.new_zeros(h.shape[1], h.shape[1])
        self.second.addmm_(h.T, h)
        self.count += len(h)


class Sample:
    """At most ``size`` tokens of a stream, each as likely as another and without repeats, whatever the batches.

    Every token draws a number and the ``size`` lowest stay.  ``update(n)`` says which of the next n tokens come in
    and into which slots; buffers of any number of modules follow it.
    """

    def __init__(self, size: int, seed: int):
        self.size = size
        self.keys = torch.empty(0, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(slots, tokens), int64 of one length: token ``tokens[i]`` of these ``count`` belongs in slot ``slots[i]``."""
        held = len(self.keys)
        keys = torch.cat([self.keys, torch.rand(count, generator=self._generator, dtype=torch.float64)])
        kept = keys.topk(min(self.size, len(keys)), largest=False).indices.sort().values
        old, new = kept[kept < held], kept[kept >= held]
        free = torch.ones(len(kept), dtype=torch.bool)
        free[old] = False
        slots = torch.where(free)[0]
        self.keys = torch.cat([self.keys, keys.new_empty(len(kept) - held)])
        self.keys[slots] = keys[new]
        return slots, new - held
