"""``burnish drift`` with real parts: SmolLM2-135M on a reasoning-gym task over several turns, killed twice and resumed.

    python benchmarks/drift_run.py [--output benchmarks/results/drift_run.json]

Two rounds of collecting and training, a few steps each: it shows that the plumbing is real, not that a model improves.
The run that was killed (SIGKILL while episodes are written, and while the model is trained) must end with the bits of
the one that was not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

OPTIONS = {
    "data": "reasoning-gym:chain_sum",
    "data-args": "{size: 6, seed: 3, min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}",
    "instruction": "Answer with the number only.", "answer-pattern": r"(-?\d+)", "trajectories": 4, "max-turns": 3,
    "max-new-tokens": 12, "rollout-batch": 12, "refresh": 1, "batch-size": 4, "accumulation": 2, "max-steps": 3,
    "save-steps": 1, "logging-steps": 1, "learning-rate": 1e-5, "eval-size": 16,
}  # fmt: skip


def command(model: Path, output: Path, *more: str) -> list[str]:
    flags = [x for name, value in OPTIONS.items() for x in (f"--{name}", str(value))]
    start = [sys.executable, "-m", "burnish.cli", "drift", "--model", str(model), "--output", str(output)]
    return [*start, *flags, "--set", "save_total_limit=1", *more]


def run(arguments: list[str], until=None) -> None:
    """To its end, or to SIGKILL when ``until()`` holds."""
    process = subprocess.Popen(arguments)
    while until is not None and process.poll() is None and not until():
        time.sleep(0.01)
    if until is not None:
        if process.poll() is not None:
            raise SystemExit("the run ended before it was killed")
        process.send_signal(signal.SIGKILL)
    if process.wait() not in (0, -signal.SIGKILL):
        raise SystemExit(f"burnish drift ended with {process.returncode}")


def digests(output: Path) -> dict[str, str]:
    found = [p for kind in ("episodes.jsonl", "model.safetensors") for p in sorted(output.glob(f"round-*/{kind}"))]
    return {str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="benchmarks/results/drift_run.json")
    target = Path(parser.parse_args().output)
    from burnish.methods.drift import read_episodes, weigh
    from burnish.methods.models import load_model

    folder = Path(tempfile.mkdtemp(prefix="drift-run-"))
    try:
        model, tokenizer = load_model("smollm2")
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        del model
        started = time.perf_counter()
        run(command(folder / "model", folder / "whole"))
        seconds = time.perf_counter() - started
        expected = digests(folder / "whole")
        rounds = []
        for one in sorted((folder / "whole").glob("round-*")):
            history = json.loads((one / "trainer_state.json").read_text())["log_history"]
            logged = ("loss", "weight_mean", "weight_entropy", "effective_sample_size", "success_share", "grad_norm")
            steps = [{k: e[k] for k in logged if k in e} for e in history if "loss" in e]
            rounds.append({**weigh(read_episodes(one / "episodes.jsonl")).statistics, "steps": steps})
        evaluation = json.loads((folder / "whole" / "evaluation.json").read_text())["solved_at"]
        shutil.rmtree(folder / "whole")
        cut = folder / "cut"
        lines = cut / "round-0" / "episodes.jsonl"
        run(command(folder / "model", cut), lambda: lines.exists() and lines.read_bytes().count(b"\n") >= 5)
        left = lines.read_bytes().count(b"\n")
        run(command(folder / "model", cut, "--resume"), (cut / "round-0" / "checkpoint-2").exists)
        run(command(folder / "model", cut, "--resume"))
        equal = digests(cut) == expected
        results = {
            "model": "SmolLM2-135M-Instruct, fp32", "options": OPTIONS, "threads": torch.get_num_threads(),
            "cpu_count": os.cpu_count(), "seconds": seconds, "rounds": rounds, "solved_at": evaluation,
            "lines_at_first_kill": left, "resumed_run_is_bit_equal": equal,
        }  # fmt: skip
        target.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results, indent=1))
        if not equal:
            raise SystemExit("the resumed run differs from the one that was not killed")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
