"""The cycle: a learning rate that falls as a sawtooth, a weight decay that rises against it, batches between.

Within a cycle of L optimizer steps, s = 0 .. L-1, with f the rate's floor and w the decay's (arXiv 2606.03938, 2.1, as
the authors' program has it):

    lr_mult(s) = f + (1 - f) (1 - s/L)                            1 at first, f + (1 - f)/L at last
    wd_mult(s) = w + (1 - w) (1 - lr_mult(s)) / (1 - f)           w at first; without warm-up w + (1 - w) s/L

The decay that an optimizer like AdamW applies is the product of rate and decay, which still falls within a cycle
(0.7 to 0.167 at L = 10): the decay against the rate only makes it fall less.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def lr_mult(s: int, steps: int, *, floor: float = 0.08, warmup: float = 0.0, warmdown: float = 0.0) -> float:
    """What the learning rate is multiplied by at step ``s`` of a cycle of ``steps``.

    Args:
        floor: f, in [0, 1): what the sawtooth falls to, and never reaches.
        warmup: share of the cycle, at its beginning, over which it rises from f to 1.
        warmdown: share of the cycle, at its end, over which it goes from f to 0 as half a cosine.

    ValueError naming the argument.
    """
    _check(s, steps, floor, warmup, warmdown)
    up, down = round(warmup * steps), round(warmdown * steps)
    if s < up:
        return floor + (1 - floor) * s / up
    if s >= steps - down:
        return floor * 0.5 * (1 + math.cos(math.pi * (s - (steps - down)) / down))
    return floor + (1 - floor) * (1 - (s - up) / (steps - up - down))


def wd_mult(
    s: int, steps: int, *, floor: float = 0.7, lr_floor: float = 0.08, warmup: float = 0.0, warmdown: float = 0.0
) -> float:  # fmt: skip
    """What the weight decay is multiplied by: ``floor`` where the rate is highest, 1 at the rate's own floor.

    Its correlation with ``lr_mult`` is -1.  ``floor`` 1 keeps the decay as it is.  In a warm-down the rate goes below
    its floor and this above 1, to at most floor + (1 - floor)/(1 - lr_floor).
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"wd_floor must lie in [0, 1]; got {floor}")
    rate = lr_mult(s, steps, floor=lr_floor, warmup=warmup, warmdown=warmdown)
    return floor + (1 - floor) * (1 - rate) / (1 - lr_floor)


def batch_sizes(cycles: int, peak: int, share: float) -> list[int]:
    """Rows a micro-batch in each cycle: ``peak`` in the middle half of the cycles, ``share`` of it, rounded, outside.

    The triangle 1 - |2c/(C-1) - 1| over the cycles c = 0 .. C-1, cut at a half.  ``share`` 1 keeps all alike.
    """
    if not 0 < share <= 1:
        raise ValueError(f"batch_floor must lie in (0, 1]; got {share}")
    least = max(1, round(peak * share))
    return [peak if cycles == 1 or 1 - abs(2 * c / (cycles - 1) - 1) >= 0.5 else least for c in range(cycles)]


class CycleScheduler(LRScheduler):
    """The schedule on any torch optimizer: each of its groups' ``lr``, and ``weight_decay`` where a group has one.

    Args:
        optimizer: its groups' present values are the peaks.
        lengths: optimizer steps of each cycle, one after another.
        lr_floor, wd_floor, warmup, warmdown: as ``lr_mult`` and ``wd_mult``.

    Call ``step()`` after each optimizer step; what it sets depends on their number alone, so that a resumed run goes on
    with the same values.  Behind the last step the last values stay.
    """

    def __init__(
        self, optimizer: Optimizer, lengths: Sequence[int], *, lr_floor: float = 0.08, wd_floor: float = 0.7,
        warmup: float = 0.0, warmdown: float = 0.0,
    ):  # fmt: skip
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths must be at least one cycle of at least one step; got {list(lengths)}")
        self._lengths, self._ends = list(lengths), list(accumulate(lengths))
        self._form: dict[str, Any] = {"warmup": warmup, "warmdown": warmdown}
        self._floors = lr_floor, wd_floor
        wd_mult(0, 1, floor=wd_floor, lr_floor=lr_floor, **self._form)
        for group in optimizer.param_groups:
            if "weight_decay" in group:
                group.setdefault("initial_weight_decay", group["weight_decay"])
        super().__init__(optimizer)

    def place(self) -> tuple[int, int]:
        """(cycle, step within it), both from 0, of the optimizer step that comes next."""
        return place(self._ends, self.last_epoch)

    def get_lr(self) -> list[Any]:
        cycle, s = self.place()
        mult = lr_mult(s, self._lengths[cycle], floor=self._floors[0], **self._form)
        return [base * mult for base in self.base_lrs]

    def step(self, epoch=None) -> None:
        super().step(epoch)
        cycle, s = self.place()
        lr_floor, floor = self._floors
        mult = wd_mult(s, self._lengths[cycle], floor=floor, lr_floor=lr_floor, **self._form)
        for group in self.optimizer.param_groups:
            if "weight_decay" in group:
                group["weight_decay"] = group["initial_weight_decay"] * mult


def place(ends: Sequence[int], step: int) -> tuple[int, int]:
    """(cycle, step within it) of an optimizer step of the run; behind the end, the last."""
    step = min(step, ends[-1] - 1)
    cycle = bisect_right(ends, step)
    return cycle, step - (ends[cycle - 1] if cycle else 0)


def _check(s: int, steps: int, floor: float, warmup: float, warmdown: float) -> None:
    if not 0 <= s < steps:
        raise ValueError(f"s must be a step of a cycle of {steps}, from 0; got {s}")
    if not 0 <= floor < 1:
        raise ValueError(f"lr_floor must lie in [0, 1); got {floor}")
    for name, share in (("warmup", warmup), ("warmdown", warmdown)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be a share of the cycle, in [0, 1]; got {share}")
    if warmup + warmdown > 1:
        raise ValueError(f"warmup and warmdown must be at most 1 together; got {warmup} and {warmdown}")
