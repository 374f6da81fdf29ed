"""Live bytes of tensors, counted operation by operation on the CPU."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages born under the mode until they die.

    Attributes: ``live`` bytes now, ``peak`` the largest sum seen, ``largest`` the shape of the tensor that
    made the peak.  Exact and repeatable where a process's resident size is neither; memory that an
    operation takes and gives back inside itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, int] = {}
        self.largest: tuple = ()

    def _add(self, x: torch.Tensor, known: set[int]) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.seen or key in known:
            return
        size = storage.nbytes()
        self.seen[key] = size
        self.live += size
        if self.live > self.peak:
            self.peak, self.largest = self.live, tuple(x.shape)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self.seen.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        known -= set(self.seen)
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._add(x, known)
        return out
