"""``fuse_oft``: HF PEFT's OFT layers, with the rotation of their input done by ``burnish.block_rotation``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.oft import layer as peft_oft
from torch import Tensor, nn

from ..ops.block_rotation import block_rotation
from .forward_patch import ForwardPatch, refuse_patched


class FusedOFT:
    """The handle of a model whose OFT layers are patched: ``restore()`` undoes it; also a context manager.

    Attributes:
        fused: names of the layers that rotate by ``block_rotation``.
        left: name of each other OFT layer: why it keeps PEFT's forward.
    """

    def __init__(self, layers: dict[str, nn.Module], left: dict[str, str], correction: bool, backend: str):
        self.left, self.correction, self.backend = left, correction, backend
        self._patches = {name: ForwardPatch(layer, self._forward_of) for name, layer in layers.items()}

    @property
    def fused(self) -> list[str]:
        return list(self._patches)

    def _forward_of(self, patch: ForwardPatch, kind: Any, before: Any):
        @functools.wraps(kind.forward)
        def forward(layer, x, *args, **kwargs):
            adapters = _adapters(layer) if patch.active else None
            if not adapters:
                return kind.forward(layer, x, *args, **kwargs) if before is None else before(x, *args, **kwargs)
            dtype = x.dtype
            if len(adapters) > 1:  # between two rotations PEFT does not round
                x = layer._cast_input_dtype(x, adapters[0].weight.dtype)
            for adapter in adapters:
                x = self._rotate(x, adapter)
            return layer.base_layer(x.to(dtype), *args, **kwargs).to(dtype)

        return forward

    def _rotate(self, x: Tensor, adapter: Any) -> Tensor:
        generator = adapter.weight
        if adapter.coft:  # PEFT's own projection, in place on the parameter
            with torch.no_grad():
                generator.copy_(adapter._project_batch(generator, eps=adapter.eps))
            # a second forward before the first one's backward writes it again: what is kept is a copy
            generator = generator.clone()
        terms = adapter.num_cayley_neumann_terms if adapter.use_cayley_neumann else None
        return block_rotation(x, generator, terms=terms, correction=self.correction, backend=self.backend)

    def restore(self) -> None:
        """Give every layer its former forward back.  A second call does nothing."""
        for patch in self._patches.values():
            patch.restore()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.restore()


def _adapters(layer: Any) -> list | None:
    """Rotations to apply in order; None where PEFT's own forward is to run: merged, switched off, dropping blocks."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.oft_R]
    dropping = layer.training and any(getattr(layer.oft_dropout[name], "p", 0.0) > 0 for name in names)
    return None if dropping else [layer.oft_R[name] for name in names]


def fuse_oft(model: nn.Module, *, correction: bool = False, backend: str = "auto") -> FusedOFT:
    """Make the OFT layers of an HF PEFT model rotate their input by ``burnish.block_rotation``.

    Parameters, adapters, merging and checkpoints stay PEFT's; only the forward of ``peft.tuners.oft.layer.Linear`` is
    another, until ``restore()``.  PEFT casts the input to the adapter's dtype (fp32, as a rule), keeps that copy for
    backward, and under autocast rounds R to bf16; here the input is kept as it is, shared by layers that share it, and
    R is fp32.  So outputs are PEFT's up to its rounding, and nearer to the exact ones.

    block_share, constrained OFT, any number of active adapters, Cayley-Neumann and exact Cayley work.  A layer that is
    merged, whose adapters are disabled, or that has ``module_dropout`` while training runs PEFT's own forward, call by
    call.  Layers of other kinds (convolutions, embeddings) are left alone.

    Args:
        model: a model that ``peft.get_peft_model`` or ``add_adapter`` gave OFT layers.
        correction: as in ``block_rotation``; not in PEFT, whose merge does not know of it: a merged model is another.
        backend: as in ``block_rotation``.

    Returns the handle, with ``fused`` and ``left``.  Raises ValueError for a model without such a layer, or one that is
    fused already.
    """
    found: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, peft_oft.OFTLayer):
            continue
        if type(module) is peft_oft.Linear:
            refuse_patched(module)
            found[name] = module
        else:
            left[name] = f"{type(module).__name__} is not peft.tuners.oft.layer.Linear"
    if not found:
        kinds = f" but {len(left)} of other kinds" if left else ""
        raise ValueError(f"model must have OFT layers on nn.Linear; {type(model).__name__} has none{kinds}")
    return FusedOFT(found, left, bool(correction), backend)
