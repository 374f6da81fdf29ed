"""``HyperEpochConfig``: transformers' ``TrainingArguments`` with cycles in the place of epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainingArguments

from .perturbation import perturbation_scale
from .schedule import batch_sizes, wd_mult

#: Of TrainingArguments: what the cycles decide, and how to say it instead.
_DECIDED = {
    "max_steps": "cycles and epochs_per_cycle", "num_train_epochs": "cycles and epochs_per_cycle",
    "lr_scheduler_type": "lr_schedule, lr_floor, cycle_warmup and cycle_warmdown", "lr_scheduler_kwargs": "lr_floor",
    "warmup_steps": "cycle_warmup", "warmup_ratio": "cycle_warmup", "label_smoothing_factor": "distill_share",
    "auto_find_batch_size": "per_device_train_batch_size", "ignore_data_skip": "nothing: data is skipped at no cost",
    "dataloader_drop_last": "nothing: a cycle's rows that fill no step are left out",
    "train_sampling_strategy": "nothing: documents are shuffled for each epoch",
}  # fmt: skip
_CHOICES = {
    "lr_schedule": ("cycles", "once"), "snapshot_dtype": ("bfloat16", "float16", "float32"),
    "optimizer": ("adamw", "muon"),
}  # fmt: skip


@dataclass
class HyperEpochConfig(TrainingArguments):
    """``transformers.TrainingArguments`` and q0's options; the defaults of those are the published program's.

    Args:
        cycles, epochs_per_cycle: the run is so many cycles of so many passes over the training documents; a snapshot
            is taken at the end of each.  They take the place of ``max_steps`` and ``num_train_epochs``.
        seq_length: labels a row.
        lr_floor, wd_floor: floors of the multipliers of rate and decay within a cycle (``lr_mult``, ``wd_mult``);
            ``wd_floor`` 1 keeps the decay flat.
        cycle_warmup, cycle_warmdown: shares of a cycle.
        lr_schedule: "cycles"; or "once", one such cycle over the whole run, the snapshots taken as ever: the control.
        batch_floor: share of ``per_device_train_batch_size`` in the first and last quarter of the cycles (the
            published triangle: 0.75).
        distill_share, distill_temperature: a and T of (1 - a) CE + a T^2 KL(teacher_T | student_T), the teacher the
            snapshot before; share 0 is plain cross-entropy.
        distill_after_cycles: cycles without a teacher.
        perturb_first, perturb_last: scale of the noise after the first and the last cycle; 0 and 0 for none.
        fitness_share: share of the training tokens, whole documents from the front, that are never trained on and that
            the prior is learned on, where no ``fitness_dataset`` is given.
        snapshot_dtype: of the stored weights; fitness is that of the stored weights.
        optimizer: "adamw" (whatever ``optim`` says), or "muon" (``MuonAdamW``).
        softcap: z = softcap tanh(z / softcap) on the logits; written into the model's config as
            ``final_logit_softcapping``.  None leaves the model's own.
        weight_decay: 0.1 here; 0 in transformers.

    ValueError naming the option and its value, for values out of range and for options that cycles decide.
    """

    cycles: int = 8
    epochs_per_cycle: int = 2
    seq_length: int = 1024
    lr_floor: float = 0.08
    wd_floor: float = 0.7
    cycle_warmup: float = 0.0
    cycle_warmdown: float = 0.0
    lr_schedule: str = "cycles"
    batch_floor: float = 1.0
    distill_share: float = 0.45
    distill_temperature: float = 1.2
    distill_after_cycles: int = 8
    perturb_first: float = 0.25
    perturb_last: float = 0.05
    fitness_share: float = 0.02
    snapshot_dtype: str = "bfloat16"
    optimizer: str = "adamw"
    softcap: float | None = None
    weight_decay: float = 0.1

    def __post_init__(self):
        defaults = {f.name: f.default for f in fields(TrainingArguments)}
        for name, instead in _DECIDED.items():
            if name in defaults and getattr(self, name) not in (defaults[name], None):
                raise ValueError(f"{name}={getattr(self, name)!r}: cycles decide it; use {instead}")
        check({f.name: getattr(self, f.name) for f in fields(self)})
        super().__post_init__()

    def perturbation(self, cycle: int) -> float:
        """Scale of the noise at the end of ``cycle``, from 0."""
        return perturbation_scale(cycle, self.cycles, self.perturb_first, self.perturb_last)


def check(values: Mapping[str, Any]) -> None:
    """ValueError, naming the option and its value, for one of q0's own options that is out of range."""
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {values[name]!r}")
    for name, least in (("cycles", 1), ("epochs_per_cycle", 1), ("seq_length", 1), ("distill_after_cycles", 1)):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number, at least {least}; got {value!r}")
    for name in ("perturb_first", "perturb_last"):
        if not 0 <= values[name] < math.inf:
            raise ValueError(f"{name} must be a number, at least 0; got {values[name]}")
    share, temperature, fitness, softcap = (
        values[name] for name in ("distill_share", "distill_temperature", "fitness_share", "softcap")
    )
    if not 0 <= share <= 1:
        raise ValueError(f"distill_share must lie in [0, 1]; got {share}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"distill_temperature must be above 0; got {temperature}")
    if not 0 < fitness < 1:
        raise ValueError(f"fitness_share must lie in (0, 1); got {fitness}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be above 0, or None; got {softcap}")
    # the schedule's own checks; warm-up and warm-down are this class's names for its arguments
    try:
        warm = {name: values[f"cycle_{name}"] for name in ("warmup", "warmdown")}
        wd_mult(0, 1, floor=values["wd_floor"], lr_floor=values["lr_floor"], **warm)
    except ValueError as error:
        raise ValueError(str(error).replace("warm", "cycle_warm")) from None
    batch_sizes(values["cycles"], 1, values["batch_floor"])
