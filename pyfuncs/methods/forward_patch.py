"""A model whose forward is another one until it is given back."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn


class ForwardPatch:
    """The handle of a patched model: ``restore()`` undoes the patch; also a context manager.

    Args:
        model: the module itself, not a wrapper around it.
        make: (the handle, the model's class, its own forward or None where that is the class's) -> a function with
            the forward's arguments, ``self`` among them, that asks ``handle.active`` on each call.
    """

    def __init__(self, model: nn.Module, make: Callable[[Any, Any, Any], Callable]):
        self.model, self.active = model, True
        self._before = model.__dict__.get("forward")
        function: Any = make(self, type(model), self._before)
        function.burnish = self
        self._forward = types.MethodType(function, model)
        model.forward = self._forward

    def restore(self) -> None:
        """Give the model its former forward back.  A second call does nothing.

        Where something else has wrapped the forward since (accelerate's autocast), that wrapper stays and
        what it wraps becomes the former forward.
        """
        self.active = False
        if self.model.__dict__.get("forward") is self._forward:
            if self._before is None:
                del self.model.forward
            else:
                self.model.forward = self._before

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.restore()


def refuse_patched(model: nn.Module) -> None:
    """ValueError where a patch of ours is on the model, below others' wrappers or not."""
    # accelerate's wrappers copy a function's attributes, so this sees through them
    present = getattr(model.__dict__.get("forward"), "burnish", None)
    if present is not None and present.active:
        raise ValueError("this model is fused already: call restore() on its handle first")
