"""Weight and activation metrics of a run, as one flat mapping: means over modules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from .. import geometry
from ..geometry.capture import choose_modules


def batches_of(rows: Sequence[Sequence[int]], size: int, device) -> list[dict[str, torch.Tensor]]:
    """Rows of token ids as batches, padded on the right."""
    out = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        out.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    return out


def check(model: torch.nn.Module, modules: str | Sequence[str] = "paper8") -> list[str]:
    """The names of the modules that ``measure`` reads; meta tensors do.  ValueError for those that are not there, or
    have no matrix of weights."""
    names = choose_modules(model, modules)
    for name in names:
        module = model.get_submodule(name)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or isinstance(module, torch.nn.Embedding):
            raise ValueError(f"modules: {name} is {type(module).__name__}, which is no linear layer")
    return names


def measure(
    base: torch.nn.Module, tuned: torch.nn.Module, pre: Mapping[str, torch.Tensor], post: Mapping[str, torch.Tensor],
    rows: Mapping[str, Sequence[Sequence[int]]], *, modules: str | Sequence[str] = "paper8", weights: bool = True,
    activations: bool = True, batch_size: int = 16,
) -> dict[str, float]:  # fmt: skip
    """{"weight.METRIC", "AXIS.METRIC": mean over modules} of ``burnish.methods.geometry``.

    Args:
        base, tuned: plain models; pre, post: their weights.
        rows: token ids by axis, "target" and "retention": activations and capability drift are of each on its own.
        modules: as in ``geometry.activation_geometry``.

    ValueError for modules that are not there.  What is not finite is left out.
    """
    out: dict[str, float] = {}
    if not weights and not activations:
        return out
    names = choose_modules(base, modules)
    if weights:
        matrices = [f"{n}.weight" for n in names]
        found = geometry.average(geometry.weight_geometry(pre, post, matrices))
        intruders = geometry.intruder_dimensions(pre, post, names=matrices).values()
        found["intruders"] = sum(i.count for i in intruders) / len(names)
        out |= {f"weight.{k}": v for k, v in found.items()}
    if activations:
        device = next(base.parameters()).device
        for axis, some in rows.items():
            if not some:
                continue
            batches = batches_of(some, batch_size, device)
            found = geometry.average(geometry.activation_geometry(base, tuned, batches, names))
            found.pop("tokens", None)
            found |= geometry.average(
                geometry.capability_drift(pre, post, geometry.input_moments(base, batches, names))
            )
            out |= {f"{axis}.{k}": v for k, v in found.items()}
    return {k: v for k, v in out.items() if math.isfinite(v)}
