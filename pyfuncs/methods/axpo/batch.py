"""Rows of a scored generation batch, as TRL's ``_generate_and_score_completions`` returns it: some of them, and more.

Prompts are padded on the left and completions on the right, each to the longest; images lie flat over the rows, in the
layouts that TRL's own ``split_pixel_values_by_grid`` knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

#: Of shape (rows, prompt length).
PROMPT = ("prompt_ids", "prompt_mask")
#: Of shape (rows, completion length).
COMPLETION = (
    "completion_ids", "completion_mask", "tool_mask", "old_per_token_logps", "ref_per_token_logps",
    "sampling_per_token_logps", "importance_sampling_ratio",
)  # fmt: skip
#: Of shape (rows, prompt length + completion length).
WHOLE = ("token_type_ids", "mm_token_type_ids")
#: What the model's forward takes beside tokens.
MODEL_INPUTS = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


def row_count(batch: dict[str, Any]) -> int:
    """Rows of the batch."""
    return batch["prompt_ids"].shape[0]


def take(batch: dict[str, Any], index: Sequence[int]) -> dict[str, Any]:
    """The rows ``index``, in that order, repeated where it repeats; what is one number for all is kept."""
    chosen = torch.tensor(list(index), dtype=torch.long)

    def rows(value):
        if isinstance(value, Tensor):
            return value[chosen.to(value.device)] if value.ndim else value
        return value if value is None else [value[i] for i in index]

    return unsplit_pixel_values_by_grid({k: rows(v) for k, v in split_pixel_values_by_grid(batch).items()})


def join(first: dict[str, Any], second: dict[str, Any], pad_token: int) -> dict[str, Any]:
    """The rows of both, padded to common lengths.  A single number for all is the first's.

    ValueError, naming the field, where only one of them has it and no value stands for its absence.
    """
    parts: list[dict[str, Any]] = [split_pixel_values_by_grid(batch) for batch in (first, second)]
    counts = [row_count(batch) for batch in (first, second)]
    prompt = max(batch["prompt_ids"].shape[1] for batch in (first, second))
    completion = max(batch["completion_ids"].shape[1] for batch in (first, second))
    out: dict[str, Any] = {}
    for key in dict.fromkeys([*parts[0], *parts[1]]):
        values: list[Any] = [part.get(key) for part in parts]
        present = next(v for v in values if v is not None)
        if isinstance(present, Tensor) and present.ndim == 0:
            out[key] = present
            continue
        for i, value in enumerate(values):
            if value is None:
                values[i] = _absent(key, present, parts[i], counts[i])
        if isinstance(present, list):
            out[key] = [*values[0], *values[1]]
            continue
        if key in PROMPT:
            fill = pad_token if key == "prompt_ids" else 0
            values = [_pad(v, prompt - v.shape[1], 0, fill) for v in values]
        elif key in COMPLETION:
            fill = {"completion_ids": pad_token, "tool_mask": 1}.get(key, 0)
            values = [_pad(v, 0, completion - v.shape[1], fill) for v in values]
        elif key in WHOLE:
            values = [
                _pad(v, prompt - b["prompt_ids"].shape[1], completion - b["completion_ids"].shape[1], 0)
                for v, b in zip(values, (first, second), strict=True)
            ]
        elif values[0].shape[1:] != values[1].shape[1:]:
            values = _zero_padded(values)
        out[key] = torch.cat(values)
    return unsplit_pixel_values_by_grid(out)


def _absent(key: str, present: Any, part: dict[str, Any], rows: int):
    """What a field is for rows that do without it."""
    if key == "tool_mask":
        return torch.ones_like(part["completion_mask"])
    if key in WHOLE:
        return present.new_zeros(rows, part["prompt_ids"].shape[1] + part["completion_ids"].shape[1])
    if key in ("num_images", "num_tiles"):
        return [0] * rows
    if isinstance(present, list) and isinstance(present[0], Tensor):  # images of a row, of which there are none
        return [present[0][:0] for _ in range(rows)]
    if key in ("pixel_values", "pixel_attention_mask"):  # padded to the same number a row, with zeros
        return present.new_zeros(rows, *present.shape[1:])
    raise ValueError(f"some rows of this batch have {key} and the resampled ones do not, or the other way round")


def _pad(value: Tensor, before: int, behind: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(value, (before, behind), value=fill)


def _zero_padded(values: list[Tensor]) -> list[Tensor]:
    shape = [max(sizes) for sizes in zip(*(v.shape[1:] for v in values), strict=True)]
    out = []
    for value in values:
        whole = value.new_zeros(value.shape[0], *shape)
        whole[(slice(None), *(slice(0, n) for n in value.shape[1:]))] = value
        out.append(whole)
    return out
