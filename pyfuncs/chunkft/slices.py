"""Row ranges of a model's weights as leaves that train, while the rest of the model is frozen.

A segment of the active chunk is a Parameter of its own, the *leaf*: it shares the memory of rows [start, stop) of its
weight, so an optimizer's in-place step on it is a step on the weight, and its ``.grad`` has the rows' shape.  Leaves
stand in one submodule of the model, ``active_slices``, so that ``model.parameters()``, ``model.zero_grad()`` and
gradient clipping see them; they are in no state dict.

Modules whose weights have active rows, and those alone, get a subclass of their own class for the time:

* ``forward`` of nn.Linear, nn.Embedding and GPT-2's Conv1D calls the plain function on the frozen weight and attaches
  the leaf to its output (``ops.slice_grad``): only the rows' gradient is formed, and an input is saved only where a
  layer has active rows;
* the weight's attribute is a property: whoever else reads it (another module, a fused LM head, an adapter) gets the
  weight as a function of the leaf, so that no use of an active weight goes without its gradient.

Nothing global is patched; ``detach()`` gives the model back as it was.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.launch import accumulator
from ..ops.shards import is_dtensor
from ..ops.slice_grad import assemble, attach_embedding, attach_linear, empty
from .parallel import local_tensor
from .plan import ChunkPlan, Segment

CONTAINER = "active_slices"
_STATE = "_burnish_slices"
_IGNORED = "_ddp_params_and_buffers_to_ignore"


class ActiveSlices(nn.Module):
    """The leaves of the active chunk by name; never in a state dict."""

    def forward(self, x):
        return x  # an nn.Sequential runs all it holds

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        pass

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        pass


class Slice:
    """One active segment: its leaf, and the memory its gradient is written to."""

    def __init__(self, segment: Segment, leaf: nn.Parameter):
        self.segment, self.leaf = segment, leaf
        self.target: Tensor | None = None  # of the leaf's shape, in the gradient's dtype
        self._lent = False
        leaf.register_post_accumulate_grad_hook(self._came_back)

    def _came_back(self, _) -> None:
        self._lent = False

    def use(self, target: Tensor | None) -> None:
        self.target, self._lent = target, False

    def room(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The target, where no gradient is in it yet or on its way: autograd then takes it as ``.grad`` itself.

        A second use of the weight in one backward, a second micro-batch and ``torch.autograd.grad`` get new memory.
        """
        t = self.target
        if self._lent or t is None or self.leaf.grad is not None or (t.shape, t.dtype) != (torch.Size(shape), dtype):
            return empty(shape, dtype, device)
        self._lent = True
        return t.view(shape)  # a tensor of its own: autograd takes one that nobody else holds, and copies others


def _linear(self, x: Tensor) -> Tensor:
    s = self.__dict__[_STATE]["weight"]
    y = F.linear(x, self._parameters["weight"], self.bias)
    return attach_linear(y, x, s.leaf, s.segment.start, room=_room(s))


def _conv1d(self, x: Tensor) -> Tensor:
    s = self.__dict__[_STATE]["weight"]
    y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self._parameters["weight"])
    y = y.view(*x.shape[:-1], self.nf)
    return attach_linear(y, x, s.leaf, s.segment.start, transposed=True, room=_room(s))


def _embedding(self, tokens: Tensor) -> Tensor:
    s = self.__dict__[_STATE]["weight"]
    y = F.embedding(tokens, self._parameters["weight"], self.padding_idx, self.max_norm, self.norm_type)
    return attach_embedding(y, tokens, s.leaf, s.segment.start, padding_idx=self.padding_idx, room=_room(s))


def _room(s: Slice):
    return empty if torch.compiler.is_compiling() else s.room


