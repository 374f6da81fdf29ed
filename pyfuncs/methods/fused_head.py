"""``fuse_lm_head``: a causal LM whose forward computes an objective in place of logits.

The loss is made inside ``model.forward``, so that DDP's and FSDP's hooks see the head's weight in use,
and everything around it (data, packing, PEFT, accumulation, checkpoints) stays the trainer's.  Two callers
are served: TRL's SFTTrainer, which asks with ``fused_lm_head=True``, and whoever gives ``labels``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ..objectives.base import Objective
from ..ops.linear_loss import linear_loss
from .forward_patch import ForwardPatch, refuse_patched
from .frozen import TeacherPass, adapterless_teacher, separate_teacher
from .output_head import backbone, base_model, head_module, output_head, within
from .rules import check_carried, check_teacher

METRICS = ("entropy", "hit")


@dataclass
class FusedLossOutput(ModelOutput):
    """What TRL's SFTTrainer reads, with our objective in the place of -log p.

    Args:
        loss: the objective over ``num_items_in_batch`` (or the labels that count), 0-dim.
        log_probs: minus the *summed* objective, 0-dim: TRL negates, sums and divides it by the number of
            tokens of the whole accumulated batch, which gives the objective's mean.
        entropy: (B, T - 1) nats, 0 where ignored or not asked for.
        is_top1: (B, T - 1) 1.0 where the label is the likeliest token.
        label_mask: (B, T - 1) bool.
        aux_loss: the MoE load-balancing loss, where router logits were asked for.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


