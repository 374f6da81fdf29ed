"""What the row-kernel tests share: problems, a run of either backend, and the reference by definition."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch

from burnish.kernels import rows_torch
from burnish.kernels.contract import DIFFERENTIABLE, MASKED, RowSpec, coefficients, finalize, new_state
from burnish.reference.row_stats import row_stats, transform

BASE = frozenset({"lse", "label", "logp"})
#: What the kernels themselves compute; top_entropy is formed from torch.topk by the ops.
FOLDED = tuple(s for s in (*DIFFERENTIABLE, "hit", "teacher_lse", "teacher_logp", "teacher_entropy") if s != "ids")


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def spec_of(*stats: str, **options) -> RowSpec:
    options = {"alpha": 0.7, "eta": 0.3, "beta": 0.3, **options}
    return RowSpec(BASE | frozenset(stats), **options)


def problem(n=5, v=37, *, seed=0, dtype=torch.float64, device="cpu", spread=3.0, k=3) -> SimpleNamespace:
    """Logits, teacher, labels, ids (with -1 and duplicates) and an upstream gradient for every statistic."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    ids = torch.randint(0, max(v, 1), (n, k), generator=g)
    if n and k > 2:
        ids[:, 1] = ids[:, 0]
        ids[0, 2] = -1
    upstream = {name: rand(n) for name in DIFFERENTIABLE if name != "ids"}
    upstream["ids"] = rand(n, k).masked_fill(ids < 0, float("nan"))  # must not be read at -1
    out = SimpleNamespace(
        tile=(rand(n, v) * spread).to(dtype), teacher=(rand(n, v) * spread).to(dtype),
        target=torch.randint(0, max(v, 1), (n,), generator=g), ids=ids, upstream=upstream,
        inv_temp=0.5 + torch.rand(n, generator=g, dtype=torch.float64),
        teacher_inv_temp=0.5 + torch.rand(n, generator=g, dtype=torch.float64),
    )  # fmt: skip

    def move(x):
        return {key: move(y) for key, y in x.items()} if isinstance(x, dict) else x.to(device)

    return SimpleNamespace(**{key: move(value) for key, value in vars(out).items()})


def _cuts(columns: int, slabs) -> list[tuple[int, int]]:
    widths = [columns] if slabs is None else list(slabs)
    assert sum(widths) == columns
    return list(itertools.pairwise(itertools.accumulate(widths, initial=0)))


def _temps(p, spec, dtype):
    return {
        "inv_temp": p.inv_temp.to(dtype) if spec.temperature else None,
        "teacher_inv_temp": p.teacher_inv_temp.to(dtype) if spec.teacher_temperature else None,
    }


def fold(kernels, p, spec: RowSpec, *, slabs=None) -> dict[str, torch.Tensor]:
    """Statistics of a problem, folded slab by slab."""
    dtype = accumulator(p.tile.dtype)
    cuts, temps = _cuts(p.tile.shape[1], slabs), _temps(p, spec, dtype)
    state = new_state(p.tile.shape[0], dtype, p.tile.device)
    for s, e in cuts:
        kernels.fold(p.tile[:, s:e], p.teacher[:, s:e], state, p.target, spec, start=s, **temps)
    if spec.has("jsd"):
        for s, e in cuts:
            kernels.fold_jsd(p.tile[:, s:e], p.teacher[:, s:e], state, spec, **temps)
    stats = finalize(state, spec)
    if spec.has("ids"):
        stats["ids"] = rows_torch.gather_ids(p.tile, p.ids, spec, inv_temp=temps["inv_temp"], dtype=dtype)
    return stats


def grad(kernels, p, spec: RowSpec, stats, *, slabs=None, in_place=False, wide=None) -> torch.Tensor:
    """d (sum of upstream * statistic) / d tile, slab by slab; ``wide`` is a buffer to write into."""
    dtype = accumulator(p.tile.dtype)
    temps = _temps(p, spec, dtype)
    upstream = {k: p.upstream[k].to(dtype) for k in DIFFERENTIABLE if spec.has(k)}
    ids_grad = upstream.pop("ids", None)
    coef = coefficients(stats, upstream, spec)
    kept = coef.clone()
    tile = p.tile.clone() if in_place else p.tile
    out = tile if in_place else (torch.full_like(p.tile, float("nan")) if wide is None else wide)
    for s, e in _cuts(p.tile.shape[1], slabs):
        kernels.grad(
            tile[:, s:e], p.teacher[:, s:e], out[:, s:e], coef, p.target, spec, start=s,
            ids=p.ids if ids_grad is not None else None, ids_grad=ids_grad, **temps,
        )  # fmt: skip
    assert torch.equal(coef.nan_to_num(), kept.nan_to_num()), "coefficients were written"
    return out


def expected(p, spec: RowSpec, dtype=torch.float64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same by definition and torch's autograd, computed in ``dtype``; the gradient is of ``tile``."""
    raw = p.tile.detach().to(dtype, copy=True).requires_grad_()
    one = torch.ones_like(p.inv_temp)
    z = transform(
        raw, scale=spec.scale, softcap=spec.softcap or None,
        temperature=1 / (p.inv_temp if spec.temperature else one).to(dtype),
    )  # fmt: skip
    t = transform(
        p.teacher.to(dtype), scale=spec.teacher_scale, softcap=spec.teacher_softcap or None,
        temperature=1 / (p.teacher_inv_temp if spec.teacher_temperature else one).to(dtype),
    )  # fmt: skip
    stats = row_stats(
        z, p.target, teacher=t if spec.uses_teacher else None, alpha=spec.alpha, eta=spec.eta, beta=spec.beta,
        ids=p.ids if spec.has("ids") else None,
    )  # fmt: skip
    loss = sum(
        torch.where(p.upstream[k].isnan(), 0.0, stats[k] * p.upstream[k].to(dtype)).sum()
        for k in DIFFERENTIABLE if spec.has(k)
    )  # fmt: skip
    (g,) = torch.autograd.grad(loss, raw)
    stats = {k: v.detach() for k, v in stats.items()}
    if spec.has("ids"):  # as for a masked label
        masked = z.detach().gather(1, p.ids.clamp(min=0)) == float("-inf")
        stats["ids"] = stats["ids"].masked_fill(masked & (p.ids >= 0), MASKED)
    return stats, g


def check(name: str, got, want, plain=None, *, k=4.0):
    """got against fp64 ``want``; prints its error and the tolerance.

    fp64: 1e-12 relative to max(1, |want|).  Otherwise k times the error of ``plain`` (plain torch, in the same
    accumulator and output dtype), and a floor: one unit of an entry's own rounding in the output dtype, and 8
    units of fp32 at the scale of the tensor (an entry near 0 is a sum of terms that are not).
    """
    dtype = got.dtype
    got, want = got.double().cpu(), want.double().cpu()
    assert got.shape == want.shape, (name, got.shape, want.shape)
    assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN in different places: {got} against {want}"
    if got.numel() == 0:
        return
    error, size = (got - want).nan_to_num().abs(), want.nan_to_num().abs()
    if plain is None:
        allowed, torch_error = 1e-12 * size.clamp(min=1.0), 0.0
    else:
        torch_error = (plain.double().cpu() - want).nan_to_num().abs().max()
        allowed = k * torch_error + torch.finfo(dtype).eps * size + 8 * torch.finfo(torch.float32).eps * size.max()
    print(f"{name}: error {error.max():.2e}, plain torch {torch_error:.2e}, allowed {allowed.max():.2e}")
    assert bool((error <= allowed).all()), f"{name}: error {error.max():.3e}, allowed {allowed.max():.3e}"
