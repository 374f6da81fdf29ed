"""The options of ``burnish demo axpo``, apart from the demo so that listing them imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..demo_options import check_counts


@dataclass(frozen=True)
class AXPODemoOptions:
    """24 questions, half of which need a tool that hardly ever works at first: GRPO, GRPO with doubled rollouts, AXPO
    and two of its ablations, from the same starts.  The defaults take minutes on one core."""

    seeds: int = 5
    steps: int = 300
    output: str = "runs/demo-axpo"

    def check(self) -> AXPODemoOptions:
        """Itself; ValueError for a value that cannot be."""
        check_counts(self, "seeds", "steps")
        return self
