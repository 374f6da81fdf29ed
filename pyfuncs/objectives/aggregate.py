"""From token losses to one number: means over tokens or sequences, and their denominators over micro-batches and ranks.

With l_t the token losses of sequence b, n_b the labels of it that are not ignored (whatever their weight), B sequences:

==============================  ======================================  ====================
``token_mean``                  sum_b sum_t l_t / sum_b n_b             ``num_items``: tokens
``sequence_mean_token_mean``    sum_b (sum_t l_t / n_b) / B             ``num_items``: sequences
``sequence_mean_token_sum``     sum_b (sum_t l_t) / B                   ``num_items``: sequences
==============================  ======================================  ====================

``num_items`` takes the denominator's place, so that parts of a batch add up to its mean: ``count_items``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

AGGREGATES = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum")


def numbers(sequence: Tensor) -> Tensor:
    """Each row's sequence as a number from 0 up, whatever ids the caller gave; no device sync: (N,) int64."""
    order = torch.argsort(sequence, stable=True)
    ids = sequence[order]
    new = torch.zeros_like(ids)
    new[1:] = (ids[1:] != ids[:-1]).to(ids.dtype)
    return torch.empty_like(ids).scatter_(0, order, new.cumsum(0))


def over_sequences(values: Tensor, valid: Tensor, sequence: Tensor, *, mean: bool) -> Tensor:
    """The sum or mean of (N,) values over the valid rows of each row's sequence, differentiable: (N,)."""
    return _over(values, valid, numbers(sequence), mean=mean)


def _over(values: Tensor, valid: Tensor, number: Tensor, *, mean: bool) -> Tensor:
    total = values.new_zeros(values.shape).index_add(0, number, torch.where(valid, values, 0.0))
    if mean:
        total = total / values.new_zeros(values.shape).index_add(0, number, valid.to(values.dtype)).clamp(min=1)
    return total[number]


def row_weights(
    aggregate: str, valid: Tensor, sequence: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """(factor of each token's loss (N,), or None for 1; denominator, 0-dim, or None for the valid tokens)."""
    if aggregate == "token_mean":
        return None, None
    assert sequence is not None  # such an objective needs "sequences"
    number, share = numbers(sequence), None
    if aggregate == "sequence_mean_token_mean":
        ones = torch.ones(sequence.shape, dtype=dtype, device=sequence.device)
        share = _over(ones, valid, number, mean=False).clamp(min=1).reciprocal()
    return share, _count(number).float()


def _count(number: Tensor) -> Tensor:
    """How many sequences there are, those without a valid label among them: 0-dim int64."""
    return number.max() + 1 if number.numel() else number.new_zeros(())


def count_items(
    target: Tensor | Sequence[Tensor], objective="token_mean", *, sequences: Sequence[Tensor] | Tensor | None = None,
    ignore_index: int = -100, group=None,
) -> Tensor:  # fmt: skip
    """``num_items`` for a batch in parts, so that the parts' gradients add up to that of its mean.

    Args:
        target: int64 labels, (B, T) or (N,), of one micro-batch or a list of all those of an optimizer step.
        objective: an ``Objective``, or the name of an aggregation: whether tokens or sequences are counted.  All rows
            of a (B, T) target are sequences, also one whose labels are all ignored.
        sequences: int64 ids of the targets' shapes, where rows are not the sequences; no id in two targets.
        group: the process group whose ranks hold the batch's parts (``torch.distributed.group.WORLD``).  The count is
            summed over it and divided by its size, since DDP and FSDP average gradients: the averaged gradient is then
            that of one process with the whole batch.

    Returns a 0-dim fp32 tensor on the first target's device.  No sync but the collective's.
    """
    aggregate = getattr(objective, "aggregate", objective)
    if aggregate not in AGGREGATES:
        raise ValueError(f"objective must be an Objective or one of {', '.join(AGGREGATES)}; got {objective!r}")
    targets = [target] if isinstance(target, Tensor) else list(target)
    ids = [sequences] * len(targets) if sequences is None or isinstance(sequences, Tensor) else list(sequences)
    if len(ids) != len(targets) or (isinstance(sequences, Tensor) and len(targets) > 1):
        raise ValueError(f"sequences must have one tensor for each of the {len(targets)} targets")
    if not targets:
        raise ValueError("target must hold at least one tensor; got an empty list")
    total = torch.zeros((), dtype=torch.int64, device=targets[0].device)
    for labels, sequence in zip(targets, ids, strict=True):
        if aggregate == "token_mean":
            total = total + (labels != ignore_index).sum().to(total)
        elif sequence is not None:
            total = total + _count(numbers(sequence.reshape(-1))).to(total)
        elif labels.ndim == 2:
            total = total + labels.shape[0]
        else:
            raise ValueError(f"sequences must be given to count the sequences of a target {tuple(labels.shape)}")
    if group is None:
        return total.float()
    torch.distributed.all_reduce(total, group=group)
    return total.float() / torch.distributed.get_world_size(group)
