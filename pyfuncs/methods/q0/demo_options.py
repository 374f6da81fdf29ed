"""The options of ``burnish demo q0``; importing them imports neither torch nor a trainer."""

from __future__ import annotations

from dataclasses import dataclass

from ..demo_options import check_positive, numbers


@dataclass(frozen=True)
class Q0DemoOptions:
    """A transformer of 0.25M parameters on 25 KB of Python's own library, far beyond the epochs that one run can use:
    q0, its parts left out, and the baselines that could win, at equal total epochs; several seeds, a table with
    confidence intervals and a plot.  What is finished in ``output`` is not run again."""

    seeds: int = 3
    epochs: int = 32
    epochs_per_cycle: int = 2
    distill_after: int = 2
    runs: int = 4
    batch_size: int = 4
    learning_rate: float = 3e-3
    weight_decay: float = 1.0
    processes: int = 2
    output: str = "runs/demo-q0"

    def check(self) -> Q0DemoOptions:
        """Itself; ValueError for a value that cannot be."""
        check_positive(self, *numbers(self))
        for name, parts in (("runs", self.runs), ("two trajectories", 2)):
            if self.epochs % (parts * self.epochs_per_cycle):
                raise ValueError(
                    f"epochs must be a multiple of epochs-per-cycle times {parts} ({name}); got {self.epochs}"
                )
        return self
