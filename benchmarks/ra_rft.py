"""``burnish ra-rft`` with real parts on this CPU: MiniLM, SmolLM2-135M, reasoning-gym; killed in its training, resumed.

    python benchmarks/ra_rft.py            # writes results/ra_rft.json; some minutes

The labels come from a judge that looks at the two problems (``same_steps``); a few pairs are measured by rollouts
beside it.  A few steps show that the plumbing is real, not that anything is learnt.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "ra_rft.json"
TASK = "reasoning-gym:chain_sum"
SIZES = "{{size: {size}, seed: {seed}, min_terms: 2, max_terms: 4, min_digits: 1, max_digits: 2}}"


def same_steps(question, document) -> bool:
    """A judge: the same number of additions and of subtractions."""
    a, b = (sorted(re.findall(r" ([+-]) ", text)) for text in (question.text, document.problem))
    return a == b


def command(output: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "burnish.cli", "ra-rft", "--model", "smollm2", "--data", TASK, "--corpus", TASK,
        "--data-args", SIZES.format(size=16, seed=0), "--corpus-args", SIZES.format(size=48, seed=1),
        "--judge", "ra_rft:same_steps", "--candidates", "0", "--retriever-epochs", "3", "--retriever-batch-size", "16",
        "--generations", "4", "--batch-size", "4", "--max-completion-length", "24", "--max-steps", "4",
        "--save-steps", "1", "--logging-steps", "1", "--output", str(output), *more,
    ]  # fmt: skip


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    output = folder / "run"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    first = subprocess.Popen(command(output), env=environment)
    while first.poll() is None and not (output / "checkpoint-2" / "trainer_state.json").exists():
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    killed = time.perf_counter() - started
    before = sorted(p.name for p in output.glob("checkpoint-*"))
    print(f"killed after {killed:.0f} s with {', '.join(before)}", flush=True)
    done = subprocess.run(command(output, "--resume"), env=environment, check=True, capture_output=True, text=True)
    print(done.stdout, done.stderr[-1500:], sep="\n")
    state = json.loads((output / "trainer_state.json").read_text())
    labels = [json.loads(x) for x in (output / "labels.jsonl").read_text().splitlines()]
    keys = ("step", "reward", "retrieval/recall@1", "retrieval/score", "entropy", "grad_norm")
    result = {
        "killed_after_s": killed, "checkpoints_when_killed": before,
        "resumed_from": re.findall(r"resuming from (\S+)", done.stderr),
        "pairs": len(labels), "positive": sum(row["label"] for row in labels),
        "retriever": re.findall(r"retriever: (.*)", done.stderr) or "trained before the kill",
        "steps": [{k: e[k] for k in keys if k in e} for e in state["log_history"] if "reward" in e],
        "rollout_benefits": benefits(), "seconds": time.perf_counter() - started,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    shutil.rmtree(folder)


def benefits() -> list[dict]:
    """The measured benefit of a worked problem for SmolLM2, 4 samples a prompt, on 2 questions and 2 documents."""
    from burnish.methods import load_model
    from burnish.methods.ra_rft import build_labels
    from burnish.methods.ra_rft.rewards import text_of_completion

    model, tokenizer = load_model("smollm2")

    def number(completions, answer, **_):
        """1 where the last number of a completion is the answer."""
        found = [re.findall(r"-?\d+", text_of_completion(c)) for c in completions]
        return [float(bool(f) and f[-1] == a) for f, a in zip(found, answer, strict=True)]

    questions = [
        {"prompt": f"State the final answer to: {q} =", "answer": a} for q, a in (("4 + 3", "7"), ("9 - 5", "4"))
    ]
    corpus = [{"problem": "State the final answer to: 2 + 6 =", "trace": r"2 + 6 = \boxed{8}"},
              {"problem": "State the final answer to: 8 - 1 =", "trace": r"8 - 1 = \boxed{7}"}]  # fmt: skip
    made = {"model": model.eval(), "tokenizer": tokenizer, "reward": number, "samples": 4, "max_new_tokens": 24}
    with tempfile.TemporaryDirectory() as folder:
        return build_labels(questions, corpus, "rollout", Path(folder) / "labels.jsonl", rollout=made)


if __name__ == "__main__":
    main()
