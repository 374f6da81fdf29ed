"""``fuse_policy_head``: TRL's policy-gradient trainers with log-probabilities and entropies from ``linear_stats``.

The seam is TRL 1.16's own: its trainers call ``model(..., labels=..., fused_lm_head=True)`` and read ``log_probs`` and
``entropy``, differentiable, from the output.  Here that call is answered in vocabulary-outer order, so everything above
(every loss_type, divergence, mask, controller and metric) stays TRL's, and any upstream gradient is exact.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer, RLOOTrainer

from ..ops.linear_stats import linear_stats
from .forward_patch import ForwardPatch, refuse_patched
from .fused_head import aux_loss
from .output_head import backbone, base_model, head_module, output_head, within

try:
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise ImportError("burnish.methods.fuse_policy_head needs the fused head of TRL 1.16 or later") from error

#: The method of TRL's trainers that asks the model, and whose callers read the answer.
_SEAM = "_get_per_token_logps_and_entropies"


class _ScoringHead(ForwardPatch):
    """A causal LM whose ``fused_lm_head=True`` forward is ours; every other forward is as before."""

    def __init__(self, model: nn.Module, *, temperature: float, entropy: bool, fp32: bool, budget, backend):
        self.temperature, self.fp32 = temperature, fp32
        self.stats = ("logp", "entropy") if entropy else ("logp",)
        self.budget, self.backend = budget, backend
        super().__init__(model, _make_forward)

    def score(self, model, args, kwargs, labels, shift_labels, num_items) -> FusedCausalLMOutput:
        kwargs["use_cache"] = False
        text = model.config.get_text_config()
        if getattr(text, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        out = backbone(model)(*args, **kwargs)
        head: Any = head_module(model)
        device = head.weight.device
        hidden = out.last_hidden_state if shift_labels is not None else out.last_hidden_state[:, :-1]
        labels = (shift_labels if shift_labels is not None else labels[:, 1:]).to(device)
        mask = labels != -100
        # prompts and padding are most of a batch: worth the one number read off the device
        index = mask.reshape(-1).nonzero()[:, 0]
        target = labels.reshape(-1)[index]

        def stats_of(rows: Tensor) -> tuple[Tensor, ...]:
            head = output_head(model, blocks=True)
            s = linear_stats(
                rows, head.weight, target, stats=self.stats, bias=head.bias, scale=head.scale, softcap=head.softcap,
                temperature=self.temperature, budget=self.budget, backend=self.backend,
            )  # fmt: skip
            return tuple(getattr(s, name) for name in self.stats)

        rows = hidden.to(device).flatten(0, 1).index_select(0, index)
        with contextlib.ExitStack() as stack:
            if self.fp32:
                rows = rows.float()
                stack.enter_context(torch.autocast(device.type, enabled=False))
            values = within(head, stats_of, rows)
        shown = [v.new_zeros(mask.numel()).index_copy(0, index, v).reshape(mask.shape) for v in values]
        log_probs, entropy = shown[0], shown[1] if len(shown) > 1 else None
        count = mask.sum().clamp(min=1) if num_items is None else num_items
        loss = -log_probs.sum() / torch.as_tensor(count, device=device)
        aux = None
        if kwargs.get("output_router_logits"):
            aux = aux_loss(out, text, kwargs)
            loss = loss + getattr(text, "router_aux_loss_coef", 0.0) * aux.to(device)
        return FusedCausalLMOutput(loss=loss, log_probs=log_probs, entropy=entropy, label_mask=mask, aux_loss=aux)


def _make_forward(handle: _ScoringHead, kind: Any, before):
    # the class's own signature: generate and Trainer check their arguments against it
    @functools.wraps(kind.forward)
    def forward(self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        if handle.active and fused_lm_head:
            return handle.score(self, args, kwargs, labels, shift_labels, num_items_in_batch)
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        kwargs.update({k: v for k, v in given.items() if v is not None})
        if fused_lm_head:
            kwargs["fused_lm_head"] = True
        return before(*args, **kwargs)

    return forward


class PolicyHead:
    """The handle of a trainer with our head: ``restore()`` gives TRL's back; also a context manager."""

    def __init__(self, trainer, heads: list[_ScoringHead]):
        self.trainer, self.heads = trainer, heads

    def restore(self) -> None:
        """Give policy and reference model their former forward back.  A second call does nothing."""
        for head in self.heads:
            head.restore()

    def __enter__(self) -> PolicyHead:
        return self

    def __exit__(self, *_) -> None:
        self.restore()


