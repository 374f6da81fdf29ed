"""The arena of ``burnish demo peft-arena --model smollm2``."""

from __future__ import annotations

from typing import Any

from ..data import load_task
from ..demo import TASK, TASK_ARGUMENTS, row
from .evaluators import SEEDS

_HERE = "burnish.methods.peft_arena.smollm"
#: The task whose answers should stay.
OTHER, OTHER_ARGUMENTS = "chain_sum", {"max_terms": 2, "max_digits": 1}
_SEEDS = {"train": 1, **SEEDS}


def reversals(size: int, split: str = "train") -> list[dict]:
    """prompt and completion of ``word_sequence_reversal``, as ``burnish demo sft`` writes them; no problem is in two
    splits."""
    taken: set[str] = set()
    for name, seed in _SEEDS.items():  # training first: its own rows do not depend on the others
        if name == split:
            break
        count = 1024 if name == "train" else 256
        taken |= {row(e)["prompt"] for e in load_task(TASK, size=count, seed=seed, **TASK_ARGUMENTS).entries}
    found = [row(e) for e in load_task(TASK, size=4 * size, seed=_SEEDS[split], **TASK_ARGUMENTS).entries]
    return [r for r in found if r["prompt"] not in taken][:size]


def sums(size: int, split: str = "train") -> list[dict]:
    """prompt and completion of sums of two digits; none of the tests is held out."""
    found = load_task(OTHER, size=4 * size, seed=_SEEDS[split], **OTHER_ARGUMENTS).entries
    taken: set[str] = set()
    if split == "held_out":
        taken |= {
            e["question"] for e in load_task(OTHER, size=4 * size, seed=_SEEDS["test"], **OTHER_ARGUMENTS).entries
        }
    entries = [e for e in found if e["question"] not in taken][:size]
    return [{"prompt": f"Question: {e['question'].strip()}\nAnswer:", "completion": f" {e['answer']}"} for e in entries]


def reference() -> str:
    """Python's language reference, which comes with it as the help of its interpreter."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


CONFIG: dict[str, Any] = {
    "data": f"{_HERE}:reversals", "data_args": {"size": 512},
    "target": {"reversal": {"evaluator": "exact", "by": "token", "rows": f"{_HERE}:reversals", "size": 16}},
    "retention": {
        "reference": {"evaluator": "nll", "text": f"{_HERE}:reference", "size": 6, "length": 64},
        "sums": {"evaluator": "exact", "by": "token", "rows": f"{_HERE}:sums", "size": 16},
    },
    "methods": [
        {"method": "full", "lr": 2e-4},
        {"method": "chunkft", "chunks": 3, "lr": 6e-4},
        {"method": "lora", "dropout": 0.0, "lr": 2e-3, "label": "lora"},
        {"method": "oft", "lr": 2e-3, "label": "oft"},
    ],
    "budget": 2_400_000, "steps": 12, "rewind": {"grid": [0.3, 0.6], "variants": ["line", "scale", "generator"]},
    "rule": {"best_sum": 1.0}, "metrics": {"rows": 4},
    "batch_size": 8, "eval_batch_size": 16, "save_steps": 1000, "logging_steps": 1,
}  # fmt: skip
