"""PEFT-Arena (arXiv 2605.28819): fine-tuning methods compared by what they learn and what they forget.

Names are looked up on first use: importing this package imports neither torch nor TRL.
"""

from __future__ import annotations

from ..lazy import lazy

_HOMES = {
    "Arena": "arena", "Budget": "techniques", "Config": "config", "Rewinding": "rewind", "Run": "plan",
    "Suite": "evaluators", "Technique": "techniques", "all_techniques": "techniques", "apply": "techniques",
    "choose_point": "rewind", "html": "report", "make_config": "config", "markdown": "report",
    "match_budget": "techniques", "minor_components": "techniques", "paths_of": "rewind", "plan_runs": "plan",
    "read_config": "config", "read_planned": "summary", "read_runs": "summary", "summarise": "summary",
    "trainable_parameters": "techniques", "travelled": "rewind",
}  # fmt: skip

__all__ = [
    "Arena", "Budget", "Config", "Rewinding", "Run", "Suite", "Technique", "all_techniques", "apply", "choose_point",
    "html", "make_config", "markdown", "match_budget", "minor_components", "paths_of", "plan_runs", "read_config",
    "read_planned", "read_runs", "summarise", "trainable_parameters", "travelled",
]  # fmt: skip


__getattr__, __dir__ = lazy(__name__, _HOMES)
