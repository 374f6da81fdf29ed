"""AXPO with real parts on this CPU: SmolLM2-135M, the calculator through TRL's tool loop, reasoning-gym's chain_sum.

    python benchmarks/axpo_run.py            # writes results/axpo_run.json; some ten minutes

SmolLM2-135M calls no tool, so the run starts, as the paper's do, with SFT on conversations with calls, a few steps of
``TargetSFTTrainer``.  In most of them the call has a wrong operand, so that the start calls often and fails often.
``burnish axpo`` goes on from there twice: undisturbed, and killed (SIGKILL) after a checkpoint and resumed.  This
script fails where the two differ, or nothing was called or resampled.

A few steps show that the plumbing is real, nothing about learning.  A row is short because the chat template here
names the tools and does not describe them, as Qwen 2.5's would, which the command takes by itself.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "axpo_run.json"
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
SFT = {"steps": 32, "batch_size": 4, "learning_rate": 1e-4, "no_call": 0.2, "wrong_call": 0.7, "seed": 1}
AXPO = {
    "data": "reasoning-gym:chain_sum", "data-args": json.dumps({"size": 32, "seed": 7, **SUMS}), "system": "",
    "generations": 4, "batch-size": 16, "budget": 0.25, "resamples": 4, "max-completion-length": 80,
    "learning-rate": 1e-5, "max-steps": 3, "save-steps": 2, "logging-steps": 1,
}  # fmt: skip
TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\nTools:' }}
{%- for tool in tools %}{{ ' ' + tool.function.name + '(' + tool.function.parameters.properties | join(', ') + ')' }}
{%- endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '<|im_start|>assistant' }}{% generation %}
{%- if message.content %}{{ '\n' + message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endgeneration %}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LOGGED = ("loss", "grad_norm", "reward", "tools/call_frequency", "tools/failure_frequency")


def conversations(count: int) -> list[dict]:
    """Sums answered by a call; ``SFT["wrong_call"]`` of the calls have another first operand."""
    from burnish.methods.axpo.calculator import calculator
    from burnish.methods.data import load_task

    draw, out = random.Random(SFT["seed"]), []
    for entry in load_task("chain_sum", size=count, seed=SFT["seed"], **SUMS).entries:
        expression, answer = entry["metadata"]["expression"], str(entry["answer"])
        messages = [{"role": "user", "content": entry["question"].strip(), "tool_calls": None}]
        if draw.random() >= SFT["no_call"]:
            if draw.random() < SFT["wrong_call"]:
                first = expression.split()[0]
                other = draw.choice([n for n in range(10, 100) if str(n) != first])
                expression = expression.replace(first, str(other), 1)
            answer = calculator(expression)
            call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": expression}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": answer, "tool_calls": None})
        messages.append({"role": "assistant", "content": answer, "tool_calls": None})
        out.append({"messages": messages})
    return out


def fit_start(folder: Path) -> dict:
    """SmolLM2-135M after ``SFT``, saved with a tokenizer that knows tools; seconds and losses."""
    from datasets import Dataset
    from transformers.utils import get_json_schema
    from trl import SFTConfig
    from trl.chat_template_utils import qwen3_template, supports_tool_calling

    from burnish.methods import TargetSFTTrainer, load_model
    from burnish.methods.axpo.calculator import calculator

    model, tokenizer = load_model("smollm2")
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = qwen3_template  # how TRL reads calls of this form
    if not supports_tool_calling(tokenizer):
        raise SystemExit("the chat template does not write calls")
    rows = conversations(SFT["steps"] * SFT["batch_size"])
    tools = [json.dumps([get_json_schema(calculator)])] * len(rows)
    started = time.perf_counter()
    arguments = SFTConfig(
        str(folder / "sft"), max_steps=SFT["steps"], per_device_train_batch_size=SFT["batch_size"],
        learning_rate=SFT["learning_rate"], lr_scheduler_type="constant_with_warmup", warmup_steps=4,
        assistant_only_loss=True, save_strategy="no", logging_steps=1, report_to="none", bf16=False, use_cpu=True,
        gradient_checkpointing=False, dataloader_pin_memory=False, seed=SFT["seed"],
    )  # fmt: skip
    data = Dataset.from_list(rows).add_column("tools", tools)
    trainer = TargetSFTTrainer(model, arguments, objective="nll", train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(folder / "start"))
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    return {**SFT, "seconds": time.perf_counter() - started, "first_loss": losses[0], "last_loss": losses[-1]}


def command(start: Path, output: Path, *more: str) -> list[str]:
    flags = [x for name, value in AXPO.items() for x in (f"--{name}", str(value))]
    begin = [sys.executable, "-m", "burnish.cli", "axpo", "--model", str(start), "--output", str(output)]
    return [*begin, *flags, *more]


def run(arguments: list[str], log: Path, kill_when: Path | None = None) -> str:
    """What the command said, to its end, or to SIGKILL a second after ``kill_when`` is there."""
    with log.open("w") as file:
        process = subprocess.Popen(arguments, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=file)
        while kill_when is not None and process.poll() is None:
            if kill_when.exists():
                time.sleep(1.0)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.1)
        code = process.wait()
    if code != (0 if kill_when is None else -signal.SIGKILL):
        raise SystemExit(f"burnish axpo ended with {code}:\n{log.read_text()[-2000:]}")
    return log.read_text()


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def logs(output: Path) -> list[dict]:
    """What was logged at each step: AXPO's metrics and ``LOGGED``."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in e.items() if k in LOGGED or k.startswith("axpo/")} for e in history if "loss" in e]


