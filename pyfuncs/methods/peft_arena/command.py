"""``burnish peft-arena``: budgets, run, report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .config import Config, read_config

if TYPE_CHECKING:
    from .plan import Run


def run(path: str) -> Callable[[], None]:
    """Check an arena's file, data and suites; what is returned runs it."""
    from .arena import Arena

    return Arena(read_config(path)).run


def report(path: str) -> str:
    """Write the report of the file's runs that are there, all or not; what is printed."""
    from pathlib import Path

    from .report import write_report

    config = read_config(path)
    return write_report(Path(config["output"]), config, _plan(config))


def budgets(path: str) -> str:
    """What each method of a file trains, and how far that is from its budget; no weights are read."""
    return table(read_config(path))


def table(config: Config) -> str:
    """The rows that ``budgets`` prints."""
    runs = _plan(config)
    rows = [("method", "size", "trainable", "budget", "mismatch", "runs")]
    for label in dict.fromkeys(r.label for r in runs):
        mine = [r for r in runs if r.label == label]
        one = mine[0]
        size = next((f"{k} {one.arguments[k]}" for k in ("r", "block_size", "chunks") if k in one.arguments), "")
        off = "" if one.budget is None else f"{one.parameters / one.budget - 1:+.1%}"
        budget = "" if one.budget is None else f"{one.budget:,}"
        rows.append((label, size, f"{one.parameters:,}", budget, off, str(len(mine))))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join([*lines, f"{len(runs)} runs"])


def _plan(config: Config) -> list[Run]:
    import torch

    from ..chunkft_plan import empty_model
    from .plan import plan_runs

    return plan_runs(config, empty_model(config.model(config["seeds"][0]), torch.float32))
