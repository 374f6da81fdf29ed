"""The options of ``burnish demo drift``; importing them imports neither torch nor a trainer."""

from __future__ import annotations

from dataclasses import dataclass

from ..demo_options import check_counts, check_positive, numbers


@dataclass(frozen=True)
class DriftDemoOptions:
    """A toy whose right answers are known: DRIFT, its variants and rejection sampling from one reference policy, over
    several seeds; a table with confidence intervals and a plot.  Under ten minutes on two cores."""

    seeds: int = 5
    prompts: int = 400
    trajectories: int = 16
    turns: int = 4
    steps: int = 200
    batch_size: int = 64
    learning_rate: float = 1e-3
    reference_steps: int = 1500
    problems: int = 1000
    output: str = "runs/demo-drift"

    def check(self) -> DriftDemoOptions:
        """Itself; ValueError for a value that cannot be."""
        check_counts(self, *numbers(self, "learning_rate"))
        check_positive(self, "learning_rate")
        if self.prompts + self.problems > 3360:
            raise ValueError(f"prompts and problems must be at most 3360 together; got {self.prompts + self.problems}")
        return self
