"""How far fine-tuning moved what modules compute on the same tokens: angles, Gram matrices, Procrustes, CKA, PCA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..frozen import evaluating
from .capture import Forward, choose_modules, find, forward, listening, rows, token_mask
from .moments import Moments, PairMoments, Sample
from .spectrum import nuclear_norm

#: Tokens that are in fp64 at a time.
CHUNK = 512


def activation_geometry(
    base: torch.nn.Module, tuned: torch.nn.Module, batches: Iterable[Mapping[str, Any]],
    modules: str | Iterable[str] = "paper8", *, subspaces: Iterable[int] = (32, 64), sample: int = 1024, seed: int = 0,
    widest: int = 8192, forward: Forward = forward,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Differences between two models' activations on the same tokens, after PEFT-Arena (arXiv 2605.28819).

    Args:
        base, tuned: the models; ``tuned`` may be a ``peft.PeftModel`` over another copy of the base.  Their dtypes and
            devices may differ.
        batches: mappings with ``input_ids`` and, where there is padding, a (B, T) ``attention_mask``.  Gone through
            once.
        modules: whose outputs; see ``choose_modules``.
        subspaces: k of ``subspace_dist_k``.
        sample: tokens that ``gram_cosine_dist`` is of at most, drawn with ``seed``; the same for every module.
        widest: a wider output is refused: its moments are three (d, d) in fp64.
        forward: forward(model, batch); by default ``model(**batch)`` without labels.

    Returns {module: metrics}.  X0, X1 (tokens, d) are a module's outputs in base and tuned; c: columns centred:

        mean_cosine_drift               mean of 1 - cos(x0, x1)
        angle_mean, angle_median        of the angle of x0 and x1 in radians; exact: one number a token is kept
        log_norm_ratio                  mean of |log(||x1|| / ||x0||)|, of tokens where neither is zero
        gram_cosine_dist                ||Z1 Z1^T - Z0 Z0^T||_F / ||Z0 Z0^T||_F, Z with rows of length 1, not centred
        raw_residual                    ||X1c - X0c||_F / ||X0c||_F
        proc_residual                   min over orthogonal R of ||X1c R - X0c||_F / ||X0c||_F
        linear_cka                      ||X0c^T X1c||_F^2 / (||X0c^T X0c||_F ||X1c^T X1c||_F)
        subspace_dist_k                 ||P0 - P1||_F / sqrt(2 k), P on the first k principal directions; left out where
                                        tokens or columns are too few
        shift                           ||mean x1 - mean x0|| / ||X0c||_F sqrt(tokens), which no centred metric sees
        tokens

    ``proc_residual`` is (||X0c||^2 + ||X1c||^2 - 2 ||X1c^T X0c||_*)^(1/2) / ||X0c||: the nuclear norm, so no R and no
    singular vectors.  The difference leaves about 1e-7 of rounding, so smaller residuals read as that.

    Memory beside the models: one batch's outputs of the chosen modules in base, and for each module three
    (d, d) in fp64, ``sample`` rows of both in fp32 and one fp64 a token.  Models are put into evaluation mode and get
    their own modes back; hooks are removed, after an error too.

    ValueError where the two models share a chosen module, a module is not called equally often in both or not for
    every token (experts), shapes differ, an output is too wide or not finite, or there are fewer than two tokens.
    """
    ks = tuple(subspaces)
    if sample < 1:
        raise ValueError(f"sample must be at least 1; got {sample}")
    if any(k < 1 for k in ks):
        raise ValueError(f"subspaces must be at least 1; got {min(ks)}")
    names = choose_modules(base, modules)
    ours, theirs = ({n: find(m, n) for n in names} for m in (base, tuned))
    shared = [n for n in names if set(ours[n].modules()) & set(theirs[n].modules())]
    if shared:
        raise ValueError(f"base and tuned share {shared[0]}: copy the base model before PEFT wraps it")
    found = {n: _Pair(n, widest, sample, seed) for n in names}
    with torch.no_grad(), evaluating(base), evaluating(tuned):
        for batch in batches:
            mask = token_mask(batch)
            for pair in found.values():
                pair.mask, pair.waiting = mask, []
            with listening(ours, lambda name, x: found[name].keep(x)):
                forward(base, batch)
            uncalled = [n for n, pair in found.items() if not pair.waiting]
            if uncalled:
                raise ValueError(f"{uncalled[0]}: not called in the forward pass")
            with listening(theirs, lambda name, x: found[name].meet(x)):
                forward(tuned, batch)
            left = [n for n, pair in found.items() if pair.waiting]
            if left:
                raise ValueError(f"{left[0]}: called less often in tuned than in base")
    return {name: pair.finish(ks) for name, pair in found.items()}