def markdown(result: dict) -> str:
    """The results as benchmarks/docs.py writes them into docs/axpo.md."""
    names = ("reward", "axpo/tool_rate", "axpo/trigger_rate", "axpo/resampled_rows", "axpo/recovered_rate")
    rows = [["step", *(n.removeprefix("axpo/").replace("_", " ") for n in names)], ["---"] * (len(names) + 1)]
    for step, log in enumerate(result["steps"], 1):
        rows.append([str(step), *("-" if log.get(n) is None else f"{log[n]:.3g}" for n in names)])
    sft = result["sft"]
    return "\n".join([
        f"{result['model']}, {result['threads']} thread: {sft['steps']} steps of SFT on {sft['batch_size']} rows in "
        f"{sft['seconds']:.0f} s (loss {sft['first_loss']:.2f} to {sft['last_loss']:.2f}), then {len(result['steps'])} "
        f"steps of AXPO on {result['options']['batch-size']} rollouts in {result['seconds']['whole']:.0f} s. Killed "
        f"after {result['resumed_from']} and resumed: the same weights, SHA-256 {result['sha256']['whole'][:12]}..., "
        "and the same log.", "", *("| " + " | ".join(cells) + " |" for cells in rows),
    ])  # fmt: skip


def main() -> None:
    """The start, both runs, the comparison."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, help="the model of an earlier --keep, instead of SFT; writes no results")
    parser.add_argument("--keep", type=Path, help="where to leave the model after SFT; ends there")
    options = parser.parse_args()
    folder, first = Path(tempfile.mkdtemp(prefix="axpo-run-")), time.perf_counter()
    start, whole, cut = (folder / name for name in ("start", "whole", "cut"))
    try:
        sft = fit_start(folder) if options.start is None else None
        if options.keep:
            print(json.dumps(sft))
            shutil.copytree(start, options.keep, dirs_exist_ok=True)
            return
        gc.collect()
        start, seconds = options.start or start, {}
        began = time.perf_counter()
        run(command(start, whole), folder / "whole.log")
        seconds["whole"] = time.perf_counter() - began
        expected, steps, begun_at = digest(whole), logs(whole), digest(start)
        print(json.dumps(steps, indent=1), flush=True)
        shutil.rmtree(whole)
        began = time.perf_counter()
        saved = cut / f"checkpoint-{AXPO['save-steps']}" / "trainer_state.json"
        run(command(start, cut), folder / "cut.log", saved)
        seconds["killed"] = time.perf_counter() - began
        said = run(command(start, cut, "--resume"), folder / "resumed.log")
        seconds["resumed"] = time.perf_counter() - began - seconds["killed"]
        seconds["all"] = time.perf_counter() - first
        result = {
            "model": "SmolLM2-135M-Instruct, fp32", "sft": sft, "options": AXPO, "threads": torch.get_num_threads(),
            "cpu_count": os.cpu_count(), "seconds": seconds, "steps": steps,
            "resumed_from": re.findall(r"resuming from (\S+)", said)[0],
            "sha256": {"start": begun_at, "whole": expected, "resumed": digest(cut)},
            "same_log": logs(cut) == steps,
        }  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result, indent=1))
    if result["sha256"]["resumed"] != expected or not result["same_log"]:
        raise SystemExit("the resumed run differs from the one that was not killed")
    if expected == begun_at or not any(log["axpo/resampled_rows"] for log in steps):
        raise SystemExit("nothing was trained or nothing resampled")
    if sft is not None:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        print(markdown(result))


if __name__ == "__main__":
    main()
