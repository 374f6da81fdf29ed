"""Weight and activation metrics of a run, as one flat mapping: means over modules."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch

#: Without ``modules`` in the file: PEFT-Arena's projections (q, k, v, down), in two layers a third and two thirds up.
PARTS = ("q_proj", "k_proj", "v_proj", "down_proj")


def pick_modules(model, patterns: Iterable[str] | None = None) -> list[str]:
    """Names of the linear layers that metrics read: those that match a pattern (a regular expression), or the default.

    ValueError for a pattern that matches none.
    """
    from .techniques import linear_layers

    names = [name for name, _, _ in linear_layers(model)]
    if patterns:
        out: list[str] = []
        for pattern in patterns:
            found = [n for n in names if re.search(pattern, n)]
            if not found:
                raise ValueError(f"metrics: modules: {pattern!r} matches no linear layer of the model")
            out += [n for n in found if n not in out]
        return out
    layers = model.config.get_text_config().num_hidden_layers
    wanted = {layers // 3, 2 * layers // 3}
    chosen = [
        n for n in names if (m := re.search(r"\.(\d+)\.", n)) and int(m[1]) in wanted and n.rsplit(".", 1)[-1] in PARTS
    ]
    return chosen or names


def batches_of(rows: list[list[int]], size: int, device) -> list[dict[str, torch.Tensor]]:
    """Rows of token ids as padded batches."""
    out = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        width = max(map(len, batch))
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        out.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    return out


def averaged(found: Mapping[str, Mapping[str, Any]], prefix: str) -> dict[str, float]:
    """{"prefix.metric": mean over modules} of {module: {metric: number}}; what is no finite number is left out."""
    columns: dict[str, list[float]] = {}
    for row in found.values():
        for name, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                columns.setdefault(f"{prefix}.{name}", []).append(float(value))
    return {name: statistics.fmean(values) for name, values in columns.items()}
