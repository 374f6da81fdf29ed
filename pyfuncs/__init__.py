"""burnish: fused kernels for fine-tuning objectives, and the methods on top.

Importing it touches no device, compiles nothing, reads no environment and imports neither
transformers nor TRL; ``burnish.methods`` does.
"""

from . import chunkft, objectives, tokens
from .chunkft import ChunkAdamW
from .objectives import Objective, RowStats, objective
from .ops.attention_entropy import AttentionProbe, attention_entropy
from .ops.block_rotation import block_rotation
from .ops.farthest_frames import coverage_radius, farthest_frames
from .ops.linear_loss import linear_loss
from .ops.linear_stats import linear_stats
from .ops.lora import LoRAHead
from .ops.maxsim import maxsim
from .ops.row_loss import implied_target, row_loss
from .ops.selected_attention import AttentionOutput, attention_certificate, merge_attention, selected_attention
from .ops.sinks import HostSink
from .ops.teacher import Teacher

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput", "AttentionProbe", "ChunkAdamW", "HostSink", "LoRAHead", "Objective", "RowStats", "Teacher",
    "attention_certificate", "attention_entropy", "block_rotation", "chunkft", "coverage_radius", "farthest_frames",
    "implied_target", "linear_loss", "linear_stats", "maxsim", "merge_attention", "objective", "objectives", "row_loss",
    "selected_attention", "tokens",
]  # fmt: skip
