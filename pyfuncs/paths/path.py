"""A weight path: theta(t) from a model before (t = 0) to a model after (t = 1), one tensor at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch

from .blend import BLOCK, blend_, parts
from .layers import Stack, find_stack
from .selectors import Selection, Selector, everything
from .tensors import Checkpoint, Tensors, as_tensors

#: A point on a path: one number in [0, 1], or one for each decoder layer and, at None, for the tensors of no layer.
Point = float | Mapping[int | None, float]


class WeightPath(ABC):
    """theta(t): a tensor outside ``selector`` is the model's after training (t = 1) whatever t is.

    A subclass says what a tensor is at t.

    Attributes:
        template: names, shapes and dtypes of the path's tensors, and the layout of the shards that ``save`` writes.
        selector: name -> what of it moves.
    """

    def __init__(self, template: Tensors, selector: Selector | None = None, layers: int | None = None):
        self.template = template
        self.selector: Selector = everything(template) if selector is None else selector
        unknown = [n for n in self.selector if n not in template]
        if unknown:
            raise ValueError(f"selector: {unknown[0]} and {len(unknown) - 1} more are not among the path's tensors")
        self._count = layers
        self._stack: Stack | None = None

    @abstractmethod
    def _point(self, name: str, t: float) -> torch.Tensor:
        """The whole tensor at t, in memory of its own."""

    def _kept(self, name: str, t: float) -> bool:
        """Whether the tensor at t is ``template``'s, byte for byte."""
        return False

    def kept(self, name: str, t: Point) -> bool:
        """Whether the tensor at t is ``template``'s, byte for byte, so that it need not be computed."""
        selection = self.selector.get(name)
        if selection is None:
            return self._kept(name, 1.0)
        at = self._at(name, t)
        return self._kept(name, at) and (selection.ranges is None or self._kept(name, 1.0))

    def tensor(self, name: str, t: Point) -> torch.Tensor:
        """One tensor at t, in memory of its own, in the template's dtype.

        ValueError for a t outside [0, 1], or a mapping that lacks the tensor's layer.
        """
        selection = self.selector.get(name)
        at = 1.0 if selection is None else self._at(name, t)
        if selection is None or at == 1:
            return self._point(name, 1.0)
        if selection.ranges is None:
            return self._point(name, at)
        end, moved = self._point(name, 1.0), self._point(name, at)
        for x, y in zip(parts(end, selection), parts(moved, selection), strict=True):
            x.copy_(y)
        return end

    def sources(self) -> list[Tensors]:
        """What the path reads."""
        return [self.template]

    def chunks(self, name: str, t: Point) -> Iterator[torch.Tensor]:
        """The tensor at t as pieces whose elements follow on each other, for writing; in one piece unless a path knows
        better."""
        yield self.tensor(name, t)

    def at(self, t: Point) -> PathPoint:
        """theta(t) as a mapping whose tensors are made when they are asked for; ``dict(path.at(t))`` is a state
        dict."""
        return PathPoint(self, t)

    def load_into(self, model: torch.nn.Module, t: Point) -> None:
        """Copy theta(t) into a model's tensors, one at a time.

        ValueError where the model has no tensor of a name or shape, or one that the path lacks (other than one tied
        to a tensor that it has): nothing is written then.
        """
        own = model.state_dict()
        for name in self.template:
            if name not in own:
                raise ValueError(f"the model has no tensor {name}: save the point and load it with from_pretrained")
            if tuple(own[name].shape) != self.template.shape(name):
                raise ValueError(f"{name}: {self.template.shape(name)} on the path, {(*own[name].shape,)} in the model")
        ours = {own[n].data_ptr() for n in self.template}
        for name in own.keys() - set(self.template):
            if own[name].data_ptr() not in ours:
                raise ValueError(f"the path has no tensor {name}")
        with torch.no_grad():
            for name in self.template:
                own[name].copy_(self.tensor(name, t))

    def _at(self, name: str, t: Point) -> float:
        if isinstance(t, Mapping):
            if self._stack is None:
                self._stack = find_stack(self.template, self._count) or Stack("?")
            layer = self._stack.layer(name)
            if layer not in t:
                which = "tensors of no layer (None)" if layer is None else f"layer {layer}"
                raise ValueError(f"t: nothing for {which}")
            t = t[layer]
        t = float(t)
        if not math.isfinite(t) or not 0 <= t <= 1:
            raise ValueError(f"t must lie in [0, 1]; got {t}")
        return t


class PathPoint(Mapping[str, torch.Tensor]):
    """theta(t): made tensor by tensor, kept by nobody.  It is one of ``Tensors`` too."""

    def __init__(self, path: WeightPath, t: Point):
        self.path, self.t = path, t

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.path.template:
            raise KeyError(name)
        return self.path.tensor(name, self.t)

    def __contains__(self, name: object) -> bool:
        return name in self.path.template

    def __iter__(self) -> Iterator[str]:
        return iter(self.path.template)

    def __len__(self) -> int:
        return sum(1 for _ in self.path.template)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.path.template.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.path.template.dtype(name)

    def tensor(self, name: str) -> torch.Tensor:
        return self.path.tensor(name, self.t)


class Additive(WeightPath):
    """theta(t) = pre + t (post - pre): WiSE-FT (arXiv 2109.01903); on a selector at t = 0, QK-Restore.

    Args:
        pre, post: directories, modules or state dicts.
        selector: what moves; by default everything.  Elsewhere post's bytes stay.
        layers: number of decoder layers, where a mapping is given for t and names alone do not tell.

    At t = 0 the selected part is pre's and at t = 1 post's, bit for bit.  A dtype is post's.

    ValueError where a selected tensor is not in pre, or of another shape there.
    """

    def __init__(self, pre, post, selector: Selector | None = None, layers: int | None = None):
        self.pre = as_tensors(pre)
        super().__init__(as_tensors(post), selector, layers)
        for name in self.selector:
            if name not in self.pre:
                raise ValueError(f"{name} is in the model after training and not in the one before")
            before, after = self.pre.shape(name), self.template.shape(name)
            if before != after:
                raise ValueError(f"{name}: shape {before} before training, {after} after")

    def _point(self, name: str, t: float) -> torch.Tensor:
        post = self.template.tensor(name)
        return post if t == 1 else blend_(post, self.pre.tensor(name), t, Selection())

    def _kept(self, name: str, t: float) -> bool:
        return t == 1

    def sources(self) -> list[Tensors]:
        return [self.template, self.pre]

    def chunks(self, name: str, t: Point) -> Iterator[torch.Tensor]:
        selection, post, pre = self.selector.get(name), self.template, self.pre
        whole = selection is not None and selection.ranges is None
        if not (whole and isinstance(post, Checkpoint) and isinstance(pre, Checkpoint)):
            yield self.tensor(name, t)
            return
        at = self._at(name, t)
        for after, before in zip(post.chunks(name, BLOCK), pre.chunks(name, BLOCK), strict=True):
            yield blend_(after, before, at, Selection())

    def tensor(self, name: str, t: Point) -> torch.Tensor:
        selection = self.selector.get(name)
        at = 1.0 if selection is None else self._at(name, t)
        if selection is not None and selection.ranges is None and at == 0:
            return self.pre.tensor(name).to(self.template.dtype(name))
        post = self.template.tensor(name)
        if selection is None or at == 1:
            return post
        return blend_(post, self.pre.tensor(name), at, selection)