def fuse_policy_head(
    trainer: GRPOTrainer | RLOOTrainer, *, budget: int | None = None, backend: str = "auto"
) -> PolicyHead:
    """Give a TRL GRPOTrainer or RLOOTrainer the fused head: policy and reference model, no subclass, no new option.

        trainer = GRPOTrainer(model, reward_funcs, args, train_dataset=data)
        with fuse_policy_head(trainer):
            trainer.train()

    Log-probabilities and entropies are fp32 and differentiable, from logits that exist a tile at a time, of the
    completions' tokens alone; the logits' scale, softcap, bias and the trainer's temperature are applied as TRL applies
    them.  Generation, rewards, advantages and the loss on those vectors are TRL's own lines.

    Args:
        trainer: made, not yet trained or between two runs; its models are patched below DDP, FSDP2 and PEFT.
        budget, backend: as in ``burnish.linear_stats``.

    Memory and FLOPs of the head: as ``linear_stats``, 8 N V H for N completion tokens, as many as TRL's own.

    Returns the handle.  Raises TypeError for another kind of trainer, ValueError naming the option where one would go
    around the fused head or is not known to work with it: an overridden ``_get_per_token_logps_and_entropies``,
    DeepSpeed ZeRO-3, FSDP 1, tensor parallelism, torch_compile, use_liger_kernel; an adapter on the head that is not
    LoRA or DoRA, a model without backbone or head, one that is fused already.
    """
    _check(trainer)
    fp32 = bool(getattr(trainer.args, "cast_lm_head_to_fp32", False))
    options: dict[str, Any] = {"temperature": trainer.temperature, "fp32": fp32, "budget": budget, "backend": backend}
    models: list[tuple[nn.Module, bool]] = [(base_model(trainer.accelerator.unwrap_model(trainer.model)), True)]
    reference = getattr(trainer, "ref_model", None)
    if reference is not None:
        models.append((base_model(trainer.accelerator.unwrap_model(reference)), False))
    for model, _ in models:
        backbone(model)
        output_head(model)
        refuse_patched(model)
        if "forward" not in model.__dict__:
            raise ValueError(f"{type(model).__name__} has no fused head of TRL's to take the place of")
    return PolicyHead(trainer, [_ScoringHead(model, entropy=entropy, **options) for model, entropy in models])


def _check(trainer) -> None:
    """TypeError or ValueError, naming the option, where our head would be passed by or is not known to work."""
    if not isinstance(trainer, (GRPOTrainer, RLOOTrainer)):
        raise TypeError(f"trainer must be a trl.GRPOTrainer or RLOOTrainer; got {type(trainer).__name__}")
    args, state = trainer.args, trainer.accelerator.state
    own = GRPOTrainer if isinstance(trainer, GRPOTrainer) else RLOOTrainer
    asks = getattr(trainer, _SEAM)
    tensor_parallel = getattr(getattr(state, "parallelism_config", None), "tp_enabled", False)
    fsdp_version = getattr(getattr(state, "fsdp_plugin", None), "fsdp_version", 2)
    stage = getattr(getattr(state, "deepspeed_plugin", None), "zero_stage", 0)
    refused = {
        f"{type(trainer).__name__}.{_SEAM}, overridden": getattr(asks, "__func__", asks) is not getattr(own, _SEAM),
        "DeepSpeed ZeRO-3, which partitions the LM head": stage == 3,
        "FSDP 1 (fsdp_version=1): use fsdp_version=2": trainer.is_fsdp_enabled and fsdp_version != 2,
        "tensor parallelism (parallelism_config.tp_size)": tensor_parallel,
        "torch_compile=True": bool(args.torch_compile),
        "use_liger_kernel=True": bool(args.use_liger_kernel),
    }
    for option, given in refused.items():
        if given:
            raise ValueError(f"fuse_policy_head does not support {option}")
