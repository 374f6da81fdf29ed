"""The demos' options, apart from the demos so that the command line need not import a trainer to list them."""

from __future__ import annotations

from dataclasses import dataclass, fields


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
        for name in ("steps", "batch_size", "problems"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning-rate must be > 0; got {self.learning_rate}")
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
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("output", "seed") and not value > 0:
                raise ValueError(f"{field.name.replace('_', '-')} must be > 0; got {value}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0; got {self.seed}")
        return self
