"""burnish: fused kernels for fine-tuning objectives, and the methods on top.

Importing it touches no device, compiles nothing, reads no environment and imports neither
transformers nor TRL; ``burnish.methods`` does.
"""

from . import chunkft, objectives
from .chunkft import ChunkAdamW
from .objectives import Objective, RowStats, objective
from .ops.linear_loss import linear_loss
from .ops.linear_stats import linear_stats
from .ops.lora import LoRAHead
from .ops.row_loss import implied_target, row_loss
from .ops.sinks import HostSink
from .ops.teacher import Teacher

__version__ = "0.1.0"

__all__ = [
    "ChunkAdamW", "HostSink", "LoRAHead", "Objective", "RowStats", "Teacher", "chunkft", "implied_target",
    "linear_loss", "linear_stats", "objective", "objectives", "row_loss",
]  # fmt: skip
