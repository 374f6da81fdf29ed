"""torch's Muon for the hidden matrices and its AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer


class MuonAdamW(Optimizer):
    """``torch.optim.Muon`` on the matrices of the layers, ``torch.optim.AdamW`` on embeddings, LM head, vectors.

    One set of groups and one state for both, so that schedules, clipping and checkpoints see a single optimizer.
    Muon's updates are scaled to AdamW's root mean square (``adjust_lr_fn="match_rms_adamw"``), and so take its learning
    rate and decay.

    Args:
        model: its trained parameters; of a transformers model the embeddings are known by its accessors.
        lr, weight_decay: of both.
        no_decay: names of parameters without decay.
        momentum: Muon's.
        betas, eps: AdamW's.

    ValueError where no matrix is left for Muon.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, weight_decay: float = 0.1, no_decay: Collection[str] = (),
        momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
    ):  # fmt: skip
        embeddings = {id(m.weight) for m in _embeddings(model)}
        matrices: list[dict[str, Any]] = [{"params": [], "weight_decay": d} for d in (weight_decay, 0.0)]
        others: list[dict[str, Any]] = [{"params": [], "weight_decay": d} for d in (weight_decay, 0.0)]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                hidden = parameter.ndim == 2 and id(parameter) not in embeddings
                (matrices if hidden else others)[name in no_decay]["params"].append(parameter)
        matrices, others = ([g for g in groups if g["params"]] for groups in (matrices, others))
        if not matrices:
            raise ValueError("optimizer muon: the model has no matrix beside its embeddings")
        muon = torch.optim.Muon(matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._parts: list[Optimizer] = [muon]
        if others:
            self._parts.append(AdamW(others, lr=lr, betas=betas, eps=eps))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's groups and state."""
        start = 0
        for part in self._parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[start : start + count]
            part.state = self.state
            start += count

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict) -> None:
        super().load_state_dict(state_dict)
        self._share()


def _embeddings(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    for name in ("get_input_embeddings", "get_output_embeddings"):
        get: Any = getattr(model, name, None)
        module = get() if get is not None else None
        if module is not None and isinstance(getattr(module, "weight", None), torch.Tensor):
            found.append(module)
    return found
