"""Inputs and outputs of modules during a forward pass: which modules, hooks, and how a batch's tokens are chosen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ...paths import find_stack

#: Of PEFT-Arena's "paper8": these modules of two layers.
PAPER = ("q_proj", "k_proj", "v_proj", "down_proj")
_PEFT = "base_model.model."
Forward = Callable[[torch.nn.Module, Mapping[str, Any]], Any]


def forward(model: torch.nn.Module, batch: Mapping[str, Any]) -> None:
    """``model(**batch)`` without labels; of the logits only the last position's, where the model offers it."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        inputs.setdefault("logits_to_keep", 1)
    model(**inputs)


def choose_modules(model: torch.nn.Module, modules: str | Iterable[str]) -> list[str]:
    """Names of modules.

    Args:
        modules: "paper8": q, k, v and down projections of the layers at one and two thirds of the stack, as PEFT-Arena
            takes layers 9 and 18 of 28; or names, or endings of names ("mlp.down_proj").

    ValueError for what is not there.
    """
    known = {(name.removeprefix(_PEFT)): None for name, _ in model.named_modules(remove_duplicate=False) if name}
    # an adapter's own parts are not the model's
    known = {n: None for n in known if not {"base_layer", "modules_to_save"} & set(n.split(".")) and ".lora_" not in n}
    if isinstance(modules, str) and modules != "paper8":
        modules = [modules]
    if modules == "paper8":
        stack = find_stack(f"{n}.weight" for n in known)
        parts = {n: stack.split(n) for n in known} if stack else {}
        count = max((p[0] for p in parts.values() if p), default=-1) + 1
        layers = {count // 3, 2 * count // 3}
        found = [n for n, p in parts.items() if p and p[0] in layers and p[1].rpartition(".")[2] in PAPER]
        if not found:
            raise ValueError(f"modules='paper8': the model has no {', '.join(PAPER)} in numbered layers; give names")
        return found
    chosen: dict[str, None] = {}
    for wanted in modules:
        found = [n for n in known if n == wanted] or [n for n in known if n.endswith("." + wanted)]
        if not found:
            raise ValueError(f"modules: {wanted} is no module of the model, nor the end of one's name")
        chosen |= dict.fromkeys(found)
    if not chosen:
        raise ValueError("modules: none are given")
    return list(chosen)


def find(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """A module by its name in the base model, in that model or one that PEFT wraps.  ValueError."""
    known = dict(model.named_modules(remove_duplicate=False))
    for candidate in (_PEFT + name, name):
        if candidate in known:
            return known[candidate]
    raise ValueError(f"modules: the other model has no {name}")


@contextmanager
def listening(
    modules: Mapping[str, torch.nn.Module], sink: Callable[[str, torch.Tensor], None], inputs: bool = False
) -> Iterator[None]:
    """sink(name, tensor) at every call of a module: what it is given, or what it gives.  The tensor is the model's own
    and may be overwritten later.  Hooks go when the block ends, after an error too."""
    handles = []
    try:
        for name, module in modules.items():
            if inputs:

                def before(_module, args, kwargs, name=name):
                    sink(name, _tensor(name, (*args, *kwargs.values())))

                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:

                def after(_module, _args, output, name=name):
                    sink(name, _tensor(name, output))

                handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensor(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise ValueError(f"{name}: its activations are no tensor of floating point")
    return value.detach()


def token_mask(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """(B, T) bool from ``attention_mask``; None where a batch has none: all are tokens."""
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(f"attention_mask: (batch, tokens) is needed; got {tuple(mask.shape)}")
    return mask.bool()


def rows(name: str, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(tokens, d): the activations of tokens that are no padding.  ValueError where the shape is not (B, T, d)."""
    if mask is None:
        return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    if x.dim() == 2 and x.shape[0] == mask.numel():
        x = x.reshape(*mask.shape, x.shape[-1])
    if x.dim() != 3 or x.shape[:2] != mask.shape:
        raise ValueError(f"{name}: activations {tuple(x.shape)} for a mask {tuple(mask.shape)}: no row for each token")
    return x[mask.to(x.device)]
