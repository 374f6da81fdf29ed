"""The methods as a user meets them: trainers and tools.  These need the ``train`` extra.

Names are looked up on first use, so that ``import burnish.methods`` imports neither transformers nor TRL.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "TargetSFTTrainer": "target_sft", "fuse_lm_head": "fused_head", "FusedHead": "fused_head",
    "fuse_policy_head": "policy_head", "PolicyHead": "policy_head", "load_model": "models", "accuracy": "evaluate",
    "AXPOConfig": "axpo.config", "AXPOTrainer": "axpo.trainer",
    "DriftConfig": "drift.trainer", "DriftTrainer": "drift.trainer",
    "RARFTTrainer": "ra_rft.trainer", "RetrieverTrainer": "ra_rft.retriever",
}  # fmt: skip

__all__ = [
    "AXPOConfig", "AXPOTrainer", "DriftConfig", "DriftTrainer", "FusedHead", "PolicyHead", "RARFTTrainer",
    "RetrieverTrainer", "TargetSFTTrainer", "accuracy", "fuse_lm_head", "fuse_policy_head", "load_model",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
