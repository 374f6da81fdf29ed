"""``burnish demo peft-arena``: an arena on this machine, nothing fetched.

toy: a Llama of 0.13M parameters that knows six sequence tasks is fine-tuned on a seventh; a base model a seed.
smollm2: SmolLM2-135M learns to reverse words; what should stay is the likelihood of Python's reference, and sums.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...paths import atomic_directory
from ..demo_results import publish
from ..models import load_model
from . import toy
from .arena import Arena
from .config import Config, make_config
from .demo_options import PeftArenaDemoOptions

_HERE = "burnish.methods.peft_arena"
PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def toy_config(options: PeftArenaDemoOptions) -> Config:
    """The toy's arena."""

    def suite(task: str) -> dict[str, Any]:
        rows = {"rows": f"{_HERE}.toy:rows", "args": {"task": task}, "size": 128}
        return {"evaluator": "exact", "by": "token", **rows}

    out = Path(options.output)
    rates, higher, steps = [1e-4, 3e-4, 1e-3], [3e-4, 1e-3, 3e-3], options.steps or 200
    return make_config({
        "model": str(out / "base-{seed}"), "output": str(out / "arena"), "data": f"{_HERE}.toy:rows",
        "data_args": {"task": toy.TARGET, "size": 8192},
        "target": {toy.TARGET: suite(toy.TARGET)},
        "retention": {t: suite(t) for t in toy.TASKS if t != toy.TARGET},
        "methods": [
            {"method": "full", "lr": rates},
            {"method": "chunkft", "chunks": 4, "lr": higher},
            {"method": "lora", "dropout": 0.0, "lr": higher, "label": "lora"},
            {"method": "oft", "lr": higher, "label": "oft"},
        ],
        "budget": 23808, "seeds": list(range(options.seeds)), "steps": steps,
        "controls": {"steps": [steps // 4] if steps > 3 else []},  # the lower rates are controls too
        "rewind": {"grid": [0.2, 0.4, 0.6, 0.8]}, "rule": {"best_sum": 1.0},
        "metrics": {"modules": PARTS, "rows": 16},
        "batch_size": 32, "eval_batch_size": 256, "save_steps": 1000, "logging_steps": 25,
    })  # fmt: skip


def smollm_config(options: PeftArenaDemoOptions) -> Config:
    """SmolLM2's arena: few steps, short rows, small suites, so that two CPU cores do."""
    from . import smollm

    given: dict[str, Any] = {"model": str(Path(options.output) / "base"), "output": str(Path(options.output) / "arena")}
    given |= {"seeds": list(range(options.seeds)), "steps": options.steps or smollm.CONFIG["steps"]}
    return make_config({**smollm.CONFIG, **given})


def run(options: PeftArenaDemoOptions) -> dict:
    """Make the base models where there are none, run the arena on, and publish; returns the results."""
    started = time.perf_counter()
    out = Path(options.output)
    if options.model == "toy":
        for seed in range(options.seeds):
            if not (out / f"base-{seed}").is_dir():
                toy.pretrain(out / f"base-{seed}", seed, options.pretrain_steps)
        config = toy_config(options)
    else:
        if not (out / "base").is_dir():  # reading the package's GGUF file takes a minute, this a second
            model, tokenizer = load_model("smollm2")
            with atomic_directory(out / "base") as made:
                model.save_pretrained(made)
                tokenizer.save_pretrained(made)
        config = smollm_config(options)
    arena = Arena(config)
    arena.run()
    from . import plot, summary

    runs, others = summary.read_planned(config["output"], arena.runs)
    found = summary.summarise(runs, config["forgetting"], others)
    results = {
        "options": asdict(options), "summary": found,
        "seconds": sum(r.get("seconds", 0.0) for r in runs), "seconds_now": time.perf_counter() - started,
    }  # fmt: skip
    publish(results, out, markdown, lambda r, file: plot.plot(r["summary"], file))
    return results


def markdown(results: dict) -> str:
    """The tables of a demo's results; of the metrics those that go with forgetting most."""
    from .report import markdown

    found = dict(results["summary"])
    found["correlations"] = found["correlations"][:12]
    return markdown(found)
