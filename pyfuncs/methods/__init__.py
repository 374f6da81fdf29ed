"""The methods as a user meets them: trainers and tools.  These need the ``train`` extra.

Names are looked up on first use, so that ``import burnish.methods`` imports neither transformers nor TRL.
"""

from __future__ import annotations

from .lazy import lazy

_HOMES = {
    "TargetSFTTrainer": "target_sft", "fuse_lm_head": "fused_head", "FusedHead": "fused_head",
    "fuse_policy_head": "policy_head", "PolicyHead": "policy_head", "load_model": "models", "accuracy": "evaluate",
    "fuse_oft": "fused_oft", "FusedOFT": "fused_oft",
    "AXPOConfig": "axpo.config", "AXPOTrainer": "axpo.trainer",
    "DriftConfig": "drift.trainer", "DriftTrainer": "drift.trainer",
    "HyperEpochConfig": "q0.config", "HyperEpochTrainer": "q0.trainer",
    "RARFTTrainer": "ra_rft.trainer", "RetrieverTrainer": "ra_rft.retriever",
}  # fmt: skip

__all__ = [
    "AXPOConfig", "AXPOTrainer", "DriftConfig", "DriftTrainer", "FusedHead", "FusedOFT", "HyperEpochConfig",
    "HyperEpochTrainer", "PolicyHead", "RARFTTrainer", "RetrieverTrainer", "TargetSFTTrainer", "accuracy",
    "fuse_lm_head", "fuse_oft", "fuse_policy_head", "load_model",
]  # fmt: skip


__getattr__, __dir__ = lazy(__name__, _HOMES)
