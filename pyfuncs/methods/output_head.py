"""What stands between a causal LM's hidden states and its logits: weight, bias, scale and softcap."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..chunkft.slices import row_blocks
from ..ops.lora import LoRAHead


@dataclass(frozen=True)
class OutputHead:
    """z = softcap tanh(scale (h W^T + bias) / softcap); ``softcap`` None leaves the tanh out."""

    weight: Tensor | list[Tensor] | LoRAHead
    bias: Tensor | None
    scale: float
    softcap: float | None


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    inner: Any = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def backbone(model: nn.Module) -> nn.Module:
    """The part of a causal LM that ends in hidden states.  ValueError where there is none."""
    inner = getattr(model, "base_model", model)
    if inner is model:
        raise ValueError(f"{type(model).__name__} has no backbone: a transformers causal LM is needed")
    return inner


def head_module(model: nn.Module) -> nn.Module:
    """The module that holds the LM head's weight.

    Raises ValueError where there is none, or where a PEFT adapter other than LoRA or DoRA sits on it: the weight is
    read, the module is never called, so the adapter would be ignored and never trained.
    """
    get: Any = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: a model with an LM head is needed")
    if "peft" in sys.modules:
        from peft.tuners.lora import Linear
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        if isinstance(head, BaseTunerLayer) and not isinstance(head, Linear):
            raise ValueError(
                f"a PEFT adapter on lm_head must be LoRA or DoRA; got {type(head).__name__}: take 'lm_head' out of "
                "target_modules"
            )
        if isinstance(head, ModulesToSaveWrapper):  # a full trained copy beside the original
            return head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    return head


def transforms(config) -> tuple[float, float | None]:
    """(scale, softcap) of a model's logits, from its text config.

    Field names differ between families; each is one scalar applied before the softcap.  Granite and
    MiniCPM3 divide by ``logits_scaling``, HyperCLOVA X multiplies by it.
    """
    text = config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(text, name, None)
        if value is not None:
            return float(value), softcap
    value = getattr(text, "logits_scaling", None)
    if value is None:
        return 1.0, softcap
    return float(value) if text.model_type == "hyperclovax" else 1.0 / float(value), softcap


def output_head(model: nn.Module, *, blocks: bool = False) -> OutputHead:
    """The head as it is now: FSDP and PEFT replace modules, so look it up on each call.

    ``blocks``: where ChunkFT trains some of its rows, the weight is a list of row blocks, as ``linear_loss`` takes
    it, and only those rows' gradient is formed.
    """
    head = head_module(model)
    weight: Any = row_blocks(head) if blocks else head.weight
    bias = getattr(head, "bias", None)
    if hasattr(weight, "ds_id"):
        raise ValueError("DeepSpeed ZeRO-3 partitions the LM head: use ZeRO-2, FSDP2 or DDP")
    adapter = _adapter(head)
    if adapter is None:
        weight = weight if isinstance(weight, list) else _whole(weight)
    else:
        a, b, magnitude, scaling, dropout = adapter
        parts = (_whole(a), _whole(b), scaling, None if magnitude is None else _whole(magnitude), dropout)
        weight = LoRAHead(_whole(head.weight), *parts)
    scale, softcap = transforms(model.config)
    return OutputHead(weight, None if bias is None else _whole(bias), scale, softcap)


def _adapter(head: Any) -> tuple | None:
    """(A, B, magnitude or None, scaling, dropout) of a PEFT layer's active LoRA; None where the base stands alone."""
    if not hasattr(head, "lora_A") or head.disable_adapters or head.merged:
        return None
    active = [name for name in head.active_adapters if name in head.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise ValueError(f"one adapter may be active on lm_head; got {', '.join(active)}")
    (name,) = active
    variant = getattr(head, "lora_variant", {}).get(name)
    if variant is not None and type(variant).__name__ != "DoraLinearVariant":
        raise ValueError(f"a LoRA variant on lm_head must be DoRA; got {type(variant).__name__}")
    if head.lora_B[name].bias is not None:
        raise ValueError("a LoRA with a bias of its own (lora_bias=True) on lm_head is not supported")
    dropout = getattr(head.lora_dropout[name], "p", 0.0) if head.training else 0.0
    magnitude = None
    if variant is not None:
        magnitude = head.lora_magnitude_vector[name].weight.reshape(-1)
        if dropout:
            raise ValueError("DoRA with lora_dropout on lm_head is not supported: set lora_dropout=0")
    return head.lora_A[name].weight, head.lora_B[name].weight, magnitude, float(head.scaling[name]), float(dropout)


def within(module: nn.Module, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """``function(hidden)``, called as the forward of the head's ``module`` where FSDP2 manages that.

    The head's weight is read and the module itself never called, so FSDP's hooks on it would not run: they
    gather the weight, in the dtype of the mixed precision policy, and await its gradient.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return function(hidden)
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        return module(hidden)
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _whole(parameter: Any) -> Tensor:
    """A parameter that FSDP2 shards by itself, whole, with FSDP's average over ranks as its gradient.

    ``full_tensor()`` alone takes the ranks' gradients for equal and keeps a slice of this rank's own.  Within FSDP's
    root unit, and under ``within``, parameters are whole already.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the LM head, without gathering it."""
    weight: Any = head_module(base_model(model)).weight
    return weight.shape[0]
