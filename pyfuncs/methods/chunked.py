"""``ChunkAdamW`` in a transformers Trainer: its arguments, and how its progress shows."""

from __future__ import annotations

import inspect
from typing import Any

from ..chunkft import ChunkAdamW

#: What the Trainer's own arguments give.
_TRAINERS = ("model", "lr", "betas", "eps", "weight_decay", "no_decay", "max_grad_norm", "plan", "group")


def check_arguments(arguments: dict[str, Any], where: str = "chunkft") -> None:
    """ValueError for a name that ``ChunkAdamW`` does not have, or that the Trainer's arguments give."""
    known = [name for name in inspect.signature(ChunkAdamW).parameters if name not in _TRAINERS]
    for name in arguments:
        if name in _TRAINERS:
            raise ValueError(f"{where}: {name} comes from the training arguments; leave it out")
        if name not in known:
            raise ValueError(f"{where}: ChunkAdamW has no argument {name!r}; it has {', '.join(known)}")


def trainer_optimizer(trainer, model, arguments: dict[str, Any]) -> ChunkAdamW:
    """A ``ChunkAdamW`` for a Trainer: rate, betas, decay, undecayed names and clipping are the Trainer's own.

    Clipping moves into ``step()``, after the mean over processes: ``max_grad_norm`` of the training arguments becomes
    0, which tells the Trainer to leave it alone.  ValueError under FSDP and DeepSpeed, whose own optimizers' states
    the Trainer would look for.
    """
    check_arguments(arguments)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "chunkft goes with one process or DDP in a Trainer; under FSDP2, wrap the model with fully_shard and make "
            "burnish.ChunkAdamW in a loop of your own"
        )
    args = trainer.args
    decayed = set(trainer.get_decay_parameter_names(model))
    optimizer = ChunkAdamW(
        model, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
        weight_decay=args.weight_decay, max_grad_norm=args.max_grad_norm or None,
        no_decay=[name for name, p in model.named_parameters() if p.requires_grad and name not in decayed],
        **arguments,
    )  # fmt: skip
    args.max_grad_norm = 0.0
    return optimizer


def find(optimizer) -> ChunkAdamW | None:
    """The ``ChunkAdamW`` behind accelerate's wrapper, or None."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, ChunkAdamW) else None
