"""Play a fixed policy against a task's verifier over several turns, weigh the episodes by their returns, fine-tune on
them, and again where --refresh says so (DRIFT, arXiv 2605.31455)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import options
from ..options import Option, count, flag, mapping, natural, nonnegative, number, one_of, output_options, text

#: What --set may not name, because an option of our own does.
OWN_FIELDS = {
    "max_length": "--max-length",
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            "drift_beta", "gamma", "repetition_penalty", "format_penalty", "return_form", "weight_norm", "supervise",
            "drop_all_failed", "weighting", "length_norm", "batch_weight_norm",
        )
    },
}  # fmt: skip

_real = number(float, float("-inf"), "a number")

OPTIONS: dict[str, Option] = {
    "model": Option(text, None, "the reference policy and the start: directory, hub name, or smollm2"),
    "data": Option(text, None, "reasoning-gym:TASK, to collect episodes of"),
    "data_args": Option(mapping, {}, "YAML or JSON mapping for the task: size, seed and its own configuration"),
    "episodes": Option(text, None, "FILE.jsonl of episodes to train on, instead of collecting them"),
    "collect_only": Option(flag, False, "stop when the episodes are collected; --resume goes on to train"),
    "refresh": Option(natural, 0, "times to collect again from the trained policy and train again"),
    "trajectories": Option(count, 16, "episodes a prompt, K"),
    "max_turns": Option(count, 5, "turns an episode, T"),
    "feedback": Option(text, "Incorrect. Please think again.", "what the policy is told after a wrong turn"),
    "instruction": Option(text, None, "a line added to each question"),
    "answer_pattern": Option(text, None, "regular expression whose first group is the answer; without it all the text"),
    "temperature": Option(nonnegative, 1.0, "of the episodes"),
    "top_p": Option(nonnegative, 1.0, "of the episodes"),
    "max_new_tokens": Option(count, 512, "of a turn"),
    "rollout_batch": Option(count, 64, "episodes played side by side"),
    "engine": Option(one_of("transformers", "vllm"), "transformers", "what samples: transformers, or a vllm server"),
    "server": Option(text, None, "address of the vLLM server, which serves --model"),
    "drift_beta": Option(nonnegative, 0.1, "temperature of the weights"),
    "gamma": Option(nonnegative, 0.9, "discount a turn"),
    "repetition_penalty": Option(nonnegative, 0.5, "lambda of Eq. 12"),
    "format_penalty": Option(_real, 0.0, "added to the return for a turn without an answer; the code has -0.1"),
    "return_form": Option(one_of("paper", "code"), "paper", "Eq. 12, or the published program's return"),
    "weight_norm": Option(one_of("prompt", "dataset"), "prompt", "what the weights have mean 1 over"),
    "supervise": Option(one_of("last", "all"), "last", "which turns are trained on"),
    "drop_all_failed": Option(flag, False, "leave out prompts that no episode solved"),
    "weighting": Option(one_of("drift", "uniform", "rejection"), "drift", "or a baseline: all alike; solved ones"),
    "length_norm": Option(one_of("sum", "mean"), "sum", "of a turn's tokens"),
    "batch_weight_norm": Option(flag, False, "divide by a batch's weights instead of its rows"),
    "learning_rate": Option(nonnegative, 5e-6, "peak learning rate"),
    "batch_size": Option(count, 8, "rows a micro-batch and process"),
    "accumulation": Option(count, 1, "micro-batches an optimizer step"),
    "max_steps": Option(count, None, "optimizer steps a round; instead of --epochs"),
    "epochs": Option(nonnegative, None, "passes over the rows a round (1)"),
    "max_length": Option(count, None, "tokens a row; longer ones are left out"),
    "seed": Option(natural, 42, "of the episodes and of the data's order"),
    "eval_size": Option(natural, 0, "at the end, play this many new problems of the task greedily"),
    **output_options(),
    "set": Option(mapping, {}, "mapping of any other DriftConfig field"),
}  # fmt: skip
REQUIRED = ("model", "output")


def merge(flags: Mapping[str, Any], config: str | None) -> dict[str, Any]:
    """Every option's value, checked against the others.  ValueError."""
    out = options.merge(OPTIONS, REQUIRED, flags, config)
    if out["data"] is None and out["episodes"] is None:
        raise ValueError("--data is required to collect episodes, or --episodes to train on those of a file")
    if out["data"] is None:
        for name, why in (("refresh", "collects again"), ("eval_size", "plays new problems")):
            if out[name]:
                raise ValueError(f"--{name.replace('_', '-')} {why}: it needs --data")
    if out["episodes"] is not None and out["collect_only"]:
        raise ValueError("--episodes and --collect-only exclude each other")
    if (out["engine"] == "vllm") != (out["server"] is not None):
        raise ValueError("--engine vllm and --server go together")
    if out["engine"] == "vllm" and out["refresh"]:
        raise ValueError("--refresh needs --engine transformers: a vLLM server keeps the weights it started with")
    return out