class FusedHead(ForwardPatch):
    """The handle of a patched model: ``restore()`` undoes the patch; also a context manager."""

    def __init__(self, model: nn.Module, objective: Objective, teacher: TeacherPass | None, metrics, budget, backend):
        self.objective, self.teacher = objective, teacher
        self.metrics, self.budget, self.backend = tuple(metrics), budget, backend
        super().__init__(model, _make_forward)

    def score(self, model, args, kwargs, labels, shift_labels, per_token) -> tuple[Tensor, dict, Tensor, Tensor | None]:
        """Summed objective, metrics, label mask and MoE loss of one batch."""
        kwargs["use_cache"] = False
        text = model.config.get_text_config()
        if getattr(text, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        keep = slice(None) if shift_labels is not None else slice(None, -1)
        # first, so that none of the student's activations are alive beside the teacher's
        teacher = self.teacher(args, kwargs, keep) if self.teacher else None
        out = backbone(model)(*args, **kwargs)
        head: Any = head_module(model)
        device = head.weight.device
        labels = (shift_labels if shift_labels is not None else labels[:, 1:]).to(device)
        sequences = None
        if "sequences" in self.objective.needs and kwargs.get("position_ids") is not None:
            positions = kwargs["position_ids"]
            if positions.ndim == 2:  # (1, T) stands for every row
                positions = positions.expand(labels.shape[0], -1)
            sequences = _sequences(positions)[:, keep if shift_labels is not None else slice(1, None)].to(device)

        def loss_of(hidden: Tensor):
            head = output_head(model, blocks=True)
            return linear_loss(
                hidden.to(device), head.weight, labels.contiguous(), self.objective, bias=head.bias, teacher=teacher,
                sequences=sequences, reduction="sum", scale=head.scale, softcap=head.softcap, metrics=self.metrics,
                budget=self.budget, backend=self.backend,
                # the trainers read numbers off the device at every step anyway; unlabelled rows are worth one more
                num_valid=None if device.type == "cpu" else "sync",
                **{k: (v[:, 1:] if shift_labels is None else v) for k, v in per_token.items()},
            )  # fmt: skip

        result = within(head, loss_of, out.last_hidden_state[:, keep])
        loss, metrics = result if self.metrics else (result, {})
        aux = aux_loss(out, text, kwargs) if kwargs.get("output_router_logits") else None
        return loss, metrics, labels != -100, aux


def fuse_lm_head(
    model: nn.Module, objective: Objective, *, teacher_model: nn.Module | str | None = None,
    metrics: tuple[str, ...] = METRICS, budget: int | None = None, backend: str = "auto",
) -> FusedHead:  # fmt: skip
    """Make a causal LM's forward compute ``objective`` without ever holding its logits.

    After it, ``model(..., labels=...)`` returns a ``CausalLMOutputWithPast`` with ``loss`` alone (the
    objective's mean over the labels that count, or over ``num_items_in_batch``), which is all that
    transformers' Trainer needs; ``model(..., labels=..., fused_lm_head=True)`` returns what TRL's
    SFTTrainer needs; without labels the forward, and so generation, is the original one.

    Args:
        model: a transformers causal LM, or a PEFT model around one.  Patch before DDP or FSDP wrap it.
        objective: ``burnish.objectives.*`` or your own.
        teacher_model: where the objective needs a teacher, reference, base model or old policy: a
            transformers model (frozen here, run on the same inputs, never stored in ``model``), or "base",
            the PEFT student with its adapters off.
        metrics: which of "entropy" and "hit" TRL's output carries; the others are zeros.
        budget, backend: as in ``burnish.linear_loss``.

    Objectives that weigh by sequence (iw_sft, talr) take sequences from ``position_ids`` where given (a 0
    begins one, as packing writes them), else a row is a sequence.  ``token_weight`` (B, T) and ``ids``
    (B, T, K) may be given to the forward, aligned with ``labels``.

    Returns the handle.  Raises ValueError for a model without backbone or head, an adapter on the head,
    a model that is fused already, an unknown metric, an objective with inputs of its own or a mean over sequences,
    or a teacher that is needed and not given; TypeError for an objective that is none.
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be a burnish.Objective; got {type(objective).__name__}")
    check_carried(objective)
    unknown = set(metrics) - set(METRICS)
    if unknown:
        raise ValueError(f"metrics must be among {', '.join(METRICS)}; got {', '.join(sorted(unknown))}")
    inner = base_model(model)
    backbone(inner)
    head_module(inner)
    refuse_patched(inner)
    teacher = None
    if "teacher" in objective.needs:
        check_teacher(objective, teacher_model)
        if isinstance(teacher_model, nn.Module):
            teacher = separate_teacher(teacher_model)
        elif teacher_model == "base":
            teacher = adapterless_teacher(model)
        else:
            raise ValueError(f"teacher_model must be a model or 'base'; got {teacher_model!r}")
    return FusedHead(inner, objective, teacher, metrics, budget, backend)


def _make_forward(handle: FusedHead, kind: Any, before):
    # the class's own signature: generate and Trainer check their arguments against it
    @functools.wraps(kind.forward)
    def forward(self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        if not handle.active or (not fused_lm_head and labels is None and shift_labels is None):
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            kwargs.update({k: v for k, v in given.items() if v is not None})
            if fused_lm_head:
                kwargs["fused_lm_head"] = True
            return kind.forward(self, *args, **kwargs) if before is None else before(*args, **kwargs)
        per_token = {k: kwargs.pop(k) for k in ("token_weight", "ids") if kwargs.get(k) is not None}
        for name in ("logits_to_keep", "return_dict"):
            kwargs.pop(name, None)
        total, metrics, mask, aux = handle.score(self, args, kwargs, labels, shift_labels, per_token)
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count, device=total.device)
        if aux is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux.to(loss.device)
        if not fused_lm_head:
            return CausalLMOutputWithPast(loss=loss)
        zeros = None if set(METRICS) <= set(handle.metrics) else total.new_zeros(()).expand(mask.shape)
        entropy, hit = (metrics[name] if name in handle.metrics else zeros for name in METRICS)
        return FusedLossOutput(loss=loss, log_probs=-total, entropy=entropy, is_top1=hit, label_mask=mask, aux_loss=aux)

    return forward


def _sequences(position_ids: Tensor) -> Tensor:
    """Sequence number of each token (B, T): position 0 begins one, and so does each row."""
    if position_ids.ndim == 3:  # multimodal rotary positions: the first plane is time
        position_ids = position_ids[0]
    starts = (position_ids == 0).clone()  # an expanded view could not be written
    starts[:, 0] = True
    return starts.flatten().cumsum(0).reshape(starts.shape)


def aux_loss(out, config, kwargs) -> Tensor:
    """The MoE load-balancing loss of a backbone's output, 0-dim."""
    # every MoE family of transformers shares Mixtral's balancing loss
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = getattr(out, "router_logits", None)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if logits is None or experts is None:
        raise ValueError(f"{config.model_type} gives no router logits: set output_router_logits=False")
    aux = load_balancing_loss_func(logits, experts, config.num_experts_per_tok, kwargs.get("attention_mask"))
    return torch.as_tensor(aux)
