"""AXPO with real parts on this CPU: SmolLM2-135M, the calculator through TRL's tool loop, reasoning-gym sums.

    python benchmarks/axpo_run.py [--steps 2]

Runs `burnish axpo` whole, and again killed (SIGKILL) after its first checkpoint and resumed; the two end at the same
bits or this script fails.  Writes benchmarks/results/axpo_run.json.  It shows that the parts work together, nothing
about learning: the model is small, its start was never trained on tool calls, and the steps are few.

SmolLM2's chat template does not know tools, so Qwen 2.5's (also ChatML) is used, and one worked example in the prompt
says what a call looks like.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "axpo_run.json"
SYSTEM = "Use the calculator, then answer with the number alone."


def example(expression: str, value: str) -> list[dict]:
    """A question that is answered with one call."""
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": expression}}}
    return [
        {"role": "user", "content": f"{expression} = ?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": value},
        {"role": "assistant", "content": value},
    ]


def write_questions(path: Path, count: int) -> None:
    """Sums of two numbers from reasoning-gym, asked as in the example."""
    from burnish.methods.data import load_task

    shape = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
    task = load_task("chain_sum", size=count, seed=7, **shape)
    with path.open("w") as file:
        for entry in task.entries:
            expression = entry["metadata"]["expression"]
            prompt = [{"role": "system", "content": SYSTEM}, *example("21 + 43", "64")]
            prompt.append({"role": "user", "content": f"{expression} = ?"})
            file.write(json.dumps({"prompt": prompt, "answer": str(entry["answer"])}) + "\n")


def command(output: Path, data: Path, steps: int, *more: str) -> list[str]:
    """A question of eight rollouts a step."""
    return [
        sys.executable, "-m", "burnish.cli", "axpo", "--model", "smollm2", "--data", str(data), "--output", str(output),
        "--generations", "8", "--batch-size", "8", "--budget", "0.5", "--resamples", "2",
        "--max-completion-length", "64", "--learning-rate", "1e-6", "--max-steps", str(steps), "--save-steps", "1",
        "--logging-steps", "1", "--set", "save_total_limit=2", *more,
    ]  # fmt: skip


def run(arguments: list[str], kill_when: Path | None = None) -> float:
    """Seconds of the command; killed once ``kill_when`` is there."""
    begun = time.perf_counter()
    process = subprocess.Popen(arguments, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    while process.poll() is None:
        if kill_when is not None and kill_when.exists():
            time.sleep(1.0)  # into the next step
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.2)
    if kill_when is None and process.returncode:
        raise SystemExit(f"failed: {' '.join(arguments)}")
    if kill_when is not None and process.returncode != -signal.SIGKILL:
        raise SystemExit("the run ended before it was killed")
    return time.perf_counter() - begun


def markdown(result: dict) -> str:
    """The results as docs show them."""
    names = ("reward", "axpo/tool_rate", "axpo/trigger_rate", "axpo/resampled_rows", "axpo/recovered_rate")
    rows = [["step", *(n.removeprefix("axpo/").replace("_", " ") for n in names)]]
    rows.append(["---"] * len(rows[0]))
    for step, log in enumerate(result["logs"], 1):
        rows.append([str(step), *("-" if log.get(n) is None else f"{log[n]:.3g}" for n in names)])
    same = "to the same bits" if result["resumed_to_the_same_bits"] else "elsewhere"
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([
        f"{result['model']}, a question of eight rollouts a step, {result['steps']} steps in "
        f"{result['seconds']:.0f} s on {result['threads']} thread(s); killed after the first checkpoint and resumed, "
        f"it ended {same}.", "", *lines,
    ])  # fmt: skip


def main() -> None:
    """Both runs, the comparison, the file of results."""
    import torch
    from safetensors.torch import load_file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "axpo")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    data, whole, cut = (options.folder / name for name in ("questions.jsonl", "whole", "cut"))
    write_questions(data, options.steps)
    seconds = run(command(whole, data, options.steps, "--overwrite"))
    run(command(cut, data, options.steps, "--overwrite"), kill_when=cut / "checkpoint-1" / "trainer_state.json")
    run(command(cut, data, options.steps, "--resume"))
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    start = load_file(whole / "checkpoint-1" / "model.safetensors")
    same = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    keep = ("loss", "reward", "kl", "entropy", "tools/call_frequency", "tools/failure_frequency", "step_time")
    logs = [{k: v for k, v in e.items() if k in keep or k.startswith("axpo/")} for e in history if "loss" in e]
    result = {
        "model": "SmolLM2-135M-Instruct", "steps": options.steps, "seconds": seconds,
        "threads": torch.get_num_threads(), "resumed_to_the_same_bits": same,
        "moved": any(not torch.equal(a[k], start[k]) for k in a), "logs": logs,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if not same:
        raise SystemExit("the resumed run ended elsewhere")


if __name__ == "__main__":
    main()
