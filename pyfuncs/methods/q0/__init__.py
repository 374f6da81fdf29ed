"""q0: many epochs over a fixed text as a population of snapshots, mixed at inference (arXiv 2606.03938).

The parts, looked up on first use: the schedule for any optimizer, the perturbation, Muon beside AdamW, documents and
their rows, snapshots and their cached log-probabilities.  ``HyperEpochTrainer`` is made of them.
"""

from __future__ import annotations

from ..lazy import lazy

_HOMES = {
    "CycleScheduler": "schedule", "batch_sizes": "schedule", "lr_mult": "schedule", "wd_mult": "schedule",
    "perturb": "perturbation", "perturbation_scale": "perturbation", "MuonAdamW": "optimizers",
    "log_probs_of": "snapshots", "token_log_probs": "snapshots",
    "HyperEpochConfig": "config", "HyperEpochTrainer": "trainer",
    "Ensemble": "ensemble", "data_efficiency": "efficiency", "equivalent_tokens": "efficiency",
    "Prior": "prior", "check_split": "prior", "choose_k": "prior", "effective_size": "prior", "learn_prior": "prior",
    "mixture_logp": "prior", "mixture_nll": "prior", "sweep_k": "prior", "top_k": "prior",
}  # fmt: skip

__all__ = [
    "CycleScheduler", "Ensemble", "HyperEpochConfig", "HyperEpochTrainer", "MuonAdamW", "Prior", "batch_sizes",
    "check_split", "choose_k", "data_efficiency", "effective_size", "equivalent_tokens", "learn_prior", "log_probs_of",
    "lr_mult", "mixture_logp", "mixture_nll", "perturb", "perturbation_scale", "sweep_k", "token_log_probs", "top_k",
    "wd_mult",
]  # fmt: skip


__getattr__, __dir__ = lazy(__name__, _HOMES)
