"""Snapshots: models as any other, each beside the log-probabilities that its stored weights give held-out text.

cycle-004/config.json, model.safetensors, ...    as save_pretrained writes them, in the snapshot's dtype
cycle-004/fitness.safetensors                    logp (N,) fp32, of the tokens the prior is learned on
cycle-004/eval.safetensors                       the same of the evaluation documents, where there are some
cycle-004/snapshot.json                          written last: the snapshot is whole
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...paths.output import atomic_directory
from ..frozen import freeze
from ..run_directory import quiet_loading, write_json
from .documents import HeldOutRows
from .members import label_logp

DONE = "snapshot.json"


def folder_of(output: Path, cycle: int) -> Path:
    """Where a run in ``output`` keeps the snapshot of ``cycle``, from 0."""
    return output / f"cycle-{cycle:03d}"


def write_weights(model: Any, folder: Path, dtype: torch.dtype, tokenizer=None) -> None:
    """Store a model, floating-point tensors cast to ``dtype``; the directory appears whole, or not at all.

    What an earlier run left at ``folder`` is removed first.
    """
    if folder.exists():
        shutil.rmtree(folder)
    cast: dict[tuple, Tensor] = {}  # tied tensors stay tied
    state = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if key not in cast:
            cast[key] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        state[name] = cast[key]
    with atomic_directory(folder) as inside:
        with quiet_loading():
            model.save_pretrained(inside, state_dict=state)
        config = json.loads((inside / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(inside / "config.json", config)
        if tokenizer is not None:
            tokenizer.save_pretrained(inside)


def load_frozen(kind: Any, folder: Path, device: torch.device) -> nn.Module:
    """A stored snapshot as an instance of ``kind``, in fp32, frozen, in eval mode; draws no random numbers."""
    with torch.random.fork_rng(devices=[]), quiet_loading():
        return freeze(kind.from_pretrained(folder, dtype=torch.float32)).to(device)


@torch.no_grad()
def token_log_probs(
    model: nn.Module, rows: HeldOutRows, *, batch_size: int = 8, rank: int = 0, world: int = 1
) -> Tensor:  # fmt: skip
    """log p of each label of ``rows``, (N,) fp32 on the CPU, by ``burnish.linear_stats``: logits are never whole.

    Of ``world`` ranks each does every ``world``-th batch, and has zeros for the others' tokens: their sum is the whole,
    in the bits of one rank's.
    """
    out = torch.zeros(len(rows) * rows.length)
    for number, start in enumerate(range(0, len(rows), batch_size)):
        if number % world == rank:
            items = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            ids, labels = (torch.stack([x[k] for x in items]) for k in ("input_ids", "labels"))
            found = label_logp(model, ids, labels, None).float().flatten().cpu()
            out[start * rows.length : (start + len(items)) * rows.length] = found
    return out[: len(rows.stream) - 1]  # what is behind is the last row's padding


def write_log_probs(folder: Path, name: str, log_probs: Tensor) -> None:
    """Keep (N,) or (M, N) log-probabilities as ``name``.safetensors, whole or not at all."""
    path = folder / f"{name}.safetensors"
    temporary = path.with_name(f"{path.name}.tmp")
    save_file({"logp": log_probs.contiguous()}, temporary)
    os.replace(temporary, path)


def finish(folder: Path, record: dict[str, Any]) -> None:
    """Mark a snapshot as whole."""
    write_json(folder / DONE, record)


def whole(folder: Path) -> bool:
    """Whether a snapshot was finished."""
    return (folder / DONE).is_file()


def log_probs_of(folders: Sequence[str | os.PathLike], name: str = "fitness") -> Tensor:
    """(M, N) cached log-probabilities of M snapshots, a row each.

    Args:
        folders: snapshots, of one run or of several over the same documents.
        name: "fitness" or "eval".

    ValueError naming the folder for one without, or with another number of tokens than the first.
    """
    rows: list[Tensor] = []
    for folder in map(Path, folders):
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            raise ValueError(f"{folder}: has no {path.name}")
        row = load_file(path)["logp"]
        if rows and row.shape != rows[0].shape:
            raise ValueError(f"{folder}: {name} has {len(row)} tokens, the first snapshot's {len(rows[0])}")
        rows.append(row)
    if not rows:
        raise ValueError("folders: no snapshot")
    return torch.stack(rows)
