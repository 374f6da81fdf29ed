"""Capability-conditioned spectral drift: how much an update changes on the inputs that a capability uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...paths import as_tensors
from ..frozen import evaluating
from .activations import CHUNK
from .capture import Forward, choose_modules, find, forward, listening, rows, token_mask
from .moments import RawMoments
from .weights import read_pair


@dataclass(frozen=True)
class InputMoments:
    """E[h h^T] of the inputs h of one module over some tokens, (d_in, d_in) in fp64, and how its weight is stored:
    (d_in, d_out) where ``transposed``."""

    second: torch.Tensor
    tokens: int
    transposed: bool = False


def input_moments(
    base: torch.nn.Module, batches: Iterable[Mapping[str, Any]], modules: str | Iterable[str] = "paper8", *,
    widest: int = 8192, forward: Forward = forward,
) -> dict[str, InputMoments]:  # fmt: skip
    """Second moments of the inputs of linear modules in the base model: one pass, then any number of checkpoints.

    Args are those of ``activation_geometry``; memory beside the model is one (d_in, d_in) in fp64 for each module.
    ValueError as there, and for a module without a matrix ``weight``.
    """
    names = choose_modules(base, modules)
    found = {n: find(base, n) for n in names}
    flat = {}
    for name, module in found.items():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or isinstance(module, torch.nn.Embedding):
            raise ValueError(f"{name}: a linear module is needed; got {type(module).__name__}")
        flat[name] = type(module).__name__ == "Conv1D"  # transformers': x W, where nn.Linear is x W^T
        width = weight.shape[0 if flat[name] else 1]
        if width > widest:
            need = 8 * width * width / 1e9
            raise ValueError(f"{name}: {width} inputs need {need:.1f} GB of moments; leave it out or raise widest")
    moments = {n: RawMoments() for n in names}
    mask: torch.Tensor | None = None

    def add(name: str, x: torch.Tensor) -> None:
        for chunk in rows(name, x, mask).split(CHUNK):
            moments[name].update(chunk.double())

    with torch.no_grad(), evaluating(base), listening(found, add, inputs=True):
        for batch in batches:
            mask = token_mask(batch)
            forward(base, batch)
    out = {}
    for name, total in moments.items():
        if total.second is None or total.count == 0:
            raise ValueError(f"{name}: not called in the forward pass, or no tokens")
        if not bool(torch.isfinite(total.second.trace())):
            raise ValueError(f"{name} has inputs that are not finite")
        out[name] = InputMoments(total.second.div_(total.count), total.count, flat[name])
    return out


def capability_drift(
    pre, post, moments: Mapping[str, InputMoments], *, eps: float = 1e-12, device: torch.device | str = "cpu"
) -> dict[str, dict[str, float]]:
    """CSD of dW = W_post - W_pre on the inputs that ``moments`` are of (PEFT-Arena, arXiv 2605.28819).

        csd_abs = E ||dW h||^2
        csd_rel = E ||dW h||^2 / (E ||W_pre h||^2 + eps)
        csd_un  = E ||dW h||^2 / ((||dW||_F^2 + eps) (E ||h||^2 + eps)), 1 / d_in for isotropic h

    Args:
        pre, post: as in ``weight_geometry``; read two tensors at a time.
        moments: of ``input_moments`` on prompts of the capability.
        eps: as above.

    E ||A h||^2 = tr(A E[h h^T] A^T), in fp64: no pass over data, so a path's points cost one product each.  ValueError
    where a module's weight is missing or of another shape.
    """
    before, after = as_tensors(pre), as_tensors(post)
    out = {}
    for name, m in moments.items():
        key = f"{name}.weight"
        for side, tensors in (("pre", before), ("post", after)):
            if key not in tensors:
                raise ValueError(f"{side} has no tensor {key}")
        a, b = (x.to(device, torch.float64) for x in read_pair(before, after, key))
        if m.transposed:
            a, b = a.T, b.T
        if a.shape[1] != len(m.second):
            raise ValueError(f"{key}: {a.shape[1]} columns; the moments are of {len(m.second)} inputs")
        delta, second = b - a, m.second.to(device)
        moved, kept = (max(0.0, float(((x @ second) * x).sum())) for x in (delta, a))
        size, read = float(delta.square().sum()), float(second.trace())
        out[name] = {
            "csd_abs": moved, "csd_rel": moved / (kept + eps), "csd_un": moved / ((size + eps) * (read + eps))
        }  # fmt: skip
    return out
