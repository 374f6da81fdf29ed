"""An arena small enough for a test: the demo's toy, untrained, a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from burnish.methods.peft_arena import toy

ROWS = "burnish.methods.peft_arena.toy:rows"


def base(folder: Path, seed: int = 0) -> str:
    toy.model(seed).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return str(folder)


def suite(task: str, size: int = 16, **more) -> dict[str, Any]:
    return {"evaluator": "exact", "by": "token", "rows": ROWS, "args": {"task": task}, "size": size, **more}


def without_times(run: dict[str, Any]) -> dict[str, Any]:
    """A run's JSON less what takes another time each time."""
    return {**{k: v for k, v in run.items() if k not in ("seconds", "training")}, "loss": run["training"]["loss"]}


def values(model: str, output: Path, **more) -> dict[str, Any]:
    return {
        "model": model, "output": str(output), "data": ROWS, "data_args": {"task": "prefix", "size": 64},
        "target": {"prefix": suite("prefix")}, "retention": {t: suite(t) for t in ("copy", "sort")},
        "methods": [{"method": "oft", "block_size": 16, "lr": 1e-2}], "seeds": [0], "steps": 4,
        "rewind": {"grid": [0.0, 0.5, 1.0]}, "batch_size": 4, "save_steps": 100, "logging_steps": 1,
        "metrics": {"rows": 4}, **more,
    }  # fmt: skip
