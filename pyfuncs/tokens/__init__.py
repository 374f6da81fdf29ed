"""Token selection for visual geometry transformers (arXiv 2605.23892): a drop-in, and what it is made of."""

from .accelerate import Handle, accelerate, restore
from .frames import nearest_sets, pooled, seeded_sets, shared_set
from .grid import Layout, frame_rows, grid_size, grid_tokens, head_phases
from .lists import SelectionContext
from .report import LayerReport, Report
from .rule import AdaptiveRule, LayerRule, Probe

__all__ = [
    "AdaptiveRule", "Handle", "LayerReport", "LayerRule", "Layout", "Probe", "Report", "SelectionContext",
    "accelerate", "frame_rows", "grid_size", "grid_tokens", "head_phases", "nearest_sets", "pooled", "restore",
    "seeded_sets", "shared_set",
]  # fmt: skip
