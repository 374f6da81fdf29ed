"""The demos' options, apart from the demos so that the command line need not import a trainer to list them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


def check_counts(options: Any, *names: str, least: int = 1) -> None:
    """ValueError naming the first of these fields that is less than ``least``."""
    for name in names:
        if getattr(options, name) < least:
            raise ValueError(f"{name.replace('_', '-')} must be at least {least}; got {getattr(options, name)}")


def check_positive(options: Any, *names: str) -> None:
    """ValueError naming the first of these fields that is not greater than 0."""
    for name in names:
        if not getattr(options, name) > 0:
            raise ValueError(f"{name.replace('_', '-')} must be > 0; got {getattr(options, name)}")


def numbers(options: Any, *but: str) -> list[str]:
    """The names of a demo's fields, in order, without ``output`` and those of ``but``."""
    return [field.name for field in fields(options) if field.name not in ("output", *but)]


@dataclass(frozen=True)
class DemoOptions:
    """What ``burnish demo sft`` runs; the defaults take about ten minutes on two cores."""

    model: str = "smollm2"
    steps: int = 50
    batch_size: int = 16
    learning_rate: float = 2e-4
    eta: float = 0.1
    problems: int = 128
    seed: int = 1
    output: str = "runs/demo-sft"

    def check(self) -> DemoOptions:
        """Itself; ValueError for a value that cannot be."""
        check_counts(self, "steps", "batch_size", "problems")
        check_positive(self, "learning_rate")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1]; got {self.eta}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0; got {self.seed}")
        return self


@dataclass(frozen=True)
class RecallDemoOptions:
    """What ``burnish demo qk-restore`` runs.  ``workers``: seeds at once; ``problems``: of each task and length (fewer
    long ones)."""

    seeds: int = 5
    pretrain_steps: int = 600
    sft_steps: int = 300
    sft_learning_rate: float = 1e-3
    batch_size: int = 32
    problems: int = 128
    seed: int = 0
    workers: int = 2
    output: str = "runs/demo-qk-restore"

    def check(self) -> RecallDemoOptions:
        """Itself; ValueError for a value that cannot be."""
        check_positive(self, *numbers(self, "seed"))
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0; got {self.seed}")
        return self
