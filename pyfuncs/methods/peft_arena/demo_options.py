"""The demo's options, apart from it so that the command line need not import a trainer to list them."""

from __future__ import annotations

from dataclasses import dataclass, fields


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
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "steps" else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{field.name.replace('_', '-')} must be at least {least}; got {value}")
        return self
