"""q0: many epochs over a fixed text as a population of snapshots, mixed at inference (arXiv 2606.03938).

The parts, looked up on first use: the schedule for any optimizer, the perturbation, Muon beside AdamW, documents and
their rows, snapshots and their cached log-probabilities.  ``HyperEpochTrainer`` is made of them.
"""

from __future__ import annotations

from ..lazy import lazy

_HOMES = {
    "CycleScheduler": "schedule", "batch_sizes": "schedule", "lr_mult": "schedule", "wd_mult": "schedule",
    "perturb": "perturb", "perturbation_scale": "perturb", "MuonAdamW": "optimizers",
    "log_probs_of": "snapshots", "token_log_probs": "snapshots",
    "HyperEpochConfig": "config", "HyperEpochTrainer": "trainer",
}  # fmt: skip

__all__ = [
    "CycleScheduler", "HyperEpochConfig", "HyperEpochTrainer", "MuonAdamW", "batch_sizes", "log_probs_of", "lr_mult",
    "perturb", "perturbation_scale", "token_log_probs", "wd_mult",
]  # fmt: skip


__getattr__, __dir__ = lazy(__name__, _HOMES)
