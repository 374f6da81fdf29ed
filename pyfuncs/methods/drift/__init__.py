"""DRIFT (arXiv 2605.31455): multi-turn episodes of a fixed policy, weights of their returns, one weighted fine-tuning.

Names are looked up on first use: importing this package imports neither torch nor TRL.
"""

from __future__ import annotations

from ..lazy import lazy

_HOMES = {
    "DriftConfig": "trainer", "DriftTrainer": "trainer", "Episode": "episode", "read_episodes": "episode",
    "WeightOptions": "returns", "episode_return": "returns", "softmax_weights": "returns", "weigh": "rows",
    "weighted_rows": "rows", "collect": "episodes", "solved_at": "episodes", "task_prompts": "verify",
    "task_verifier": "verify", "TransformersEngine": "engines", "VLLMEngine": "engines",
}  # fmt: skip

__all__ = [
    "DriftConfig", "DriftTrainer", "Episode", "TransformersEngine", "VLLMEngine", "WeightOptions", "collect",
    "episode_return", "read_episodes", "softmax_weights", "solved_at", "task_prompts", "task_verifier", "weigh",
    "weighted_rows",
]  # fmt: skip


__getattr__, __dir__ = lazy(__name__, _HOMES)
