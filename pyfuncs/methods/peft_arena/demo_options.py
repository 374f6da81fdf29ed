"""The demo's options, apart from it so that the command line need not import a trainer to list them."""

from __future__ import annotations

from dataclasses import dataclass

from ..demo_options import check_counts


@dataclass(frozen=True)
class PeftArenaDemoOptions:
    """What ``burnish demo peft-arena`` runs: "toy", a model of 0.13M parameters made here, or "smollm2"; 0 stands for
    that model's own default."""

    model: str = "toy"
    seeds: int = 3
    steps: int = 0
    pretrain_steps: int = 600
    output: str = "runs/demo-peft-arena"

    def check(self) -> PeftArenaDemoOptions:
        """Itself; ValueError for a value that cannot be."""
        if self.model not in ("toy", "smollm2"):
            raise ValueError(f"model must be toy or smollm2; got {self.model!r}")
        check_counts(self, "seeds", "pretrain_steps")
        check_counts(self, "steps", least=0)
        return self