def _known(module: nn.Module):
    """The forward that cuts this module's weight, or None: one whose own forward is not the plain one's."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    for kind, forward in ((nn.Linear, _linear), (nn.Embedding, _embedding), (conv1d, _conv1d)):
        if kind is not None and isinstance(module, kind) and type(module).forward is kind.forward:  # type: ignore[attr-defined]
            return forward
    return None


def _property(name: str) -> property:
    def read(self) -> Tensor:
        s, weight = self.__dict__[_STATE][name], self._parameters[name]
        return assemble(s.leaf, weight, s.segment.start)

    return property(read)


@functools.cache
def _sliced_class(cls: type, names: tuple[str, ...], forward) -> type:
    """``cls`` with properties for ``names``; under its own name, which models print and libraries look for."""
    members = {name: _property(name) for name in names}
    if forward is not None and "weight" in names:
        members["forward"] = forward
    return type(cls.__name__, (cls,), {**members, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


class Slices:
    """A model whose weights are trained chunk by chunk; gradients that it has are let go of."""

    def __init__(self, model: nn.Module, plan: ChunkPlan):
        if CONTAINER in model._modules:
            raise ValueError("this model is trained by chunks already: detach() its ChunkAdamW first")
        self.model, self.plan = model, plan
        self.parameters = dict(model.named_parameters())
        planned = {s.name for chunk in plan.chunks for s in chunk}
        self.owners = _owners(model, {id(self.parameters[name]): name for name in planned})
        for chunk in plan.chunks:
            for s in chunk:
                self._check(s)
        for name in planned:
            self.parameters[name].grad = None
            self.parameters[name].requires_grad_(False)
        for s in plan.always:
            p = self.parameters[s.name]
            p.grad = None
            if not is_dtensor(p):
                p.grad_dtype = accumulator(p.dtype)  # type: ignore[attr-defined]
        self.container = ActiveSlices()
        model.add_module(CONTAINER, self.container)
        self._ignored = model.__dict__.get(_IGNORED)
        self._cache: dict[Segment, Slice] = {}
        self._classes: dict[nn.Module, type] = {}
        self.active: list[Slice] = []
        embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding))
        self._hooks = [m.register_forward_hook(self._keep_graph) for m in embeddings]

    def _check(self, s: Segment) -> None:
        """ValueError for a weight whose rows cannot be leaves."""
        if not local_tensor(self.parameters[s.name]).is_contiguous():
            raise ValueError(f"parameter {s.name!r} must be contiguous; got strides {self.parameters[s.name].stride()}")
        for module, _ in self.owners[s.name]:
            if getattr(module, "scale_grad_by_freq", False):
                raise ValueError(f"parameter {s.name!r}: nn.Embedding(scale_grad_by_freq=True) is not supported")
            if s.whole or len(s.shape) != 2:
                continue
            kind = type(module).__name__
            if _known(module) is None:
                raise ValueError(
                    f"parameter {s.name!r} {tuple(self.parameters[s.name].shape)} belongs to a {kind}, whose rows "
                    f"burnish cannot train apart: keep it in one piece with whole=({s.name!r},), or freeze it with "
                    "requires_grad_(False)"
                )

    def weight(self, s: Segment) -> Tensor:
        """The rows of a segment as they lie in the weight."""
        return self.parameters[s.name].data[s.start : s.stop]

    def _slice(self, s: Segment) -> Slice:
        p = self.parameters[s.name]
        if s not in self._cache:
            if is_dtensor(p):  # the whole rows exist only while FSDP has them gathered: this is where a gradient goes
                rows = torch.empty((), dtype=p.dtype, device=p.device).expand(s.shape)
            else:
                rows = self.weight(s)
            leaf = nn.Parameter(rows)
            leaf.grad_dtype = accumulator(p.dtype)  # type: ignore[attr-defined]
            self._cache[s] = Slice(s, leaf)
        return self._cache[s]

    def activate(self, segments: Iterable[Segment]) -> list[Slice]:
        """Make these segments the ones that train; the former ones lose their gradients."""
        self._deactivate()
        named: dict[nn.Module, dict[str, Slice]] = {}
        for segment in segments:
            s = self._slice(segment)
            self.active.append(s)
            label = f"{segment.name}[{segment.start}:{segment.stop}]".replace(".", "/")
            self.container.register_parameter(label, s.leaf)
            for module, name in self.owners[segment.name]:
                named.setdefault(module, {})[name] = s
        self.follow()  # leaves of an earlier cycle: the model may have been laid out anew since
        for module, slices in named.items():
            cls = type(module)
            self._classes[module] = cls
            module.__dict__[_STATE] = slices
            module.__class__ = _sliced_class(cls, tuple(sorted(slices)), _known(module))  # type: ignore[arg-type]
        # DDP must neither reduce nor broadcast what is reduced in step() and shares the weights' memory
        ignored = [f"{CONTAINER}.{name}" for name in self.container._parameters]
        self.model.__dict__[_IGNORED] = [*(self._ignored or ()), *ignored]
        return self.active

    def _deactivate(self) -> None:
        for module, cls in self._classes.items():
            ours = type(module)
            if ours.__mro__[1] is not cls:
                raise RuntimeError(f"the class of a {cls.__name__} was changed while its rows were active")
            module.__class__ = cls
            del module.__dict__[_STATE]
        self._classes.clear()
        for s in self.active:
            s.leaf.grad = None
            s.use(None)
        self.container._parameters.clear()
        self.active = []

    def follow(self) -> None:
        """Leaves to the memory where their weights lie now, after a model was laid out anew."""
        for s in self.active:
            if not is_dtensor(self.parameters[s.segment.name]):
                rows = self.weight(s.segment)
                if s.leaf.data_ptr() != rows.data_ptr():
                    s.leaf.data = rows

    def _keep_graph(self, module, inputs, output):
        # reentrant checkpointing runs a block's backward only where one of its inputs requires a gradient
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or output.requires_grad:
            return None
        if _reentrant(self.model):
            return output.requires_grad_()
        return None

    def detach(self) -> None:
        """Give the model back: its classes, its parameters' requires_grad, its attributes."""
        self._deactivate()
        del self.model._modules[CONTAINER]
        self.model.__dict__.pop(_IGNORED, None)
        if self._ignored is not None:
            self.model.__dict__[_IGNORED] = self._ignored
        for hook in self._hooks:
            hook.remove()
        for s in self.plan.parameters:
            p = self.parameters[s.name]
            p.grad = None
            p.requires_grad_(True)
            if not is_dtensor(p):
                p.grad_dtype = p.dtype  # type: ignore[attr-defined]


