"""From the snapshots' cached log-probabilities to weights, and to a report of what every mixture reaches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..run_directory import write_json
from .prior import effective_size, learn_prior, mixture_nll, sweep_k, top_k
from .snapshots import DONE, log_probs_of, write_log_probs


def population(output: Path, folders: Sequence[Path], prior: str = "em", members: int | None = None) -> str:
    """Weigh snapshots by their fitness; a line on what came of it.

    Writes fitness.safetensors, weights.json (which ``Ensemble.from_pretrained`` reads) and report.json into ``output``.

    Args:
        folders: the snapshots, below ``output``, each with its log-probabilities.
        prior: "em", "adamw" or "uniform".
        members: keep so many, of the largest weights, and learn theirs anew.

    Where the snapshots have log-probabilities of evaluation documents too, the report has every mixture's NLL on both.
    """
    fitness = log_probs_of(folders)
    held_out = log_probs_of(folders, "eval") if (folders[0] / "eval.safetensors").is_file() else None
    uniform = torch.full((len(folders),), 1 / len(folders), dtype=torch.float64)
    learned = uniform if prior == "uniform" else learn_prior(fitness, prior).weights
    weights = learned if members is None else top_k(fitness, learned, members, refit=prior != "uniform")
    single = torch.zeros_like(uniform)
    single[int(fitness.mean(1, dtype=torch.float64).argmax())] = 1.0
    records = [json.loads((folder / DONE).read_text()) for folder in folders]
    names = [folder.relative_to(output).as_posix() for folder in folders]
    vocabulary = json.loads((folders[0] / "config.json").read_text()).get("vocab_size")
    mixtures = {"best member": single, "uniform": uniform, "learned": learned, "kept": weights}
    report: dict[str, Any] = {
        "prior": prior, "effective_members": effective_size(weights),
        "nll": {name: _both(w, fitness, held_out) for name, w in mixtures.items()},
        "top": [{"members": p.k, "fitness": p.nll, "eval": p.second_nll}
                for p in sweep_k(fitness, learned, refit=True, second=held_out)],
        "members": [{"folder": n, "weight": float(w), **r} for n, w, r in zip(names, weights, records, strict=True)],
    }  # fmt: skip
    write_log_probs(output, "fitness", fitness)
    write_json(output / "report.json", report)
    entries = [{"folder": n, "weight": float(w)} for n, w in zip(names, weights, strict=True) if w > 0]
    write_json(output / "weights.json", {"members": entries, "vocabulary": vocabulary})
    where = "eval" if held_out is not None else "fitness"
    shown = ", ".join(f"{name} {report['nll'][name][where]:.4f}" for name in ("best member", "uniform", "kept"))
    return (
        f"{output}: {len(entries)} of {len(folders)} snapshots, {report['effective_members']:.2f} effective; NLL on "
        f"{where} tokens: {shown}"
    )


def _both(weights: Tensor, fitness: Tensor, held_out: Tensor | None) -> dict[str, float | None]:
    return {
        "fitness": mixture_nll(fitness, weights),
        "eval": None if held_out is None else mixture_nll(held_out, weights),
    }
