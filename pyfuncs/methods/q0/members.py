"""One member of an ensemble: a causal LM, called with a cache of its own; and the files that make up its checkpoint."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.linear_stats import linear_stats
from ..frozen import evaluating
from ..output_head import backbone, base_model, output_head, vocabulary_size
from ..run_directory import quiet_loading

IGNORED = -100
#: Files of a checkpoint that an export takes: no optimizer, no record of a run, no cached log-probabilities, no code.
_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*", "*.model",
)  # fmt: skip


def load_member(folder: Path, dtype: torch.dtype | str, device: torch.device | None) -> nn.Module:
    """A checkpoint as transformers' causal LM, in eval mode.  ValueError, in one line, where it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    from ..models import check_model_name

    check_model_name(str(folder))
    try:
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"member {folder}: cannot be loaded: {first}") from error
    moved: nn.Module = model.eval()
    return moved if device is None else moved.to(device)


def vocabulary_of(member: nn.Module | Path) -> int:
    """Rows of a member's LM head; of a directory, what its config says."""
    if isinstance(member, nn.Module):
        return vocabulary_size(plain(member))
    try:
        config = json.loads((member / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"member {member}: config.json is missing or cut short") from error
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if not isinstance(size, int):
        raise ValueError(f"member {member}: config.json has no vocab_size")
    return size


def copy_checkpoint(source: Path, target: Path) -> None:
    """The files of a checkpoint that evaluation needs.  ValueError where there are no safetensors weights."""
    target.mkdir(parents=True)
    names = {path for pattern in _FILES for path in source.glob(pattern) if path.is_file()}
    if not any(path.suffix == ".safetensors" for path in names):
        raise ValueError(f"member {source}: has no model*.safetensors")
    for path in sorted(names):
        shutil.copyfile(path, target / path.name)


def save_member(member: nn.Module, target: Path) -> None:
    """A model that was given, by its own ``save_pretrained``."""
    if hasattr(member, "peft_config"):
        raise ValueError("a member with an adapter cannot be exported: merge it first (merge_and_unload())")
    model: Any = plain(member)
    model.save_pretrained(target)


def plain(member: Any) -> nn.Module:
    """The transformers model inside what torch.compile and PEFT put around it."""
    return base_model(getattr(member, "_orig_mod", member))


def device_of(member: nn.Module) -> torch.device:
    return next(member.parameters()).device


@torch.no_grad()
def label_logp(member: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """log p of each label, (B, T - 1), in nats, 0 where ignored; logits are never whole.

    labels are aligned with ids (B, T): the model at position t is scored against label t + 1.
    """
    model, device = plain(member), device_of(member)
    ids, labels = ids.to(device), labels.to(device)
    given = {} if mask is None else {"attention_mask": mask.to(device)}
    if mask is not None and "position_ids" in _parameters(model):
        given["position_ids"] = positions(given["attention_mask"])
    with evaluating(member):
        hidden = backbone(model)(input_ids=ids, use_cache=False, **given).last_hidden_state[:, :-1]
        head = output_head(model)
        stats = linear_stats(
            hidden, head.weight, labels[:, 1:].contiguous(), stats=("logp",), bias=head.bias, scale=head.scale,
            softcap=head.softcap, ignore_index=IGNORED,
        )  # fmt: skip
    return stats.logp


def positions(mask: Tensor) -> Tensor:
    """Position of each token (B, T) among those that are not padding, on whichever side padding lies."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _parameters(model: nn.Module) -> Any:
    return inspect.signature(model.forward).parameters


class Decoder:
    """A member that is asked for the logits after one more token, again and again.

    A member whose forward takes a cache (``cache``, in older releases ``past_key_values``) gets one of its own and
    reads the new tokens only; another reads the whole text at each step.
    """

    def __init__(self, member: nn.Module, *, use_cache: bool = True):
        self.member = member
        model: Any = plain(member)
        self.accepts = _parameters(model)
        self.keyword = next((k for k in ("cache", "past_key_values") if k in self.accepts), None)
        self.cache: Any = None
        if use_cache and self.keyword is not None:
            from transformers import DynamicCache

            self.cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def logits(self, ids: Tensor, mask: Tensor | None, keep: int | Tensor) -> Tensor:
        """Logits (B, K, V) at the last ``keep`` positions (0: all; or an index tensor) of the text so far, (B, T)."""
        device = device_of(self.member)
        ids = ids.to(device)
        given: dict[str, Any] = {}
        new = slice(None)
        if self.cache is not None and self.keyword is not None:
            new = slice(self.cache.get_seq_length(), None)
            given[self.keyword] = self.cache
        if mask is not None:
            given["attention_mask"] = mask.to(device)
            if "position_ids" in self.accepts:
                given["position_ids"] = positions(given["attention_mask"])[:, new]
        if "logits_to_keep" in self.accepts:
            given["logits_to_keep"] = keep if isinstance(keep, int) else keep.to(device)
        if "use_cache" in self.accepts:
            given["use_cache"] = self.cache is not None
        with evaluating(self.member):
            logits = self.member(input_ids=ids[:, new], **given).logits
        if "logits_to_keep" not in self.accepts:
            logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
        return logits
