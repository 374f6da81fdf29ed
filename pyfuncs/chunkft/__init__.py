"""ChunkFT: full fine-tuning, one chunk of the parameters at a time (arXiv 2605.21177)."""

from .memory import MemoryEstimate
from .optimizer import ChunkAdamW
from .plan import ChunkPlan, Segment, plan

__all__ = ["ChunkAdamW", "ChunkPlan", "MemoryEstimate", "Segment", "plan"]