class _Pair:
    """One module's accumulators.  Its outputs in base wait for those in tuned, which are used as they come."""

    def __init__(self, name: str, widest: int, sample: int, seed: int):
        self.name, self.widest, self.drawn = name, widest, Sample(sample, seed)
        self.mask: torch.Tensor | None = None
        self.waiting: list[torch.Tensor] = []
        self.moments, self.moved = PairMoments(), Moments()
        self.angles: list[torch.Tensor] = []
        self.cosine = self.norms = 0.0
        self.sized = 0
        self.sample: torch.Tensor | None = None

    def keep(self, x: torch.Tensor) -> None:
        """An output in base: copied, since what follows may write over it."""
        width = x.shape[-1]
        if width > self.widest:
            need = 24 * width * width / 1e9
            raise ValueError(
                f"{self.name}: {width} columns need {need:.1f} GB of moments; leave it out or raise widest"
            )
        chosen = rows(self.name, x, self.mask)
        self.waiting.append(chosen.clone() if self.mask is None else chosen)

    def meet(self, x: torch.Tensor) -> None:
        """The same call's output in tuned."""
        if not self.waiting:
            raise ValueError(f"{self.name}: called more often in tuned than in base")
        x0, x1 = self.waiting.pop(0), rows(self.name, x, self.mask)
        if x0.shape != x1.shape:
            raise ValueError(f"{self.name}: outputs {tuple(x0.shape)} in base, {tuple(x1.shape)} in tuned")
        device = x0.device
        slots, tokens = self.drawn.update(len(x0))
        if self.sample is None:
            self.sample = torch.empty(2, 0, x0.shape[1], device=device)
        extra = int(slots.max()) + 1 - self.sample.shape[1] if len(slots) else 0
        if extra > 0:
            self.sample = torch.cat([self.sample, self.sample.new_empty(2, extra, x0.shape[1])], 1)
        for i, x in enumerate((x0, x1)):
            self.sample[i, slots.to(device)] = x[tokens.to(x.device)].to(device, torch.float32)
        for a, b in zip(x0.split(CHUNK), x1.split(CHUNK), strict=True):
            self._chunk(a.double(), b.to(device, torch.float64))

    def _chunk(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.moments.update(a, b)
        self.moved.update(b - a)
        sizes = [x.norm(dim=1) for x in (a, b)]
        u, v = (x / n.clamp_min(torch.finfo(n.dtype).tiny)[:, None] for x, n in zip((a, b), sizes, strict=True))
        # from |u - v| and |u + v|: arccos of a cosine near 1 has half the digits
        apart = (u - v).norm(dim=1)
        self.angles.append(2 * torch.atan2(apart, (u + v).norm(dim=1)))
        both = (sizes[0] > 0) & (sizes[1] > 0)
        one = (sizes[0] > 0) ^ (sizes[1] > 0)
        self.cosine += float((apart.square() / 2)[both].sum() + one.sum())
        self.norms += float((sizes[1][both] / sizes[0][both]).log().abs().sum())
        self.sized += int(both.sum())

    def finish(self, ks: tuple[int, ...]) -> dict[str, float]:
        m, count = self.moments, self.moments.count
        if count < 2 or m.means is None or self.sample is None:
            raise ValueError(f"{self.name}: {count} tokens; two are needed")
        before, after = float(m.s00.trace()), float(m.s11.trace())
        if not (before < float("inf") and after < float("inf")):
            raise ValueError(f"{self.name} has outputs that are not finite")
        angles = torch.cat(self.angles).sort().values
        out = {
            "tokens": count,
            "mean_cosine_drift": self.cosine / count,
            "angle_mean": float(angles.mean()),
            "angle_median": float((angles[(count - 1) // 2] + angles[count // 2]) / 2),
            "log_norm_ratio": self.norms / self.sized if self.sized else 0.0,
            "gram_cosine_dist": _gram(self.sample),
            "raw_residual": _over(self.moved.square, before) ** 0.5,
            "proc_residual": _over(max(0.0, before + after - 2 * nuclear_norm(m.s01)), before) ** 0.5,
            "linear_cka": _over(float(m.s01.square().sum()), float(m.s00.norm() * m.s11.norm())),
            "shift": _over(float((m.means[1] - m.means[0]).square().sum()) * count, before) ** 0.5,
        }
        ks = tuple(k for k in ks if k < min(count, len(m.s00)))
        if ks:
            first, second = (torch.linalg.eigh(s).eigenvectors.flip(1)[:, : max(ks)] for s in (m.s00, m.s11))
            for k in ks:
                p, q = first[:, :k], second[:, :k]
                # ||P0 - P1||_F^2 / 2 = sum of squared sines: no difference of numbers near 1
                out[f"subspace_dist_{k}"] = float((q - p @ (p.T @ q)).norm()) / k**0.5
        return out


def _gram(sample: torch.Tensor) -> float:
    z = sample.double()
    z = z / z.norm(dim=2, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    first, second = z[0] @ z[0].T, z[1] @ z[1].T
    return _over(float((second - first).norm()), float(first.norm()))


def _over(part: float, whole: float) -> float:
    """part / whole, with 0 / 0 = 0 and inf where only the whole is zero."""
    return part / whole if whole > 0 else float("inf") if part > 0 else 0.0
