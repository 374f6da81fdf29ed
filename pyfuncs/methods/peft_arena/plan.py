"""The runs of an arena: every method at every rate and seed, and the controls without which rewinding means nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .config import Config
from .techniques import match_budget, technique, trainable_parameters


@dataclass(frozen=True)
class Run:
    """One training.  ``control`` is "" or says in which way less is trained."""

    label: str
    technique: str
    arguments: Mapping[str, Any]
    rate: float
    steps: int
    seed: int
    control: str
    parameters: int
    budget: int | None

    @property
    def name(self) -> str:
        """A file's name, the same for the same run."""
        return f"{self.label}-lr{self.rate:g}-steps{self.steps}-seed{self.seed}"

    def settings(self) -> dict[str, Any]:
        """What JSON keeps of it."""
        return {**asdict(self), "arguments": dict(self.arguments)}

    def differs(self, found: Mapping[str, Any]) -> str | None:
        """The setting in which a JSON's run is another than this one; None where it is the same training."""
        own = self.settings()
        return next((n for n in ("technique", "arguments", "rate", "steps", "seed") if found.get(n) != own[n]), None)

    def has_all(self, found: Mapping[str, Any]) -> bool:
        """Whether a JSON's run of the same training has all that this one's must: a control is not rewound."""
        return bool(self.control) or not found.get("control")


def plan_runs(config: Config, model) -> list[Run]:
    """Every run, seed by seed, so that an arena that is cut short has whole seeds; ``model`` may be on the meta device.

    A method's control trains fewer steps, or at a lower rate, where its rate is the highest: there it forgets most.
    ValueError where a budget cannot be met.
    """
    sized = {}
    for m in config.methods:
        if m.budget is None:
            arguments = technique(m.technique).arguments(m.arguments)
            sized[m.label] = arguments, trainable_parameters(model, m.technique, **m.arguments)
        else:
            found = match_budget(model, m.technique, m.budget, **m.arguments)
            sized[m.label] = found.arguments, found.parameters
    out: dict[str, Run] = {}
    for seed in config["seeds"]:
        for m in config.methods:
            arguments, parameters = sized[m.label]
            cases = [(rate, config["steps"], "") for rate in m.rates]
            top = m.rates[-1]
            cases += [(top, n, f"{n} steps") for n in config["controls"].get("steps", [])]
            cases += [(top * s, config["steps"], f"lr x {s:g}") for s in config["controls"].get("lr_scale", [])]
            for rate, steps, control in cases:
                run = Run(m.label, m.technique, arguments, rate, steps, seed, control, parameters, m.budget)
                out.setdefault(run.name, run)  # a lower rate may be in the grid already
    return list(out.values())
