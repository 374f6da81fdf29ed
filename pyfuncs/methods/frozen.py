"""A frozen model as an objective's teacher: its backbone's hidden states and its head, never its logits.

The same pass serves as teacher, reference, base model or old policy, whatever the objective calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.teacher import Teacher
from .output_head import backbone, base_model, head_module, output_head

#: (args, kwargs of the student's backbone, rows of hidden to keep) -> Teacher
TeacherPass = Callable[[tuple, dict, slice], Teacher]
_NOT_FOR_TEACHERS = ("output_router_logits", "output_hidden_states", "output_attentions", "past_key_values")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, no activation checkpointing), and each module's own mode back afterwards."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def freeze(model: nn.Module) -> nn.Module:
    """Eval mode and no gradients; returns the model."""
    return model.eval().requires_grad_(False)


def _run(model: nn.Module, args: tuple, kwargs: dict, keep: slice) -> Teacher:
    if not args and kwargs.get("input_ids") is None:
        raise ValueError("a teacher model needs input_ids; the student was called with inputs_embeds")
    kwargs = {k: v for k, v in kwargs.items() if k not in _NOT_FOR_TEACHERS}
    hidden = backbone(model)(*args, **kwargs).last_hidden_state[:, keep]
    head = output_head(model)
    if not isinstance(head.weight, Tensor):
        raise ValueError("a teacher with an adapter on its lm_head: merge it first (merge_and_unload())")
    return Teacher(
        hidden=hidden.to(head.weight.device), weight=head.weight, bias=head.bias, scale=head.scale, softcap=head.softcap
    )


def separate_teacher(model: nn.Module) -> TeacherPass:
    """A teacher that is a model of its own.  It is frozen here and stays outside the student's modules."""
    inner = base_model(freeze(model))
    head_module(inner)

    @torch.no_grad()
    def run(args: tuple, kwargs: dict, keep: slice) -> Teacher:
        return _run(inner, args, kwargs, keep)

    return run


def adapterless_teacher(student: Any) -> TeacherPass:
    """The PEFT student with its adapters off: its base model, at no memory of its own."""
    if not hasattr(student, "disable_adapter"):
        raise ValueError(f"teacher_model='base' needs a PEFT student; got {type(student).__name__}")
    if any(getattr(c, "is_prompt_learning", False) for c in student.peft_config.values()):
        raise ValueError("teacher_model='base' does not go with prompt learning: virtual tokens are part of the input")
    inner = base_model(student)

    @torch.no_grad()
    def run(args: tuple, kwargs: dict, keep: slice) -> Teacher:
        with evaluating(inner), student.disable_adapter():
            return _run(inner, args, kwargs, keep)

    return run
