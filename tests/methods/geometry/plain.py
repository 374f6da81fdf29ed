"""PEFT-Arena's formulas, written with singular value decompositions and whole activations."""

import torch


def profiles(w0, w1):
    """(singular values, dP, E) over the thin SVD of w0, in its dtype."""
    u, s, vh = torch.linalg.svd(w0, full_matrices=False)
    delta = w1 - w0
    return s, ((u.T @ w1 @ vh.T).diagonal() - s).abs(), (delta @ vh.T).norm(dim=0)


def activation(x0, x1, ks=()):
    """Every activation metric of two (tokens, d) matrices."""
    cosines = torch.nn.functional.cosine_similarity(x0, x1, dim=1)
    angles = cosines.clamp(-1, 1).arccos()
    z0, z1 = (torch.nn.functional.normalize(x, dim=1) for x in (x0, x1))
    a, b = x0 - x0.mean(0), x1 - x1.mean(0)
    u, _, vh = torch.linalg.svd(b.T @ a)
    out = {
        "mean_cosine_drift": (1 - cosines).mean(),
        "angle_mean": angles.mean(),
        "angle_median": angles.quantile(0.5),
        "log_norm_ratio": (x1.norm(dim=1) / x0.norm(dim=1)).log().abs().mean(),
        "gram_cosine_dist": (z1 @ z1.T - z0 @ z0.T).norm() / (z0 @ z0.T).norm(),
        "raw_residual": (b - a).norm() / a.norm(),
        "proc_residual": (b @ (u @ vh) - a).norm() / a.norm(),
        "linear_cka": (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()),
        "shift": (x1.mean(0) - x0.mean(0)).norm() / a.norm() * len(x0) ** 0.5,
    }
    for k in ks:
        p0, p1 = (v[:k].T @ v[:k] for v in (torch.linalg.svd(x, full_matrices=False).Vh for x in (a, b)))
        out[f"subspace_dist_{k}"] = (p0 - p1).norm() / (2 * k) ** 0.5
    return {name: float(value) for name, value in out.items()}
