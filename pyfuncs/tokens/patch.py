"""Replacing a method of one object, and taking that back exactly.

A patch is an entry of the instance's own ``__dict__``: class, state dict and hooks stay as they are, so copies and
pickles of a patched model work (they are patched too), and an undone patch leaves nothing behind.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator

from torch import nn


class Patch:
    """``owner.name`` called through ``around(original, *args, **kwargs)`` while it is applied.

    ``around``: a method of a module-level class, so that it can be copied and pickled along.
    """

    def __init__(self, owner: object, name: str, around: Callable):
        self.owner, self.name, self.around = owner, name, around
        self.had, self.before = False, None

    def apply(self) -> None:
        attributes = vars(self.owner)
        self.had, self.before = self.name in attributes, attributes.get(self.name)
        attributes[self.name] = self

    def undo(self) -> None:
        """RuntimeError where something else has replaced the method since."""
        self.check()
        if self.had:
            vars(self.owner)[self.name] = self.before
        else:
            del vars(self.owner)[self.name]

    def check(self) -> None:
        if vars(self.owner).get(self.name) is not self:
            raise RuntimeError(
                f"{type(self.owner).__name__}.{self.name} was replaced after accelerate(): undo that before restore()"
            )

    @property
    def original(self) -> Callable:
        if self.had:
            assert self.before is not None
            return self.before
        # not a bound method: torch.compile makes one again by looking the name up on the instance, and finds the patch
        return functools.partial(getattr(type(self.owner), self.name), self.owner)

    @property
    def __signature__(self) -> inspect.Signature:  # trainers ask a forward what it takes
        return inspect.signature(self.original)

    def __call__(self, *args, **kwargs):
        return self.around(self.original, *args, **kwargs)


def patches_of(model: nn.Module) -> Iterator[Patch]:
    """Every patch in a model."""
    for module in model.modules():
        for value in list(vars(module).values()):
            if isinstance(value, Patch):
                yield value