def _owners(model: nn.Module, names: dict[int, str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Every (module, attribute) that holds a planned parameter: two for tied weights."""
    found: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names.values()}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in names:
                found[names[id(p)]].append((module, name))
    return found


def _reentrant(model: nn.Module) -> bool:
    """Whether a transformers model checkpoints its layers in the reentrant way."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            return bool(getattr(function, "keywords", {}).get("use_reentrant", False))
    return False


def row_blocks(module: Any) -> list[Tensor] | Tensor:
    """A module's weight (V, H) for an op that takes row blocks: the active rows as their leaf, the others detached.

    The weight itself where no rows are active; the leaf alone where all are.
    """
    s = module.__dict__.get(_STATE, {}).get("weight")
    if s is None:
        return module.weight
    weight, start, stop = module._parameters["weight"].detach(), s.segment.start, s.segment.stop
    parts = [weight[:start], assemble(s.leaf, weight[start:stop], 0), weight[stop:]]
    blocks = [part for part in parts if part.shape[0]]
    return blocks[0] if len(blocks) == 1 else blocks


@contextlib.contextmanager
def attach(model: nn.Module, plan: ChunkPlan, chunk: int = 0) -> Iterator[Slices]:
    """Within the block, chunk ``chunk`` of ``plan`` trains; afterwards the model is as it was."""
    slices = Slices(model, plan)
    try:
        slices.activate(plan.chunks[chunk])
        yield slices
    finally:
        slices.detach()
