"""What fine-tuning did to a matrix: drift, spectrum, profiles along the singular directions of before, subspaces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ...paths import Tensors, as_tensors
from ...paths.blend import working
from .spectrum import clusters, fluctuation, gram_values, gram_vectors, spectral_norm

GROUPS = ("drift", "spectrum", "profiles", "subspace")
#: Elements of a block of rows in fp64; four are held while one follows another.
_BLOCK = 1 << 19


def weight_geometry(
    pre, post, names: Iterable[str] | None = None, *, groups: Sequence[str] = ("drift", "spectrum", "profiles"),
    profiles: bool = False, exact_below: int = 1024, window: int = 5, gap: float = 1e-3, directions: int = 32,
    probes: int = 32, seed: int = 0, device: torch.device | str = "cpu",
) -> dict[str, dict]:  # fmt: skip
    """The geometry of dW = W_post - W_pre, matrix by matrix, after PEFT-Arena (arXiv 2605.28819), without an SVD.

    Args:
        pre, post: modules, state dicts, directories of safetensors, or points of a path (``path.at(t)``).
        names: of the matrices; by default every matrix of floating point, one that is tied to another once.
        groups: of metrics, below.
        profiles: give arrays too.
        exact_below: matrices whose smaller side r is at most this are solved exactly (r x r eigenproblems in fp64).
            Of larger ones there are ``drift``, ``spectral``, ``stable_rank`` (Lanczos) and an estimated
            ``input_alignment``.
        window: of the moving average in a profile's fluctuation.
        gap: singular values that fall by less than this share are one cluster (group "subspace").
        directions: how many leading directions the principal angles are of.
        probes: random vectors of the estimate (Hutchinson).
        seed: of the estimate and of Lanczos' first vector.
        device: where to compute.

    Returns {name: {metric: float}}.  W = pre, U S V^T its thin SVD, d_in its columns:

    drift:
        ``frobenius`` ||dW||_F; ``relative`` ||dW||_F / ||W||_F (inf where only W is zero).
    spectrum (of dW):
        ``spectral`` ||dW||_2; ``stable_rank`` ||dW||_F^2 / ||dW||_2^2, 0 for dW = 0 (the official code calls it
        effective rank); ``nuclear`` ||dW||_*.
    profiles (over the directions of W whose singular value is above rounding, ``rank`` of them):
        ``retention_mean``, ``_max``, ``_fluct`` of dP_i = |u_i^T W_post v_i - s_i|;
        ``adaptation_mean``, ``_max``, ``_fluct`` of E_i = ||dW v_i||;
        ``adaptation_outside`` the share of ||dW||_F^2 on inputs that W does not read, 1 - sum E_i^2 / ||dW||_F^2;
        ``input_alignment`` d_in sum s_i^2 E_i^2 / (||W||_F^2 ||dW||_F^2): 1 where dW reads W's input
        directions without preference, more where it reads the leading ones (with ``input_alignment_error``, one
        standard error, where it is estimated).
        Arrays: ``singular_values``, ``retention``, ``adaptation``.
    subspace (``left`` for outputs, ``right`` for inputs):
        ``sva_right`` mean |cos| of vectors of equal index, as the official code has it; ``overlap_right`` the same by
        cluster of equal singular values, (||V_C^T V'_C||_F^2 / |C|)^(1/2), the mean over indices: it does not depend
        on which vectors an eigensolver chose inside a cluster; ``angle_right`` and ``angle_right_mean`` the largest
        and the mean principal angle, in degrees, between the spans of the first ``directions`` vectors (and the rest
        of the last one's cluster).  Arrays: ``sva_right_profile`` and so on, ``cluster``.

    Memory: the two tensors as they are stored, four blocks of 4 MiB (or of one row) in fp64, and a dozen (r, r)
    matrices in fp64; above ``exact_below`` the two tensors in fp32 and 200 vectors of
    either side.

    ValueError where a matrix is on one side only, shapes differ, a dtype is not one of floating point, a value is not
    finite, or an argument is out of range.
    """
    unknown = [g for g in groups if g not in GROUPS]
    if unknown:
        raise ValueError(f"groups: {unknown[0]!r} is none of {', '.join(GROUPS)}")
    for label, value, least in (("exact_below", exact_below, 0), ("directions", directions, 1), ("probes", probes, 2)):
        if value < least:
            raise ValueError(f"{label} must be at least {least}; got {value}")
    if not 0 <= gap < 1:
        raise ValueError(f"gap must lie in [0, 1); got {gap}")
    fluctuation(torch.zeros(window), window)
    before, after = as_tensors(pre), as_tensors(post)
    out = {}
    for name in matrices(before, after, names):
        if min(before.shape(name)) <= exact_below and set(groups) != {"drift"}:
            out[name] = _exact(name, before, after, groups, profiles, window, gap, directions, device)
        else:
            out[name] = _estimated(name, before, after, groups, probes, seed, device)
    return out


def average(results: dict[str, dict], names: Iterable[str] | None = None) -> dict[str, float]:
    """The mean of each metric over ``names`` (by default all), of those that have it; arrays are left out."""
    found: dict[str, list[float]] = {}
    for name in results if names is None else names:
        for metric, value in results[name].items():
            if not isinstance(value, torch.Tensor):
                found.setdefault(metric, []).append(float(value))
    return {metric: sum(values) / len(values) for metric, values in found.items()}


def matrices(before: Tensors, after: Tensors, names: Iterable[str] | None = None) -> list[str]:
    """Matrices to compare, in order: ``names``, or all of floating point, tied ones once.  ValueError, as above."""
    if names is None:
        old, new = _own(before), _own(after)
        # a head that is tied here may be stored there, under either name
        lost = [n for n in new if n not in before] or [n for n in old if n not in after]
        if lost:
            where = "after training and not in the one before" if lost[0] in after else "before training, not after it"
            raise ValueError(
                f"{lost[0]} is in the model {where}: merge adapters first, or say which tensors with names="
            )
        if not new:
            raise ValueError("the models have no matrix of floating point")
        return list(new)
    chosen = list(names)
    for name in chosen:
        if name not in before or name not in after:
            raise ValueError(f"names: {name} is not in the model {'after' if name in before else 'before'} training")
        if len(after.shape(name)) != 2:
            raise ValueError(f"names: {name} is no matrix: its shape is {after.shape(name)}")
    return chosen


def _own(tensors: Tensors) -> dict[str, None]:
    """Names of the matrices of floating point, without further names of the same memory."""
    seen: set = set()
    out: dict[str, None] = {}
    memory = getattr(tensors, "tensors", {})
    for name in tensors:
        if len(tensors.shape(name)) != 2 or not tensors.dtype(name).is_floating_point:
            continue
        x = memory.get(name)
        key = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()) if x is not None else name
        if key not in seen:
            seen.add(key)
            out[name] = None
    return out


def read_pair(before: Tensors, after: Tensors, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of both models.  ValueError where shapes differ or the dtype is not one of floating point."""
    if before.shape(name) != after.shape(name):
        raise ValueError(f"{name}: shape {before.shape(name)} before training, {after.shape(name)} after")
    for tensors in (before, after):
        if not tensors.dtype(name).is_floating_point or tensors.dtype(name).itemsize < 2:
            raise ValueError(f"{name}: dtype {tensors.dtype(name)} is not one that arithmetic is done in")
    return before.tensor(name), after.tensor(name)


def tall(a: torch.Tensor, b: torch.Tensor, device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks of rows, in fp64 and memory of their own, of two matrices or, where these are wider than tall, of their
    transposes."""
    if a.shape[0] < a.shape[1]:
        a, b = a.T, b.T
    step = max(1, _BLOCK // max(1, a.shape[1]))
    for start in range(0, a.shape[0], step):
        x, y = (z[start : start + step].to(device, torch.float64, copy=True) for z in (a, b))
        yield x, y


def _exact(name: str, before: Tensors, after: Tensors, groups, arrays, window, gap, directions, device) -> dict:
    """Everything from three (r, r) matrices of T, the matrix or its transpose, whichever is tall: T^T T, dT^T dT and
    T^T dT."""
    a, b = read_pair(before, after, name)
    size, right_is_narrow = min(a.shape), a.shape[0] >= a.shape[1]
    directed = bool({"profiles", "subspace"} & set(groups))
    gram, drift, cross = (torch.zeros(size, size, dtype=torch.float64, device=device) for _ in range(3))
    length = 0.0
    for x, y in tall(a, b, device):
        y.sub_(x)
        drift.addmm_(y.T, y)
        length += float(x.square().sum())
        if directed:
            gram.addmm_(x.T, x)
            cross.addmm_(x.T, y)
    columns = a.shape[1]
    del a, b
    moved = float(drift.trace())
    _finite(name, moved, length)
    out: dict[str, Any] = _drift(moved, length) if "drift" in groups else {}
    if "spectrum" in groups:
        values = gram_values(drift)
        largest = float(values[0]) if size else 0.0
        out |= _stable(moved, largest) | {"nuclear": float(values.sum())}
    if not directed:
        return out
    values, vectors = gram_vectors(gram)
    rank = int((values > 0).sum())
    s, z = values[:rank], vectors[:, :rank]
    if "profiles" in groups:
        along = z.T @ cross  # (rank, r): z_i^T T^T dT
        retention = (along * z.T).sum(1).abs() / s
        energy = (z * (drift @ z)).sum(0).clamp_min(0) if right_is_narrow else along.square().sum(1) / s.square()
        adaptation = energy.sqrt()
        out["rank"] = rank
        out |= _summary("retention", retention, window) | _summary("adaptation", adaptation, window)
        out["adaptation_outside"] = max(0.0, 1 - float(energy.sum()) / moved) if moved > 0 else 0.0
        scaled = float((s.square() * energy).sum())
        out["input_alignment"] = columns * scaled / (length * moved) if moved > 0 and length > 0 else 0.0
        if arrays:
            out |= {"singular_values": s.cpu(), "retention": retention.cpu(), "adaptation": adaptation.cpu()}
    if "subspace" in groups:
        values, vectors = gram_vectors(gram + cross + cross.T + drift)
        rank = min(rank, int((values > 0).sum()))
        s, z, t, w = s[:rank], z[:, :rank], values[:rank], vectors[:, :rank]
        narrow = z.T @ w
        wide = z.T @ (gram + cross) @ w / s[:, None] / t
        cluster = clusters(s, gap)
        sides = (("right", narrow), ("left", wide)) if right_is_narrow else (("right", wide), ("left", narrow))
        for side, cosines in sides:
            out |= _subspace(side, cosines, cluster, directions, arrays)
        if arrays:
            out["cluster"] = cluster.cpu()
    return out


def _estimated(name: str, before: Tensors, after: Tensors, groups, probes, seed, device) -> dict:
    """What a matrix too large for an eigenproblem has: norms, Lanczos, and Hutchinson's estimate."""
    a, b = read_pair(before, after, name)
    dtype = torch.promote_types(working(a.dtype), working(b.dtype))
    moved = length = 0.0
    for x, y in zip(*(z.split(max(1, _BLOCK // z.shape[1])) for z in (a, b)), strict=True):
        start = x.to(device, torch.float64)
        length += float(start.square().sum())
        moved += float(start.sub_(y.to(device, torch.float64)).square_().sum())
    _finite(name, moved, length)
    out: dict[str, Any] = _drift(moved, length) if "drift" in groups else {}
    if not {"spectrum", "profiles"} & set(groups):
        return out
    # exact from here on in the wider dtype; for fp32 tensors in post's own memory
    w = a.to(device, dtype)
    delta = b.to(device, dtype)
    delta.sub_(w)
    del a, b
    if "spectrum" in groups:
        out |= _stable(moved, spectral_norm(delta, seed=seed))
    if "profiles" in groups:
        # E ||dW W^T z||^2 = ||dW W^T||_F^2 = sum s_i^2 E_i^2 over vectors z of signs
        generator = torch.Generator().manual_seed(seed)
        found = torch.empty(probes, dtype=torch.float64)
        for i in range(probes):
            signs = torch.randint(0, 2, (w.shape[0],), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            found[i] = (delta @ (w.T @ signs.to(w))).double().square().sum()
        scale = w.shape[1] / (length * moved) if moved > 0 and length > 0 else 0.0
        out["input_alignment"] = scale * float(found.mean())
        out["input_alignment_error"] = scale * float(found.std()) / probes**0.5
    return out


def _finite(name: str, moved: float, length: float) -> None:
    if not (moved < float("inf") and length < float("inf")):
        raise ValueError(f"{name} has values that are not finite")


def _drift(moved: float, length: float) -> dict[str, float]:
    relative = (moved / length) ** 0.5 if length > 0 else float("inf") if moved > 0 else 0.0
    return {"frobenius": moved**0.5, "relative": relative}


def _stable(moved: float, largest: float) -> dict[str, float]:
    return {"spectral": largest, "stable_rank": moved / largest**2 if largest > 0 else 0.0}


def _summary(label: str, profile: torch.Tensor, window: int) -> dict[str, float]:
    if not profile.numel():
        return {f"{label}_{n}": 0.0 for n in ("mean", "max", "fluct")}
    return {
        f"{label}_mean": float(profile.mean()), f"{label}_max": float(profile.max()),
        f"{label}_fluct": fluctuation(profile, window),
    }  # fmt: skip


def _subspace(side: str, cosines: torch.Tensor, cluster: torch.Tensor, directions: int, arrays: bool) -> dict:
    """``cosines``[i, j] = v_i . v'_j of the vectors before and after."""
    rank = len(cosines)
    if rank == 0:
        return {f"sva_{side}": 0.0, f"overlap_{side}": 0.0, f"angle_{side}": 0.0, f"angle_{side}_mean": 0.0}
    alone = cosines.diagonal().abs()
    same = cluster[:, None] == cluster
    # by cluster, the same for every basis of its subspaces; of a cluster of one vector it is |cos|
    together = (same.double() @ (cosines.square() * same).sum(0) / same.sum(1)).sqrt()
    count = min(directions, rank)
    count = int((cluster <= cluster[count - 1]).sum())
    angles = torch.linalg.svdvals(cosines[:count, :count]).clamp(0, 1).arccos().rad2deg()
    out: dict[str, Any] = {
        f"sva_{side}": float(alone.mean()), f"overlap_{side}": float(together.mean()),
        f"angle_{side}": float(angles.max()), f"angle_{side}_mean": float(angles.mean()),
    }  # fmt: skip
    if arrays:
        out |= {f"sva_{side}_profile": alone.cpu(), f"overlap_{side}_profile": together.cpu()}
    return out
