"""The options of ``burnish demo ra-rft``, apart from it so that the command line need not import a trainer."""

from __future__ import annotations

from dataclasses import dataclass

from ..demo_options import check_counts, check_positive


@dataclass(frozen=True)
class RARFTDemoOptions:
    """What ``burnish demo ra-rft`` runs; the defaults are the toy of the specification.  ``workers``: seeds at once."""

    seeds: int = 5
    steps: int = 150
    prompts: int = 32
    generations: int = 16
    learning_rate: float = 1e-3
    corpus: int = 400
    problems: int = 512
    base_steps: int = 1200
    seed: int = 0
    workers: int = 2
    output: str = "runs/demo-ra-rft"

    def check(self) -> RARFTDemoOptions:
        """Itself; ValueError for a value that cannot be."""
        check_counts(self, "seeds", "steps", "prompts", "corpus", "problems", "base_steps", "workers")
        check_counts(self, "generations", least=2)
        check_positive(self, "learning_rate")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0; got {self.seed}")
        return self
